"""ll.geometry: golden values, known spectra, factors against dense, one call for a model."""

import math

import pytest
import torch

import lora_lite as ll
from lora_lite.core import finding
from lora_lite.core.delta import Change
from lora_lite.testing import toy
from tests.core.test_messages import refusal
from tests.observe.test_capture import IDS, MASK, adapted, hooks
from tests.oracles import golden

G = ll.geometry
D = torch.float64
BATCHES = [{"input_ids": IDS, "attention_mask": MASK}, {"input_ids": IDS[:2, :5].flip(0)}]
FIGURES = ("eff_rank", "sigma_ratio", "active_frac", "rep", "gossip", "head_sim")


@pytest.mark.parametrize(
    ("mask", "expected"), [(golden.ONES, (3.583671, 1.422022, 0.975)), (golden.RAGGED, (3.275439, 1.510782, 1.0))]
)
def test_golden_values(mask, expected):
    X = golden.hidden()[mask.bool()]
    assert (G.effective_rank(X), G.sigma_ratio(X), G.active_fraction(X)) == pytest.approx(expected, abs=1e-6)


def test_head_similarity_is_the_objective_s():
    found = [G.head_similarity(P, golden.RAGGED[:, :4]) for P in golden.maps()]
    assert sum(found) / 2 == pytest.approx(0.885100535158, abs=1e-6)
    assert sum(G.head_similarity(P) for P in golden.maps()) / 2 == pytest.approx(0.866289078281, abs=1e-6)


def test_spectra_that_are_known():
    assert G.effective_rank(torch.eye(4, dtype=D)) == pytest.approx(3)
    assert G.sigma_ratio(torch.eye(4, dtype=D)) == pytest.approx(4 / 3)
    line = torch.arange(6, dtype=D)[:, None] * torch.tensor([[1.0, 2, 3]], dtype=D)
    assert G.effective_rank(line) == pytest.approx(1)
    assert G.sigma_ratio(line) == pytest.approx(3)
    assert G.delta_effective_rank(torch.diag(torch.tensor([2.0, 1, 1, 0], dtype=D))) == pytest.approx(
        2 * math.sqrt(2), abs=1e-9
    )
    assert G.delta_effective_rank(torch.zeros(3, 3)) == 0
    assert G.effective_rank(torch.ones(5, 3)) == 0


def test_half_precision_is_measured_in_float32():
    X = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    assert G.effective_rank(X.bfloat16()) == pytest.approx(G.effective_rank(X.bfloat16().float()))


def test_factors_give_the_rank_of_their_product():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(12, 3, generator=generator, dtype=D), torch.randn(3, 20, generator=generator, dtype=D)
    bias = torch.zeros(12, dtype=D)
    assert G.delta_effective_rank(Change(left, right, bias)) == pytest.approx(G.delta_effective_rank(left @ right), abs=1e-9)
    assert G.delta_effective_rank(Change(left[:, :0], right[:0], bias)) == 0


def test_deltas_of_a_model_by_layer():
    model = adapted()
    found = G.of_deltas(model)
    path = "model.layers.1.mlp.down_proj"
    assert found[path] == pytest.approx(G.delta_effective_rank(ll.delta_weight(model, path)), rel=1e-4)
    toy.perturb(ll.attach(model, ll.config("ia3", targets=("q_proj",)), name="other"))
    assert {"model.layers.0.self_attn.q_proj:default", "model.layers.0.self_attn.q_proj:other"} <= G.of_deltas(model).keys()


def test_one_call_measures_a_model_on_the_tokens_of_all_batches():
    model = adapted().train()
    tables = hooks(model)
    found = G.measure(model, BATCHES, tau=0.5)
    assert tuple(found) == (*FIGURES, "delta_eff_rank")
    assert hooks(model) == tables
    assert all(module.training for module in model.modules())
    model.eval()
    with torch.no_grad():
        rows = []
        for batch in BATCHES:
            with ll.capture(model, {"hidden", "attention", "mask"}) as seen:
                model(**batch)
            rows += seen.only.rows()
    X = torch.cat(rows)
    assert len(X) == int(MASK.sum()) + 10
    formulas = ll.objectives.formulas
    expected = {
        "eff_rank": G.effective_rank(X),
        "sigma_ratio": G.sigma_ratio(X),
        "active_frac": G.active_fraction(X),
        "rep": float(formulas.repulsion(X)),
        "gossip": float(formulas.expected_gossip(X, 0.5)),
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected)


def test_splitting_the_batches_changes_nothing():
    model = adapted()
    whole = G.measure(model, [{"input_ids": IDS, "attention_mask": MASK}])
    split = G.measure(model, [{"input_ids": IDS[i : i + 1], "attention_mask": MASK[i : i + 1]} for i in range(3)])
    assert whole == pytest.approx(split, rel=1e-4)


def test_unmasked_figures_stand_beside_and_count_padding():
    model = adapted()
    found = G.measure(model, BATCHES[:1], unmasked=True)
    assert {f"{key}_unmasked" for key in FIGURES} <= found.keys()
    plain = G.measure(model, [{"input_ids": IDS, "attention_mask": MASK}], unmasked=False)
    assert {key: found[key] for key in plain} == pytest.approx(plain)
    assert found["eff_rank_unmasked"] != pytest.approx(found["eff_rank"], rel=1e-3)
    full = [{"input_ids": IDS, "attention_mask": torch.ones_like(MASK)}]
    same = G.measure(model, full, unmasked=True)
    assert [same[f"{key}_unmasked"] for key in FIGURES] == pytest.approx([same[key] for key in FIGURES])


def test_the_base_is_measured_under_disabled_and_has_no_delta():
    model = adapted()
    with ll.disabled(model):
        base = G.measure(model, BATCHES)
    assert "delta_eff_rank" not in base
    ll.detach(model)
    assert G.measure(model, BATCHES) == pytest.approx(base)


def test_measuring_leaves_the_global_stream_and_adapters_alone():
    model = adapted()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    G.measure(model, BATCHES)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(f.adapter.A.requires_grad for f in finding.adapters(model))


def test_layers_are_averaged_and_attention_may_be_left_out():
    model = toy.toy()
    batches = [toy.inputs(2, 6, 24)]
    both = G.measure(model, batches, layers=(0, 1), attention=False)
    ones = [G.measure(model, batches, layers=i, attention=False) for i in (0, 1)]
    assert both == pytest.approx({key: (ones[0][key] + ones[1][key]) / 2 for key in ones[0]})
    assert "head_sim" not in both


def test_many_rows_are_paired_in_a_fixed_sample():
    X = torch.randn(3000, 4, generator=torch.Generator().manual_seed(0))
    assert G.of_rows(X) == G.of_rows(X)
    assert G.of_rows(X, 0.5)["gossip"] == pytest.approx(float(ll.objectives.formulas.expected_gossip(X, 0.5)), rel=0.05)


def test_bad_input_is_named():
    model = adapted()
    refusal(lambda: G.measure(model, []), "no batches", "[batch]")
    refusal(lambda: G.measure(model, BATCHES[0]), "batches is a dict", "[batch]")
    refusal(lambda: G.effective_rank(torch.ones(1, 4)), "(1, 4)", "At least two")
    refusal(lambda: G.measure(toy.toy(), [toy.inputs(2, 6, 24)], layers=1), "attention maps", "scaled_dot_product_attention")
    refusal(lambda: G.of_deltas(toy.toy()), "no adapter")
    refusal(lambda: G.effective_rank(torch.full((3, 4), torch.nan)), "not finite", "isfinite")
    refusal(lambda: G.head_similarity(torch.ones(2, 3, 4, 4), torch.ones(2, 5)), "shape (2, 5)", "attention maps have (2, 4)")
    refusal(lambda: G.head_similarity(torch.ones(2, 3, 4, 4), torch.full((2, 4), 0.5)), "other numbers than 0 and 1")


def test_inference_mode_gives_the_same_figures():
    model = adapted()
    with torch.inference_mode():
        found = G.measure(model, BATCHES)
    assert found == pytest.approx(G.measure(model, BATCHES))
