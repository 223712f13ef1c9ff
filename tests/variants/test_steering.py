"""Steering as a user meets it: labelled calibration, coefficients of both signs, one per sample, and the paper's two ablations.

float32 unless said otherwise, at 1e-6 of the largest value. The operators alone, in float64, are in tests/fidelity.
"""

import copy

import pytest
import torch

import lora_lite as ll
from lora_lite.testing import toy
from lora_lite.testing.formula import T64, adapted
from tests.variants.test_antipasto_ablate import directions, orthogonalise, residual

pytestmark = pytest.mark.filterwarnings("ignore:coeff outside:lora_lite.errors.LoraLiteWarning")


def relative(got, want):
    return float((got - want).detach().abs().max() / want.detach().abs().max())


def ablation(r, **fields):
    """The closed form: a = 1 and, with as many directions as the stream is wide, every direction in span(U)."""
    return ll.AntiPaSTOAblateConfig(r=r, init_alpha=1.0, **fields)


def aim(handle, direction):
    """Give every layer this direction of the stream."""
    with torch.no_grad():
        for adapter in handle.layers.values():
            adapter.v.copy_((adapter.U.T @ direction)[:, None])


# --- equation 4, equation 5 and antipasto_ablate at a = 1 -------------------------------------------------------------


@pytest.mark.parametrize("include_bias", [True, False])
def test_three_ablations_of_one_direction_agree_on_a_residual_model(include_bias):
    model, tokens, r = residual(torch.float32)
    base = model(tokens)
    on_activations = model(tokens, seen=lambda x: x - (x @ r)[..., None] * r)
    on_weights = copy.deepcopy(model)
    orthogonalise(on_weights, r, biases=include_bias)
    orthogonalise(model, r, writers=False)
    aim(ll.attach(model, ablation(16, include_bias=include_bias, exclude=("head",))), r)
    assert relative(model(tokens), on_weights(tokens)) < 1e-6
    assert (relative(on_activations, on_weights(tokens)) < 1e-6) is include_bias
    assert relative(model(tokens), base) > 1e-2


@pytest.mark.parametrize("include_bias", [True, False])
def test_the_coefficient_scales_the_orthogonalisation(include_bias):
    """Equation 5 with c r r^T, for both signs."""
    model, tokens, r = residual(torch.float32)
    handle = ll.attach(model, ablation(16, include_bias=include_bias, exclude=("head",)))
    aim(handle, r)
    for c in (0.5, -0.5, 1.5):
        want = copy.deepcopy(model)
        ll.detach(want)
        for path in handle.layers:
            linear = want.get_submodule(path)
            with torch.no_grad():
                linear.weight.sub_(c * torch.outer(r, r @ linear.weight))
                linear.bias.sub_(include_bias * c * r * (r @ linear.bias))
        with ll.scale(model, c):
            assert relative(model(tokens), want(tokens)) < 1e-6


HIDDEN = 32


def language_model():
    """(a Qwen3 of random weights and biases, token ids, attention_mask that pads some rows)."""
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "attention_bias": True, "tie_word_embeddings": False}
    model = toy.seeded(lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape, **heads))).eval()
    with torch.no_grad():
        for seed, (name, p) in enumerate(model.named_parameters()):
            if "norm" not in name:
                p.copy_(0.1 * toy.inputs(*p.shape, seed=seed))
    ids = toy.seeded(lambda: torch.randint(0, 50, (6, 10)))
    mask = torch.ones_like(ids)
    mask[::2, 7:] = 0
    return model.requires_grad_(False), ids, mask


def writers(model):
    return [linear for layer in model.model.layers for linear in (layer.self_attn.o_proj, layer.mlp.down_proj)]


@pytest.mark.parametrize("include_bias", [True, False])
def test_three_ablations_of_one_direction_agree_on_a_language_model(include_bias):
    model, ids, _ = language_model()
    r = toy.inputs(HIDDEN, seed=6)
    r = r / r.norm()
    base = model(ids).logits

    def ablate(*args):
        x = args[-1]
        if isinstance(x, tuple):
            return (x[0] - (x[0] @ r)[..., None] * r, *x[1:])
        return x - (x @ r)[..., None] * r

    on_activations = copy.deepcopy(model)
    on_activations.model.embed_tokens.register_forward_hook(ablate)
    for layer in on_activations.model.layers:
        layer.register_forward_pre_hook(ablate)
        layer.self_attn.register_forward_hook(ablate)
        layer.mlp.register_forward_hook(ablate)

    model.model.embed_tokens.weight.sub_(torch.outer(model.model.embed_tokens.weight @ r, r))
    on_weights = copy.deepcopy(model)
    for linear in writers(on_weights):
        linear.weight.sub_(torch.outer(r, r @ linear.weight))
        if include_bias and linear.bias is not None:
            linear.bias.sub_(r * (r @ linear.bias))

    handle = ll.attach(model, ablation(HIDDEN, include_bias=include_bias))
    assert len(handle.layers) == len(writers(model))
    aim(handle, r)
    got, want = model(ids).logits, on_weights(ids).logits
    assert relative(got, want) < 1e-6
    assert (relative(on_activations(ids).logits, want) < 1e-6) is include_bias
    assert relative(got, base) > 1e-2


# --- labelled calibration ---------------------------------------------------------------------------------------------


def labelled_batches():
    model, ids, mask = language_model()
    parts = [{"input_ids": ids[rows], "attention_mask": mask[rows]} for rows in ([0, 1], [2], [3, 4], [5])]
    return model, {"positive": parts[:2], "negative": parts[2:]}


def mean_difference(model, path, data, last=True):
    """m of one layer, in float64, from the outputs themselves."""
    seen = []
    hook = model.get_submodule(path).register_forward_hook(lambda layer, args, y: seen.append(y.double()))
    means = []
    for label in ("positive", "negative"):
        rows = []
        for batch in data[label]:
            seen.clear()
            model(**batch)
            for y, mask in zip(seen[0], batch["attention_mask"]):
                kept = y[mask.bool()]
                rows += [kept[-1]] if last else list(kept)
        means.append(torch.stack(rows).mean(0))
    hook.remove()
    return means[0] - means[1]


@pytest.mark.parametrize("positions", ["last", "all"])
@pytest.mark.parametrize("r", [8, HIDDEN])
def test_labelled_batches_seed_every_layer_with_its_difference_of_means(r, positions):
    model, data = labelled_batches()
    cfg = ablation(r, seed_direction="contrast", positions=positions)
    handle = ll.attach(model, cfg, data)
    for path, adapter in handle.layers.items():
        with ll.disabled(model):
            m = mean_difference(model, path, data, last=positions == "last").float()
        coordinates = adapter.U.T @ m
        assert relative(adapter.v[:, 0], coordinates / coordinates.norm()) < 1e-6
        assert abs(coordinates.norm() / m.norm() - 1) < 1e-6
        assert abs(directions(adapter)[:, 0] @ m / m.norm()) > 1 - 1e-6


@pytest.mark.parametrize("name", ["antipasto", "antipasto_rot", "antipasto_ablate"])
def test_the_contrast_chooses_among_the_singular_vectors(name):
    model, data = labelled_batches()
    cfg = ll.config(name, r=8, basis="select", select_score="contrast", roles=("writer",))
    if name == "antipasto_ablate":
        cfg = ll.config(name, r=8, basis="select", select_score="contrast", seed_direction="random")
    handle = ll.attach(model, cfg, data)
    for path, adapter in handle.layers.items():
        with ll.disabled(model):
            m = mean_difference(model, path, data)
        U = torch.linalg.svd(model.get_submodule(path).weight.double()).U
        best = (U.T @ m).abs().topk(8).indices
        assert relative(adapter.U.double() @ adapter.U.T.double(), U[:, best] @ U[:, best].T) < 1e-5
    unlabelled = [batch for part in data.values() for batch in part]
    with pytest.raises(ll.LoraLiteError, match="labelled calibration data"):
        ll.attach(language_model()[0], cfg, unlabelled)


def test_exchanged_labels_turn_the_seed_round_and_ablate_the_same():
    model, data = labelled_batches()
    exchanged, _ = labelled_batches()
    handles = [
        ll.attach(one, ablation(8, seed_direction="contrast"), parts)
        for one, parts in ((model, data), (exchanged, {"positive": data["negative"], "negative": data["positive"]}))
    ]
    for a, b in zip(*(handle.layers.values() for handle in handles), strict=True):
        assert relative(directions(a), -directions(b)) < 1e-5
    ids = data["positive"][0]["input_ids"]
    assert relative(model(ids).logits, exchanged(ids).logits) < 1e-5


@pytest.mark.parametrize("coeff", [0.5, -0.5, 1.0, 1.5])
def test_the_gap_between_the_classes_shrinks_and_grows_with_the_coefficient(coeff):
    """Along m one layer keeps 1 - c of what separates the classes: gone at 1, more of it below 0."""
    model = toy.one(24, 32)
    data = {"positive": toy.batches(count=2), "negative": toy.batches(count=4)[2:]}
    ll.attach(model, ablation(8, seed_direction="contrast"), data)
    with ll.disabled(model), torch.no_grad():
        before = mean_difference_of(model, data)
    with ll.scale(model, coeff), torch.no_grad():
        after = mean_difference_of(model, data)
    assert relative(after, before) > 0.4
    assert float((after - (1 - coeff) * before).abs().max() / before.abs().max()) < 1e-6


def mean_difference_of(model, data):
    means = [
        torch.stack([y[int(m.sum()) - 1] for batch in part for y, m in zip(model(**batch), batch["attention_mask"])]).mean(0)
        for part in data.values()
    ]
    return means[0] - means[1]


# --- coefficients of both signs ---------------------------------------------------------------------------------------

ROTATIONS = {
    "antipasto_rot V": ll.AntiPaSTORotConfig(r=8),
    "antipasto_rot U": ll.AntiPaSTORotConfig(r=8, rotate="U", max_angle=None, block_size=8),
    "oft": ll.OFTConfig(block_size=8),
    "boft": ll.BOFTConfig(block_size=8),
    "road": ll.RoAdConfig(),
}
STRETCH = {"d", "a"}  # of antipasto_rot and road: with them the map is no rotation


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, T64), (torch.float32, 1e-6)])
@pytest.mark.parametrize("coeff", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("cfg", ROTATIONS.values(), ids=ROTATIONS)
def test_minus_c_undoes_c(cfg, coeff, dtype, tolerance):
    """The layer at c, and behind it the same adapter at -c, is the base layer."""
    model, adapter = adapted(cfg, dtype=dtype, size=0.5)
    x = toy.inputs(5, 24, dtype=dtype)
    same = ll.attach(model, cfg if dtype is torch.float32 else copy_in(cfg, dtype), name="back").layers["o_proj"]
    with torch.no_grad():
        for name in STRETCH & {name for name, _ in adapter.named_parameters()}:
            getattr(adapter, name).zero_()
        same.load_state_dict(adapter.state_dict())
        with ll.disabled(model):
            base = model(x)
        ll.scale(model, coeff, name="default")
        ll.scale(model, -coeff, name="back")
        assert relative(model(x), base) < tolerance
        with ll.disabled(model, "back"):
            assert relative(model(x), base) > 1e-2


def copy_in(cfg, dtype):
    return type(cfg)(**{**{f: getattr(cfg, f) for f in cfg.__dataclass_fields__}, "dtype": dtype})


def test_two_sides_at_once_are_not_undone_by_the_other_sign():
    """What the variant's card says: only one rotation is."""
    model, adapter = adapted(ll.AntiPaSTORotConfig(r=8, rotate="both"), size=0.5)
    x = toy.inputs(5, 24, dtype=torch.float64)
    with torch.no_grad():
        adapter.d.zero_()
        same = ll.attach(model, copy_in(adapter.cfg, torch.float64), name="back").layers["o_proj"]
        same.load_state_dict(adapter.state_dict())
        ll.scale(model, -1.0, name="back")
        got = model(x)
        with ll.disabled(model):
            assert relative(got, model(x)) > 1e-3


# --- one coefficient per sample ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [0.4, 1.0])
@pytest.mark.parametrize("name", ["antipasto_ablate", "antipasto_rot", "antipasto"])
def test_samples_steered_both_ways_in_one_batch_equal_separate_runs(name, c):
    model, ids, _ = language_model()
    toy.perturb(ll.attach(model, ll.config(name, r=8)))
    coeffs = torch.tensor([c, -c, 0.0])
    with torch.no_grad():
        with ll.disabled(model):
            base = model(ids[:3]).logits
        with ll.scale(model, coeffs):
            together = model(ids[:3]).logits
        for sample, coeff in enumerate(coeffs):
            with ll.scale(model, float(coeff)):
                alone = model(ids[sample : sample + 1]).logits[0]
            assert relative(together[sample], alone) < 1e-6
    assert torch.equal(together[2], base[2])
    assert relative(together[0], base[0]) > 1e-3
    assert relative(together[1], base[1]) > 1e-3
    assert relative(together[0] - base[0], together[1] - base[1]) > 0.5
