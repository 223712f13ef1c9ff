"""DoRA against the paper's formula in dense float64, with its detached norm, and against PEFT."""

import pytest
import torch

import lora_lite as ll
from benchmarks.cost.limit import flop_counter
from lora_lite.testing import checks, toy
from lora_lite.testing.checks import error
from lora_lite.testing.formula import T64, adapted, check_dense
from tests.oracles.layer import check_ignores_bias

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def dense(a, W, b, c):
    V = W + a.s * a.B @ a.A
    return W + c * ((a.m / V.detach().norm(dim=1))[:, None] * V - W), b


def gradients(loss, adapter):
    return torch.autograd.grad(loss, (adapter.A, adapter.B, adapter.m), retain_graph=True)


@pytest.mark.parametrize("check", checks("dora", ll.DoRAConfig(r=4, rslora=True)), ids=str)
def test_rank_stabilised_scale_is_lawful(check):
    check()


@pytest.mark.parametrize("fields", [{}, {"alpha": 3.0}, {"alpha": 3.0, "rslora": True}])
def test_output_and_gradients_equal_the_dense_form(fields):
    check_dense(ll.DoRAConfig(r=4, **fields), dense)


@pytest.mark.parametrize("base_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_start_is_the_base_bit_for_bit(base_dtype, dtype, bias):
    model = toy.one(24, 32, bias, base_dtype)
    x = toy.inputs(5, 24, dtype=base_dtype)
    before = model(x)
    adapter = ll.attach(model, ll.DoRAConfig(r=4, dtype=dtype)).layers["o_proj"]
    assert adapter.A.any()
    assert torch.equal(adapter.m, adapter.n0)
    assert torch.equal(model(x), before)


def test_magnitudes_start_at_the_row_norms_of_the_weight():
    model, adapter = adapted(ll.DoRAConfig(r=4), size=0)
    assert error(adapter.m, model.o_proj.weight.norm(dim=1)) < T64
    assert not adapter.B.any()
    _, wide = adapted(ll.DoRAConfig(r=8), d_in=400, size=0)
    assert 0.9 / 20 < wide.A.abs().max() <= 1 / 20


def test_rows_of_the_adapted_weight_are_as_long_as_the_magnitudes():
    for size in (0.3, 2.0):
        model, adapter = adapted(ll.DoRAConfig(r=4), size=size)
        W = model.o_proj.weight + ll.delta_weight(model, "o_proj").double()
        assert error(W.norm(dim=1), adapter.m.abs()) < 1e-6
        assert error(W.norm(dim=0), adapter.m.abs()[:24]) > 0.1


def test_negative_magnitude_turns_a_row_round():
    model, adapter = adapted(ll.DoRAConfig(r=4))
    before = model.o_proj.weight + ll.delta_weight(model, "o_proj")
    with torch.no_grad():
        adapter.m[3].neg_()
    after = model.o_proj.weight + ll.delta_weight(model, "o_proj")
    assert error(after[3], -before[3]) < 1e-6
    assert error(after[4], before[4]) < 1e-6


def test_zero_input_returns_the_bias_itself():
    model, _ = adapted(ll.DoRAConfig(r=4), size=1.0)
    assert torch.equal(model(torch.zeros(2, 24, dtype=torch.float64)), model.o_proj.bias.expand(2, -1))


def test_change_does_not_depend_on_the_bias():
    check_ignores_bias(ll.DoRAConfig(r=4))


def test_norm_is_a_constant_in_the_backward_pass():
    model, adapter = adapted(ll.DoRAConfig(r=4))
    x, probe = (toy.inputs(5, n, dtype=torch.float64, seed=n) for n in (24, 32))
    W, b = model.o_proj.weight, model.o_proj.bias
    V = W + adapter.s * adapter.B @ adapter.A
    ours = gradients((model(x) * probe).sum(), adapter)
    for detached in (True, False):
        n = (V.detach() if detached else V).norm(dim=1)
        theirs = gradients(((x @ ((adapter.m / n)[:, None] * V).T + b) * probe).sum(), adapter)
        differences = [error(a, e) for a, e in zip(ours, theirs)]
        if detached:
            assert max(differences) < T64
        else:
            assert min(differences[:2]) > 1e-2
            assert differences[2] < T64


def test_coefficient_interpolates_linearly():
    model, _ = adapted(ll.DoRAConfig(r=4))
    x = toy.inputs(5, 24, dtype=torch.float64)
    outputs = {}
    for coeff in (0.0, 1.0, -1.0, 0.3):
        with ll.scale(model, coeff):
            outputs[coeff] = model(x)
    change = outputs[1.0] - outputs[0.0]
    assert error(outputs[0.3], outputs[0.0] + 0.3 * change) < T64
    assert error(outputs[-1.0], outputs[0.0] - change) < T64


def test_factored_norm_survives_cancellation_of_the_leading_directions():
    model, adapter = adapted(ll.DoRAConfig(r=6, alpha=6.0), dtype=torch.float32, size=0)
    W = model.o_proj.weight.detach().double()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    with torch.no_grad():
        adapter.A.copy_(Vh[:6])
        adapter.B.copy_(-U[:, :6] * S[:6])
    V = W + adapter.B.double() @ adapter.A.double()
    assert V.norm() < 0.8 * W.norm()
    want = (adapter.m.double() / V.norm(dim=1))[:, None] * V
    assert error(W + ll.delta_weight(model, "o_proj").double(), want) < 2e-6


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1), (torch.bfloat16, 24)])
def test_row_cancelled_to_rounding_noise_stays_bounded(dtype, most):
    """The norm of such a row is noise in any arithmetic; it must not become an amplification without limit.

    most: rounding of the row's output over the least norm that is allowed, 2^-7 / sqrt(eps of float32) for bfloat16.
    """
    model, adapter = adapted(ll.DoRAConfig(r=2, alpha=2.0), dtype=torch.float32, size=0)
    with torch.no_grad():
        adapter.A[0].copy_(model.o_proj.weight[5])
        adapter.B[5, 0] = -1.0
    x = toy.inputs(64, 24, dtype=dtype)
    model.to(dtype)
    adapter.float()
    with torch.no_grad():
        y = model(x)
    longest = (x.float().norm(dim=-1).max() * adapter.m.max()).detach()
    assert y.isfinite().all()
    assert (y - model.o_proj.bias)[:, 5].abs().max() < most * longest


def test_row_of_zeros_stays_zero_at_the_start_and_finite_after():
    model = toy.one(24, 32, True)
    with torch.no_grad():
        model.o_proj.weight[3] = 0
    x = toy.inputs(5, 24)
    before = model(x)
    handle = ll.attach(model, ll.DoRAConfig(r=4))
    assert torch.equal(model(x), before)
    model(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in handle.parameters())
    toy.perturb(handle)
    assert model(x).isfinite().all()


def test_bfloat16_layer_is_as_close_to_the_dense_form_as_its_dtype_allows():
    model, adapter = adapted(ll.DoRAConfig(r=4), d_in=256, d_out=256, dtype=torch.float32)
    model.o_proj.weight.data = model.o_proj.weight.bfloat16()
    model.o_proj.bias.data = model.o_proj.bias.bfloat16()
    x = toy.inputs(64, 256, dtype=torch.bfloat16)
    W, b = dense(adapter, model.o_proj.weight.float(), model.o_proj.bias.float(), 1.0)
    want = x.double() @ W.double().T + b.double()
    with torch.no_grad():
        got = model(x)
    assert got.dtype is torch.bfloat16
    assert (got.double() - want).norm() / want.norm() < 6e-3


def test_norm_under_autocast_stays_within_the_rounding_of_bfloat16():
    model, adapter = adapted(ll.DoRAConfig(r=16, alpha=16.0), d_in=256, d_out=256, dtype=torch.float32, bias=False)
    with torch.no_grad():
        adapter.B.copy_(0.25 * toy.inputs(256, 16))
        V = model.o_proj.weight + adapter.B @ adapter.A
        assert V.norm() > 1.1 * model.o_proj.weight.norm()
        with torch.autocast("cpu", torch.bfloat16):
            columns = model(torch.eye(256)).float()
    assert error(columns.norm(dim=0) / adapter.m, torch.ones(256)) < 2e-3


def test_decay_spares_the_magnitudes():
    _, adapter = adapted(ll.DoRAConfig(r=4))
    assert {k for k, s in adapter.specs().items() if s.decay} == {"A", "B"}


def test_frozen_norms_are_kept_in_the_adapter_dtype():
    model = toy.one().bfloat16()
    adapter = ll.attach(model, ll.DoRAConfig(r=4)).layers["o_proj"]
    assert adapter.n0.dtype is torch.float32
    assert error(adapter.n0, model.o_proj.weight.float().norm(dim=1)) < 1e-6


def test_recommended_options():
    cfg = ll.DoRAConfig()
    assert (cfg.r, cfg.s, cfg.lr) == (16, 2.0, 1e-4)
    assert ll.DoRAConfig(r=16, rslora=True).s == 8.0


def test_cost_of_the_norm_does_not_grow_with_tokens():
    model, _ = adapted(ll.DoRAConfig(r=4), dtype=torch.float32)
    counts = []
    for tokens in (10, 20):
        with flop_counter() as counted:
            model(toy.inputs(tokens, 24))
        counts.append(counted.get_total_flops() // 2)
    per_token = 24 * 32 + 4 * (24 + 32)
    assert counts[1] - counts[0] == 10 * per_token
    assert counts[0] - 10 * per_token == 4 * 24 * 32 + 4 * 4 * (24 + 32)


def test_misspelt_option_is_refused():
    with pytest.raises(ll.LoraLiteError, match=r"DoRAConfig has no field 'aplha'. Closest name: alpha"):
        ll.DoRAConfig(aplha=8)
