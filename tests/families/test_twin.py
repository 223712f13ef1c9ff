"""Twin itself, whatever fills A0 and B0: exactness at the start, equality with B A, precision in bfloat16, cost."""

import pytest
import torch

import lora_lite as ll
from benchmarks.cost.limit import flop_counter
from lora_lite.families.twin import Twin, TwinConfig
from lora_lite.testing import toy
from lora_lite.testing.checks import error
from lora_lite.testing.formula import T64

I, O, R = 24, 32, 4


def twin(d_in=I, d_out=O, dtype=torch.float64, buffers=None, moved=0.0, **fields):
    """A twin with random A0, B0 of unit output scale, its deviations `moved` times that scale."""
    adapter = Twin(d_in, d_out, TwinConfig(dtype=dtype, **{"r": R, **fields}), matrix_dtype=buffers or dtype)
    sizes = {"A": d_in**-0.5, "B": adapter.cfg.r**-0.5}
    with torch.no_grad():
        for seed, (name, tensor) in enumerate(adapter.state_dict(keep_vars=True).items()):
            scale = sizes[name.strip("d0")] * (1.0 if name.endswith("0") else moved)
            tensor.copy_(scale * toy.inputs(*tensor.shape, dtype=torch.float64, seed=30 + seed))
    return adapter


def correction(adapter, x):
    return adapter(x, x.new_zeros(*x.shape[:-1], adapter.d_out), None)


def naive(adapter, x):
    """B A x - B0 A0 x, every product in the dtype of x."""
    A0, B0, dA, dB = (t.detach().to(adapter.dA.dtype) for t in (adapter.A0, adapter.B0, adapter.dA, adapter.dB))
    A, B, A0, B0 = (t.to(x.dtype) for t in (A0 + dA, B0 + dB, A0, B0))
    return adapter.s * (x @ A.T @ B.T - x @ A0.T @ B0.T)


@pytest.mark.parametrize("buffers", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_start_is_the_base_bit_for_bit_whatever_the_frozen_factors(dtype, buffers):
    adapter = twin(dtype=torch.float32, buffers=buffers, alpha=100.0)
    x, y = toy.inputs(5, I, dtype=dtype), 1e-3 * toy.inputs(5, O, dtype=dtype, seed=2)
    for coeff in (1.0, -3.0):
        adapter.coeff = coeff
        assert torch.equal(adapter(x, y, None).to(dtype), y)


@pytest.mark.parametrize("fields", [{}, {"alpha": 10.0}, {"alpha": 3.0, "rslora": True}])
def test_output_and_gradients_equal_those_of_the_difference_of_two_products(fields):
    adapter = twin(moved=0.7, **fields)
    x, y, probe = (toy.inputs(5, n, dtype=torch.float64, seed=n) for n in (I, O, O + 1))
    probe = probe[:, :O]
    A = (adapter.A0 + adapter.dA).detach().requires_grad_()
    B = (adapter.B0 + adapter.dB).detach().requires_grad_()
    for coeff in (1.0, 0.5, -0.7, 2.0):
        adapter.coeff = coeff
        got = adapter(x, y, None)
        want = y + coeff * adapter.s * x @ (B @ A - adapter.B0 @ adapter.A0).T
        assert error(got, want) < T64
        ours = torch.autograd.grad((got * probe).sum(), (adapter.dA, adapter.dB))
        for a, e in zip(ours, torch.autograd.grad((want * probe).sum(), (A, B))):
            assert error(a, e) < T64


def test_gradients_pass_gradcheck():
    adapter = twin(6, 5, r=2, moved=0.5)
    x, y = toy.inputs(3, 6, dtype=torch.float64), toy.inputs(3, 5, dtype=torch.float64)

    def f(dA, dB):
        return torch.func.functional_call(adapter, {"dA": dA, "dB": dB}, (x, y, None))

    assert torch.autograd.gradcheck(f, (adapter.dA, adapter.dB))


def test_both_deviations_have_a_gradient_at_the_start():
    adapter = twin()
    (correction(adapter, toy.inputs(5, I, dtype=torch.float64)) * toy.inputs(5, O, dtype=torch.float64)).sum().backward()
    assert adapter.dA.grad.any()
    assert adapter.dB.grad.any()


@pytest.mark.parametrize(("moved", "naive_is_worse_than"), [(1e-4, 3.0), (1e-3, 0.5), (1e-2, 0.05), (1e-1, 0.006)])
def test_small_deviations_keep_their_digits_in_bfloat16(moved, naive_is_worse_than):
    adapter = twin(256, 256, torch.float32, r=16, moved=moved)
    x = toy.inputs(64, 256, dtype=torch.bfloat16)
    wide = x.double()
    A0, B0, dA, dB = (t.detach().double() for t in (adapter.A0, adapter.B0, adapter.dA, adapter.dB))
    want = adapter.s * wide @ ((B0 + dB) @ (A0 + dA) - B0 @ A0).T

    def relative(got):
        return float((got.detach().double() - want).norm() / want.norm())

    assert relative(correction(adapter, x)) < 5e-3
    assert relative(naive(adapter, x)) > naive_is_worse_than


def test_trained_bfloat16_layer_is_closer_than_with_the_residual_in_the_base():
    """The papers' form rounds W - s B0 A0 to bfloat16; here W keeps its own bits."""
    W = (toy.inputs(256, 256, seed=3) @ torch.diag(torch.arange(1.0, 257.0) ** -0.7)).bfloat16()
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    adapter = twin(256, 256, torch.float32, r=16, moved=0.003)
    with torch.no_grad():
        adapter.A0.copy_(S[:16].sqrt()[:, None] * Vh[:16])
        adapter.B0.copy_(U[:, :16] * S[:16].sqrt())
    x = toy.inputs(64, 256, dtype=torch.bfloat16)
    A0, B0 = adapter.A0.double(), adapter.B0.double()
    A, B = A0 + adapter.dA.detach().double(), B0 + adapter.dB.detach().double()
    want = x.double() @ (W.double() + B @ A - B0 @ A0).T

    def relative(got):
        return float((got.detach().double() - want).norm() / want.norm())

    ours = relative(adapter(x, x @ W.T, None))
    residual = (W.double() - B0 @ A0).bfloat16()
    theirs = relative(x @ residual.T + x @ A.bfloat16().T @ B.bfloat16().T)
    assert ours < 4e-3
    assert ours < theirs


def test_change_is_a_plain_low_rank_product_of_rank_2r():
    adapter = twin(moved=0.5, alpha=6.0)
    A = torch.cat([adapter.dA, adapter.A0])
    B = torch.cat([adapter.B0 + adapter.dB, adapter.dB], dim=1)
    change = correction(adapter, torch.eye(I, dtype=torch.float64)).T
    assert error(change, adapter.s * B @ A) < T64
    values = torch.linalg.svdvals(change)
    assert values[2 * R] < 1e-12 * values[0]
    assert values[2 * R - 1] > 1e-3 * values[0]
    assert Twin.claims.rank(adapter.cfg) == 2 * R


def test_deviations_at_zero_give_back_the_base_and_are_what_decays():
    specs = twin().specs()
    assert {k for k, s in specs.items() if s.decay} == {k for k, s in specs.items() if s.trainable} == {"dA", "dB"}
    adapter = twin(moved=0.5)
    x, y = toy.inputs(5, I, dtype=torch.float64), toy.inputs(5, O, dtype=torch.float64)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1, weight_decay=5.0)
    before = error(adapter(x, y, None), y)
    for parameter in adapter.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(60):
        optimizer.step()
    assert before > 0.1
    assert error(adapter(x, y, None), y) < T64


def test_backward_keeps_one_product_of_rank_r_beside_its_input():
    adapter, x = twin(dtype=torch.float32), toy.inputs(7, I).requires_grad_()
    known = {t.untyped_storage().data_ptr() for t in (x, *adapter.parameters(), *adapter.buffers())}
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // 4
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        adapter(x, toy.inputs(7, O), None)
    assert sum(size for pointer, size in kept.items() if pointer not in known) == 7 * R


def test_cost_is_one_pair_of_products_of_rank_2r():
    adapter = twin(dtype=torch.float32)
    with flop_counter() as counted:
        correction(adapter, toy.inputs(7, I))
    assert counted.get_total_flops() == 2 * 7 * 2 * R * (I + O)


def test_buffers_follow_the_matrix_dtype_and_deviations_the_config():
    adapter = twin(dtype=torch.float32, buffers=torch.bfloat16)
    assert {k: t.dtype for k, t in adapter.named_buffers()} == {"A0": torch.bfloat16, "B0": torch.bfloat16}
    assert {t.dtype for t in adapter.parameters()} == {torch.float32}


def test_rank_above_the_smaller_side_is_refused():
    with pytest.raises(ll.LoraLiteError, match=r"r=25 is larger than the layer allows.*= 24"):
        Twin(I, O, TwinConfig(r=25))
    Twin(I, O, TwinConfig(r=24))
