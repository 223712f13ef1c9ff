"""LoKr against the Kronecker product in dense float64 and against PEFT."""

from math import isqrt

import pytest
import torch

import lora_lite as ll
from benchmarks.cost.limit import flop_counter
from lora_lite.testing import checks, toy
from lora_lite.testing.formula import T64, adapted, check_dense, live_gradients
from tests.oracles.layer import check_agree, check_parity_by_name, check_scale

# On the layer of 24 x 32: w1 (4, 4), w2 (8, 6); with factor 8 w1 (8, 8), w2 (4, 3).
FORMS = {
    ("w1", "w2"): ll.LoKrConfig(r=8, alpha=4),
    ("w1", "w2_a", "w2_b"): ll.LoKrConfig(r=2),
    ("w1_a", "w1_b", "w2"): ll.LoKrConfig(r=3, factor=8, decompose_both=True),
    ("w1_a", "w1_b", "w2_a", "w2_b"): ll.LoKrConfig(r=1, decompose_both=True),
}
forms = pytest.mark.parametrize(("names", "cfg"), list(FORMS.items()), ids=["-".join(names) for names in FORMS])


def copy(cfg, **changes):
    return type(cfg)(**{f: getattr(cfg, f) for f in cfg.__dataclass_fields__} | changes)


def whole(a, w):
    return getattr(a, w) if hasattr(a, w) else getattr(a, f"{w}_a") @ getattr(a, f"{w}_b")


def dense(a, W, b, c):
    return W + c * a.s * torch.kron(whole(a, "w1"), whole(a, "w2")), b


def multiplications(adapter, tokens=1):
    with flop_counter() as count, torch.no_grad():
        adapter(torch.ones(tokens, adapter.d_in), torch.ones(tokens, adapter.d_out), None)
    return count.get_total_flops() // 2


LOW1, LOW2, BOTH = FORMS["w1_a", "w1_b", "w2"], FORMS["w1", "w2_a", "w2_b"], FORMS["w1_a", "w1_b", "w2_a", "w2_b"]


@pytest.mark.parametrize("check", [c for cfg in (LOW1, copy(LOW2, init="lycoris"), BOTH) for c in checks("lokr", cfg)], ids=str)
def test_storage_forms_and_starts_are_lawful(check):
    check()


@forms
def test_rank_and_decompose_both_choose_the_storage_form(names, cfg):
    assert tuple(sorted(adapted(cfg)[1].specs())) == names


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("shape", [(24, 32), (32, 24), (23, 29), (60, 7)])
@forms
def test_output_and_gradients_equal_the_dense_form(names, cfg, shape, rslora):
    check_dense(copy(cfg, rslora=rslora), dense, d_in=shape[0], d_out=shape[1], size=1.0)


def test_both_orders_agree_in_values_and_gradients():
    """The same change with w2 whole and in two factors: the first is cheaper with w1 first, the second with w2 first."""
    cfg = ll.LoKrConfig(r=1, alpha=None, factor=10)
    split, a = adapted(cfg, d_in=300, d_out=65, size=1.0)
    joint, b = adapted(copy(cfg, r=15), d_in=300, d_out=65, size=0)
    with torch.no_grad():
        b.w1.copy_(a.w1)
        b.w2.copy_(a.w2_a @ a.w2_b)

    def gradients():
        return [(a.w1.grad, b.w1.grad), (a.w2_b.grad, a.w2_a.detach().T @ b.w2.grad)]

    check_agree(split, joint, toy.inputs(5, 300, dtype=torch.float64), gradients, T64)
    w2_first, w1_first = 10 * 43 + 13 * 50, 30 * 50 + 5 * 390
    assert multiplications(a.float()) == w2_first
    assert multiplications(b.float()) == w1_first
    assert w2_first < 30 * 50 + 5 * 43
    assert w1_first < 10 * 390 + 13 * 50


@forms
@pytest.mark.parametrize("shape", [(24, 32), (32, 24), (60, 7), (7, 60)])
def test_the_cheaper_order_is_computed(shape, names, cfg):
    _, adapter = adapted(cfg, d_in=shape[0], d_out=shape[1], dtype=torch.float32)
    (o1, o2), (i1, i2) = (adapter.cfg.split(d) for d in reversed(shape))
    n1, n2 = (sum(p.numel() for k, p in adapter.named_parameters() if k.startswith(w)) for w in ("w1", "w2"))
    assert multiplications(adapter, tokens=3) == 3 * min(i1 * n2 + o2 * n1, i2 * n1 + o1 * n2)


@pytest.mark.parametrize("factor", [-1, 1, 2, 3, 4, 8, 12, 30, 1000])
def test_factorisation_is_that_of_peft(factor):
    layer = pytest.importorskip("peft.tuners.lokr.layer")
    for n in (*range(1, 400), 768, 896, 1024, 3072, 3584, 4096, 4864, 11008):
        assert ll.LoKrConfig(factor=factor).split(n) == layer.factorization(n, factor), n


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 8, 12])
def test_factorisation_is_that_of_the_paper_up_to_the_root(factor):
    for n in range(factor**2, 400):
        m = max(u for u in range(1, n + 1) if u <= min(factor, isqrt(n)) and n % u == 0)
        assert ll.LoKrConfig(factor=factor).split(n) == (m, n // m)


def test_factor_that_divides_is_taken_even_above_the_root():
    assert ll.LoKrConfig(factor=8).split(24) == (8, 3)
    assert ll.LoKrConfig(factor=8).split(25) == (5, 5)
    factorization = pytest.importorskip("peft").tuners.lokr.layer.factorization
    assert factorization(24, 8) == (8, 3)  # LyCORIS returns the smaller number first: (3, 8)


def test_prime_widths_make_w1_a_number():
    _, adapter = adapted(ll.LoKrConfig(r=2), d_in=23, d_out=29)
    assert (adapter.w1.shape, adapter.w2_a.shape, adapter.w2_b.shape) == ((1, 1), (29, 2), (2, 23))


def test_rank_of_the_change_is_the_product_of_the_ranks():
    for r, rank in ((1, 4), (2, 8), (8, 24)):
        model, _ = adapted(ll.LoKrConfig(r=r), size=1.0)
        values = torch.linalg.svdvals(ll.delta_weight(model, "o_proj").double())
        assert values[rank - 1] > 1e-4 * values[0]
        assert rank == 24 or values[rank] < 1e-6 * values[0]


@forms
def test_scale_is_alpha_over_r_or_over_its_root_in_every_form(names, cfg):
    check_scale(cfg)


ZERO = {"peft": ("w1", "w1_a"), "lycoris": ("w2", "w2_b")}


@pytest.mark.parametrize("init", ["peft", "lycoris"])
@forms
def test_start_values(names, cfg, init):
    _, adapter = adapted(copy(cfg, init=init), size=0)
    for name in names:
        value = getattr(adapter, name)
        assert bool(value.any()) != (name in ZERO[init]), name
        assert value.abs().max() <= value.shape[1] ** -0.5, name
    _, large = adapted(copy(cfg, r=7, factor=16, init=init), d_in=4096, d_out=4096, size=0, dtype=torch.float32)
    for name, value in large.named_parameters():
        assert name in ZERO[init] or value.abs().max() > 0.9 * value.shape[1] ** -0.5, name


@pytest.mark.parametrize("init", ["peft", "lycoris"])
@forms
def test_gradient_pattern(names, cfg, init):
    assert live_gradients(copy(cfg, init=init)) == [set(names) & set(ZERO[init]), set(names)]


@forms
def test_decay_acts_on_every_tensor(names, cfg):
    assert all(spec.decay for spec in adapted(cfg)[1].specs().values())


@pytest.mark.parametrize(("form", "numbers"), list(zip(FORMS, (16 + 48, 16 + 2 * 14, 3 * 16 + 12, 8 + 14))))
def test_trained_and_frozen_numbers(form, numbers):
    model, _ = adapted(FORMS[form])
    assert (ll.status(model).trainable, ll.status(model).frozen) == (numbers, 0)


def test_numbers_and_multiplications_of_a_wide_layer():
    _, adapter = adapted(ll.LoKrConfig(), d_in=3584, d_out=1024, dtype=torch.float32)
    assert sum(p.numel() for p in adapter.parameters()) == 2560
    assert multiplications(adapter) == 100_352


@pytest.mark.parametrize("factor", [0, -2])
def test_factor_below_one_is_refused(factor):
    with pytest.raises(ll.LoraLiteError, match=r"(?s)factor=.*at least 1, or -1"):
        ll.LoKrConfig(factor=factor)


@pytest.mark.parametrize("cfg", [*FORMS.values(), ll.LoKrConfig(r=4, factor=2), ll.LoKrConfig(r=64, factor=2)])
def test_parity_with_peft(cfg):
    peft = pytest.importorskip("peft")
    config = peft.LoKrConfig(
        r=cfg.r,
        alpha=cfg.alpha,
        decompose_both=cfg.decompose_both,
        decompose_factor=cfg.factor,
        target_modules=["o_proj"],
        init_weights=False,
    )
    check_parity_by_name(cfg, config, {name: f"lokr_{name}" for name in adapted(cfg)[1].specs()})
