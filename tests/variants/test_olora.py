"""OLoRA's start against the full QR of W and PEFT's; the rest is in tests/families/test_twin_methods.py."""

from unittest import mock

import pytest
import torch

import lora_lite as ll
from lora_lite.testing import toy
from lora_lite.testing.checks import error
from lora_lite.testing.formula import T64, adapted
from tests.families.test_twin_methods import configs, started
from tests.oracles.layer import peft_layer


def exact(**fields):
    return ll.OLoRAConfig(**{"r": 5, "dtype": torch.float64, **fields})


@pytest.mark.parametrize(("o", "i"), [(32, 24), (24, 32), (24, 24)])
def test_start_is_the_leading_part_of_the_full_qr(o, i):
    W = toy.inputs(o, i, dtype=torch.float64)
    Q, R = torch.linalg.qr(W)
    _, adapter = started(exact(), W)
    assert error(adapter.B0, Q[:, :5]) < 1e-13
    assert error(adapter.A0, R[:5]) < 1e-13


def test_full_rank_start_is_the_whole_weight():
    W = toy.inputs(24, 32, dtype=torch.float64)
    _, adapter = started(exact(r=24), W)
    assert error(adapter.B0 @ adapter.A0, W) < T64


@pytest.mark.parametrize(("o", "i"), [(32, 24), (24, 32)])
def test_start_is_an_orthonormal_basis_and_a_triangle(o, i):
    for dtype, tolerance in ((torch.float64, T64), (torch.float32, 1e-6)):
        W = toy.inputs(o, i, dtype=dtype)
        _, adapter = started(exact(dtype=dtype), W, dtype)
        assert error(adapter.B0.T @ adapter.B0, torch.eye(5)) < tolerance
        assert error(adapter.B0 @ adapter.A0, adapter.B0 @ adapter.B0.T @ W) < tolerance
        assert error(adapter.A0[:, :5].tril(-1), torch.zeros(5, 5)) < 10 * tolerance
        assert adapter.A0[:, :5].diagonal().abs().min() > 0.1


def test_only_the_first_columns_are_factored():
    W = toy.inputs(32, 24, dtype=torch.float64)
    shapes = []
    original = torch.linalg.qr
    with mock.patch.object(torch.linalg, "qr", lambda M: shapes.append(tuple(M.shape)) or original(M)):
        _, adapter = started(exact(), W)
    assert shapes == [(32, 5)]
    other = torch.cat([W[:, :5], toy.inputs(32, 19, dtype=torch.float64, seed=7)], dim=1)
    assert torch.equal(started(exact(), other)[1].B0, adapter.B0)


def test_start_depends_on_the_order_of_the_input_channels():
    W = toy.inputs(32, 24, dtype=torch.float64)
    order = torch.arange(23, -1, -1)
    plain, turned = started(exact(), W)[1], started(exact(), W[:, order])[1]
    assert error((turned.B0 @ turned.A0)[:, order], plain.B0 @ plain.A0) > 0.1


@pytest.mark.parametrize("fields", [{"alpha": 1.0}, {"alpha": 50.0}, {"alpha": 50.0, "rslora": True}])
def test_scale_does_not_enter_the_factors(fields):
    W = toy.inputs(32, 24, dtype=torch.float64)
    plain, scaled = started(exact(), W)[1], started(exact(**fields), W)[1]
    assert scaled.s != plain.s
    assert torch.equal(scaled.A0, plain.A0)
    assert torch.equal(scaled.B0, plain.B0)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_rank_deficient_first_columns_start_finite_and_trainable(rank):
    W = toy.inputs(32, 24, dtype=torch.float64)
    W[:, :5] = W[:, :rank] @ toy.inputs(rank, 5, dtype=torch.float64, seed=8)
    layer, adapter = started(exact(), W)
    assert adapter.A0.isfinite().all()
    assert error(adapter.B0.T @ adapter.B0, torch.eye(5)) < T64
    layer(toy.inputs(5, 24, dtype=torch.float64)).sum().backward()
    for gradient in (adapter.dA.grad, adapter.dB.grad):
        assert gradient.isfinite().all()
        assert gradient.any()


def test_a_weight_of_zeros_starts_finite():
    _, adapter = started(exact(), torch.zeros(32, 24))
    assert adapter.B0.isfinite().all()
    assert not adapter.A0.any()


def test_start_of_peft_is_the_base_to_rounding_and_ours_bit_for_bit():
    cfg, config = configs("olora")
    x = toy.inputs(5, 24)
    base, theirs = toy.one()(x), peft_layer(config)(x)
    model, _ = adapted(cfg, dtype=torch.float32, size=0)
    assert torch.equal(model(x), base)
    assert not torch.equal(theirs, base)
    assert error(theirs, base) < 1e-5
