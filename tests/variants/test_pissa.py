"""PiSSA against the SVD of W, the paper's formula in dense float64, and PEFT."""

from unittest import mock

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.mathematics import spectrum as svd
from lora_lite.testing import toy
from lora_lite.testing.checks import error
from lora_lite.testing.formula import T64, adapted, check_dense
from tests.oracles.layer import check_parity, peft_layer


def dense(a, W, b, c):
    return W + c * a.s * ((a.B0 + a.dB) @ (a.A0 + a.dA) - a.B0 @ a.A0), b


def started(cfg, weight, dtype=torch.float64):
    """(layer, adapter) right after attach on a layer with this weight."""
    model = nn.ModuleDict({"o_proj": nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=dtype)})
    with torch.no_grad():
        model.o_proj.weight.copy_(weight)
    handle = ll.attach(model, cfg)
    return model.o_proj, handle.layers["o_proj"]


def spectrum(o, i, values, dtype=torch.float64):
    """A random o x i matrix with these singular values."""
    U, V = (torch.linalg.qr(toy.inputs(n, len(values), dtype=dtype, seed=n)).Q for n in (o, i))
    return U @ torch.diag(values.to(dtype)) @ V.T


@pytest.mark.parametrize("fields", [{}, {"alpha": 8.0}, {"alpha": 8.0, "rslora": True}])
def test_output_and_gradients_equal_the_dense_form(fields):
    check_dense(ll.PiSSAConfig(r=4, **fields), dense)


@pytest.mark.parametrize("alpha", [None, 1.0, 50.0])
@pytest.mark.parametrize(("o", "i"), [(32, 24), (24, 32)])
def test_start_product_is_the_best_rank_r_approximation(o, i, alpha):
    W = toy.inputs(o, i, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(W)
    _, exact = started(ll.PiSSAConfig(r=5, alpha=alpha, svd="exact", dtype=torch.float64), W)
    product = exact.s * exact.B0 @ exact.A0
    assert error(product, U[:, :5] @ U[:, :5].T @ W) < T64
    assert error(product, U[:, :5] @ torch.diag(S[:5]) @ Vh[:5]) < T64
    _, single = started(ll.PiSSAConfig(r=5, alpha=alpha, svd="exact"), W, torch.float32)
    assert error(single.s * single.B0 @ single.A0, product) < 1e-6


def test_singular_values_are_shared_equally_by_the_factors():
    W = toy.inputs(32, 24, dtype=torch.float64)
    S = torch.linalg.svdvals(W)[:5]
    _, adapter = started(ll.PiSSAConfig(r=5, alpha=20.0, svd="exact", dtype=torch.float64), W)
    assert error(adapter.A0.square().sum(1), S / 4) < T64
    assert error(adapter.B0.square().sum(0), S / 4) < T64


def test_rank_stabilised_scale_enters_the_factors():
    W = toy.inputs(32, 24, dtype=torch.float64)
    plain = started(ll.PiSSAConfig(r=4, alpha=8.0, dtype=torch.float64), W)[1]
    ranked = started(ll.PiSSAConfig(r=4, alpha=8.0, rslora=True, dtype=torch.float64), W)[1]
    assert (plain.s, ranked.s) == (2.0, 4.0)
    assert error(ranked.A0.norm(dim=1), plain.A0.norm(dim=1) / 2**0.5) < T64


def test_signs_of_singular_vectors_do_not_matter():
    model, adapter = adapted(ll.PiSSAConfig(r=4))
    x = toy.inputs(5, 24, dtype=torch.float64)
    before = model(x)
    flips = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    with torch.no_grad():
        for tensor in (adapter.A0, adapter.dA):
            tensor.mul_(flips[:, None])
        for tensor in (adapter.B0, adapter.dB):
            tensor.mul_(flips)
    assert error(model(x), before) < T64


def test_identity_does_not_depend_on_the_accuracy_of_the_svd():
    x = toy.inputs(5, 24)
    base = toy.one()(x)
    model, adapter = adapted(ll.PiSSAConfig(r=4), dtype=torch.float32, size=0)
    with torch.no_grad():
        adapter.A0.add_(toy.inputs(4, 24))
        adapter.B0.copy_(1e4 * toy.inputs(32, 4))
    assert torch.equal(model(x), base)


def test_fast_svd_agrees_with_the_exact_one_where_the_spectrum_falls():
    W = spectrum(96, 80, torch.arange(1.0, 81.0) ** -0.7)
    exact, fast = (started(ll.PiSSAConfig(r=8, svd=svd, dtype=torch.float64), W)[1] for svd in ("exact", "fast"))
    assert not torch.equal(fast.A0, exact.A0)
    assert error(fast.B0 @ fast.A0, exact.B0 @ exact.A0) < 1e-3


def test_fast_svd_captures_its_share_and_a_missed_one_is_reported_and_replaced():
    W = spectrum(96, 80, torch.arange(1.0, 81.0) ** -0.7)
    U, _ = svd.left_svd(W, 8, "fast", tol=1e-3)
    assert 1 - 1e-3 < (U.T @ W).square().sum() / torch.linalg.svdvals(W)[:8].square().sum() < 1 + 1e-12
    exact = started(ll.PiSSAConfig(r=8, svd="exact", dtype=torch.float64), W)[1]
    with pytest.warns(ll.LoraLiteWarning, match=r"fast SVD missed tol=1e-15"):
        strict = started(ll.PiSSAConfig(r=8, svd="fast", tol=1e-15, dtype=torch.float64), W)[1]
    assert torch.equal(strict.A0, exact.A0)


def test_auto_is_exact_for_small_layers_and_fast_for_low_ranks_of_large_ones():
    W = toy.inputs(32, 24)
    exact, auto = (started(ll.PiSSAConfig(r=4, svd=svd), W, torch.float32)[1] for svd in ("exact", "auto"))
    assert torch.equal(auto.A0, exact.A0)
    large = toy.inputs(2050, 2) @ toy.inputs(2, 2050, seed=2)
    with mock.patch.object(svd, "exact_left_svd", side_effect=AssertionError("the exact SVD was called")):
        _, adapter = started(ll.PiSSAConfig(r=2, svd="auto"), large, torch.float32)
    assert error(adapter.B0 @ adapter.A0, large) < 1e-4


@pytest.mark.parametrize("rank", [0, 2])
def test_directions_that_the_weight_lacks_start_finite_and_trainable(rank):
    W = spectrum(32, 24, torch.arange(24) < rank)
    layer, adapter = started(ll.PiSSAConfig(r=4, dtype=torch.float64), W)
    assert error(adapter.B0 @ adapter.A0, W) < T64
    layer(toy.inputs(5, 24, dtype=torch.float64)).sum().backward()
    assert adapter.dA.grad.isfinite().all()
    assert adapter.dA.grad.any()


def test_rank_and_recommended_options():
    _, adapter = adapted(ll.PiSSAConfig(r=4))
    assert adapter.claims.rank(adapter.cfg) == 8
    cfg = ll.PiSSAConfig()
    assert (cfg.r, cfg.s, cfg.svd, cfg.tol, cfg.lr) == (16, 1.0, "auto", 1e-3, 2e-5)


def test_bad_options_are_refused():
    with pytest.raises(ll.LoraLiteError, match=r"o_proj.*r=25 is larger than the layer allows"):
        adapted(ll.PiSSAConfig(r=25))
    with pytest.raises(ll.LoraLiteError, match=r"tol=0.0\) cannot be built. tol is above 0"):
        ll.PiSSAConfig(tol=0)
    with pytest.raises(ll.LoraLiteError, match=r'tol=0.01\) cannot be built.*read by svd="fast"'):
        ll.PiSSAConfig(svd="exact", tol=0.01)
    with pytest.raises(ll.LoraLiteError, match=r"svd='random'\) cannot be built. svd: one of 'exact', 'fast', 'auto'"):
        ll.PiSSAConfig(svd="random")


def peft_config(**fields):
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights="pissa", lora_dropout=0.0, **fields)


@pytest.mark.parametrize("fields", [{"lora_alpha": 4}, {"lora_alpha": 9, "use_rslora": True}])
def test_start_agrees_with_peft(fields):
    theirs = peft_layer(peft_config(**fields))
    cfg = ll.PiSSAConfig(r=4, alpha=fields["lora_alpha"], rslora=fields.get("use_rslora", False))
    model, ours = adapted(cfg, dtype=torch.float32, size=0)
    A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    assert error(ours.B0 @ ours.A0, B @ A) < 1e-6
    # single vectors carry the error of a float32 SVD over the gap to the next singular value; their product does not
    assert error(ours.A0.abs(), A.abs()) < 1e-4
    assert error(ours.B0.abs(), B.abs()) < 1e-4
    assert error(theirs.base_layer.weight, model.o_proj.weight - ours.s * ours.B0 @ ours.A0) < 1e-6


@pytest.mark.parametrize("fields", [{"lora_alpha": 4}, {"lora_alpha": 9, "use_rslora": True}])
def test_parity_with_peft_after_training(fields):
    def fill(ours, theirs):
        ours.dA.copy_(theirs.lora_A["default"].weight - ours.A0)
        ours.dB.copy_(theirs.lora_B["default"].weight - ours.B0)

    def pairs(ours, theirs):
        return [
            (ours.dA.grad, theirs.lora_A["default"].weight.grad),
            (ours.dB.grad, theirs.lora_B["default"].weight.grad),
        ]

    cfg = ll.PiSSAConfig(r=4, alpha=fields["lora_alpha"], rslora=fields.get("use_rslora", False))
    check_parity(cfg, peft_config(**fields), pairs, fill)


def test_peft_leaves_a_residual_in_the_base_and_we_leave_the_base():
    theirs = peft_layer(peft_config(lora_alpha=4))
    model, _ = adapted(ll.PiSSAConfig(r=4), dtype=torch.float32)
    pristine = toy.one().o_proj.weight
    ll.detach(model)
    assert torch.equal(model.o_proj.weight, pristine)
    assert error(theirs.base_layer.weight, pristine) > 0.01
