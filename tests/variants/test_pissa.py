"""PiSSA's start against the SVD of W; the formula and PEFT are in tests/families/test_twin_methods.py."""

from unittest import mock

import pytest
import torch

import lora_lite as ll
from lora_lite.mathematics import spectrum as svd
from lora_lite.testing import toy
from lora_lite.testing.checks import error
from lora_lite.testing.formula import T64, adapted
from tests.families.test_twin_methods import started


def spectrum(o, i, values, dtype=torch.float64):
    """A random o x i matrix with these singular values."""
    U, V = (torch.linalg.qr(toy.inputs(n, len(values), dtype=dtype, seed=n)).Q for n in (o, i))
    return U @ torch.diag(values.to(dtype)) @ V.T


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
