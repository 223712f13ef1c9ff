"""OLoRA against the full QR of W, the paper's formula in dense float64, and PEFT."""

from unittest import mock

import pytest
import torch
from torch import nn

import lora_lite as ll
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


def exact(**fields):
    return ll.OLoRAConfig(**{"r": 5, "dtype": torch.float64, **fields})


@pytest.mark.parametrize("fields", [{}, {"alpha": 8.0}, {"alpha": 8.0, "rslora": True}])
def test_output_and_gradients_equal_the_dense_form(fields):
    check_dense(ll.OLoRAConfig(r=4, **fields), dense)


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


def test_identity_does_not_depend_on_the_factors():
    x = toy.inputs(5, 24)
    base = toy.one()(x)
    model, adapter = adapted(ll.OLoRAConfig(r=4), dtype=torch.float32, size=0)
    with torch.no_grad():
        adapter.A0.add_(toy.inputs(4, 24))
        adapter.B0.copy_(1e4 * toy.inputs(32, 4))
    assert torch.equal(model(x), base)


def test_rank_and_recommended_options():
    _, adapter = adapted(ll.OLoRAConfig(r=4))
    assert adapter.claims.rank(adapter.cfg) == 8
    cfg = ll.OLoRAConfig()
    assert (cfg.r, cfg.s, cfg.lr) == (16, 0.5, 3e-4)


def test_bad_options_are_refused():
    with pytest.raises(ll.LoraLiteError, match=r"o_proj.*r=25 is larger than the layer allows"):
        adapted(ll.OLoRAConfig(r=25))
    with pytest.raises(ll.LoraLiteError, match=r"OLoRAConfig has no field 'svd'"):
        ll.OLoRAConfig(svd="exact")


FIELDS = [{"lora_alpha": 4}, {"lora_alpha": 9, "use_rslora": True}]


def both_configs(fields):
    peft = pytest.importorskip("peft")
    theirs = peft.LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights="olora", lora_dropout=0.0, **fields)
    return ll.OLoRAConfig(r=4, alpha=fields["lora_alpha"], rslora=fields.get("use_rslora", False)), theirs


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize(("d_in", "d_out"), [(24, 32), (32, 24)])
def test_start_agrees_with_peft(fields, d_in, d_out):
    cfg, config = both_configs(fields)
    theirs = peft_layer(config, d_in, d_out)
    model, ours = adapted(cfg, d_in, d_out, dtype=torch.float32, size=0)
    # the same signs, since both are Householder factorizations
    assert error(ours.A0, theirs.lora_A["default"].weight) < 1e-6
    assert error(ours.B0, theirs.lora_B["default"].weight) < 1e-6
    residual = toy.one(d_in, d_out).o_proj.weight - ours.s * ours.B0 @ ours.A0
    assert error(theirs.base_layer.weight, residual) < 1e-6
    assert torch.equal(model.o_proj.weight, toy.one(d_in, d_out).o_proj.weight)


@pytest.mark.parametrize("fields", FIELDS)
def test_parity_with_peft_after_training(fields):
    def fill(ours, theirs):
        ours.dA.copy_(theirs.lora_A["default"].weight - ours.A0)
        ours.dB.copy_(theirs.lora_B["default"].weight - ours.B0)

    def pairs(ours, theirs):
        return [
            (ours.dA.grad, theirs.lora_A["default"].weight.grad),
            (ours.dB.grad, theirs.lora_B["default"].weight.grad),
        ]

    check_parity(*both_configs(fields), pairs, fill)


def test_start_of_peft_is_the_base_to_rounding_and_ours_bit_for_bit():
    cfg, config = both_configs(FIELDS[0])
    x = toy.inputs(5, 24)
    base, theirs = toy.one()(x), peft_layer(config)(x)
    model, _ = adapted(cfg, dtype=torch.float32, size=0)
    assert torch.equal(model(x), base)
    assert not torch.equal(theirs, base)
    assert error(theirs, base) < 1e-5


def test_peft_leaves_a_residual_in_the_base_and_we_leave_the_base():
    cfg, config = both_configs(FIELDS[0])
    pristine = toy.one().o_proj.weight
    model, _ = adapted(cfg, dtype=torch.float32)
    ll.detach(model)
    assert torch.equal(model.o_proj.weight, pristine)
    assert error(peft_layer(config).base_layer.weight, pristine) > 0.01
