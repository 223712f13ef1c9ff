"""HRA against an explicit product of Householder matrices in float64 and against PEFT."""

import pytest
import torch

import lora_lite as ll
from lora_lite.mathematics.maps import low_rank
from lora_lite.mathematics.rotations import reflections
from lora_lite.testing import toy
from lora_lite.testing.checks import error
from lora_lite.testing.formula import T64, adapted, check_dense
from tests.oracles.layer import input_map, peft_layer

SIZES = (0.3, 3.0, 100.0)  # of the step away from the start, in units of the start: near it, and random rows


def chain(V):
    eye = torch.eye(V.shape[1], dtype=V.dtype)
    Q = eye
    for v in V:
        Q = Q @ (eye - 2 * torch.outer(v, v) / (v @ v))
    return Q


def dense(a, W, b, c):
    eye = torch.eye(W.shape[1], dtype=W.dtype)
    return W @ (eye + c * (chain(a.V) - eye)), b


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("r", [2, 8])
def test_output_and_gradients_equal_the_product_of_reflections(r, size):
    check_dense(ll.HRAConfig(r=r), dense, size=size)


def test_more_reflections_than_channels_are_exact_too():
    check_dense(ll.HRAConfig(r=16), dense, d_in=8, size=3.0)


def test_the_order_of_the_reflections_matters():
    _, adapter = adapted(ll.HRAConfig(r=8), size=3.0)
    assert error(input_map(adapter).T, chain(adapter.V)) < 1e-12
    assert error(input_map(adapter).T, chain(adapter.V.flip(0))) > 0.1


def test_lengths_and_signs_of_the_rows_have_no_influence():
    model, adapter = adapted(ll.HRAConfig(r=4), size=3.0)
    x = toy.inputs(5, 24, dtype=torch.float64)
    before = model(x)
    with torch.no_grad():
        adapter.V.mul_(torch.tensor([[2.0], [-0.1], [-1.0], [30.0]]))
    assert error(model(x), before) < T64


def test_input_never_grows_for_coefficients_from_0_to_1():
    _, adapter = adapted(ll.HRAConfig(r=8), size=3.0)
    for coeff in (0.1, 0.5, 0.9, 1.0):
        assert torch.linalg.matrix_norm(input_map(adapter, coeff), ord=2) <= 1 + 1e-12
    assert torch.linalg.matrix_norm(input_map(adapter, -1.0), ord=2) > 1.1


def test_the_layer_as_a_whole_is_no_contraction():
    model, adapter = adapted(ll.HRAConfig(r=8), bias=False, size=3.0)
    x = torch.linalg.svd(model.o_proj.weight)[2][-1]  # the input that W shrinks most, turned to where W does not
    assert (model(x)).norm() > 1.5 * (model.o_proj.weight @ x).norm()
    assert not adapter.claims.contraction


def test_coefficient_moves_in_a_straight_line_and_is_no_power():
    model, adapter = adapted(ll.HRAConfig(r=4), size=3.0)
    x = toy.inputs(5, 24, dtype=torch.float64)
    outputs = []
    for coeff in (0.0, 0.25, 1.0):
        with ll.scale(model, coeff):
            outputs.append(model(x))
    assert error(outputs[1], 0.75 * outputs[0] + 0.25 * outputs[2]) < T64
    assert error(input_map(adapter, -1.0) @ input_map(adapter), torch.eye(24)) > 0.1


def test_start_is_equal_pairs_within_the_published_bound():
    _, adapter = adapted(ll.HRAConfig(r=8), d_in=400, size=0)
    assert torch.equal(adapter.V[0::2], adapter.V[1::2])
    assert not torch.equal(adapter.V[0], adapter.V[2])
    assert 0.95 * 0.5 < adapter.V.abs().max() <= 0.5


@pytest.mark.parametrize("r", [2, 4, 8, 16, 32])
def test_start_is_exact_at_every_rank_and_seed(r):
    x = toy.inputs(5, 64)
    for seed in range(5):
        _, adapter = adapted(ll.HRAConfig(r=r, seed=seed), d_in=64, dtype=torch.float32, size=0)
        assert torch.equal(adapter.forward_input(x), x)


def test_identical_rows_give_finite_values_and_gradients():
    model, adapter = adapted(ll.HRAConfig(r=8), dtype=torch.float32)
    with torch.no_grad():
        adapter.V.copy_(adapter.V[:1].expand(8, -1))
    x = toy.inputs(5, 24)
    model(x).square().sum().backward()
    assert error(adapter.forward_input(x), x) < 1e-6
    assert adapter.V.grad.isfinite().all()


def test_nearly_equal_pairs_keep_their_digits_in_bfloat16():
    _, adapter = adapted(ll.HRAConfig(r=8), d_in=512, dtype=torch.float32, size=0)
    with torch.no_grad():
        adapter.V[1::2] += 1e-3 * adapter.V.norm(dim=1).mean() / 512**0.5 * toy.inputs(4, 512)
    x = toy.inputs(16, 512, dtype=torch.bfloat16)
    want = x.double() @ (chain(adapter.V.double()) - torch.eye(512)).T
    P, M = reflections(adapter.V)
    correction = -low_rank(x, M @ P, P.T)
    assert correction.dtype is torch.bfloat16
    assert (correction.double() - want).norm() < 0.02 * want.norm()
    U = adapter.V / adapter.V.norm(dim=1, keepdim=True)
    T = torch.linalg.inv((U @ U.T).triu(1) + torch.eye(8) / 2)  # the textbook form, in which pairs cancel
    assert (-low_rank(x, T @ U, U.T).double() - want).norm() > 0.5 * want.norm()


def test_rows_of_a_pair_start_with_opposite_gradients():
    model, adapter = adapted(ll.HRAConfig(r=4), size=0)
    (model(toy.inputs(5, 24, dtype=torch.float64)) * toy.inputs(5, 32, dtype=torch.float64, seed=4)).sum().backward()
    assert adapter.V.grad.abs().max() > 0.1
    assert error(adapter.V.grad[0::2], -adapter.V.grad[1::2]) < T64


def test_reflections_do_not_decay():
    _, adapter = adapted(ll.HRAConfig(r=4))
    assert not adapter.specs()["V"].decay


def test_penalty_is_the_distance_of_the_unit_rows_from_orthogonal():
    _, adapter = adapted(ll.HRAConfig(r=4), size=3.0)
    rows = [v / v.norm() for v in adapter.V]
    want = sum((u @ v) ** 2 for i, u in enumerate(rows) for j, v in enumerate(rows) if i != j)
    assert error(adapter.penalty(), want) < T64
    with torch.no_grad():
        adapter.V.copy_(3 * torch.linalg.qr(adapter.V.T).Q.T)
    assert adapter.penalty() < 1e-12


def test_descent_on_the_penalty_makes_the_rows_orthogonal():
    _, adapter = adapted(ll.HRAConfig(r=4), size=1.0)
    before = adapter.penalty().item()
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        adapter.penalty().backward()
        optimizer.step()
    assert adapter.penalty() < 1e-3 * before


def test_penalty_alone_does_not_split_equal_pairs():
    _, adapter = adapted(ll.HRAConfig(r=2), size=0)
    adapter.penalty().backward()
    assert error(adapter.penalty(), torch.tensor(2.0)) < T64
    assert error(adapter.V.grad, torch.zeros(2, 24)) < T64


def test_gradient_at_the_paired_start_equals_that_of_peft():
    peft = pytest.importorskip("peft")
    theirs = peft_layer(peft.HRAConfig(r=8, target_modules=["o_proj"], init_weights=True))
    model, ours = adapted(ll.HRAConfig(r=8), dtype=torch.float32, size=0)
    with torch.no_grad():
        ours.V.copy_(theirs.hra_u["default"].T)
    assert torch.equal(ours.V[0::2], ours.V[1::2])
    assert ours.V.abs().max() <= 0.5  # sqrt(2 / 8), the bound of our start
    x, probe = toy.inputs(5, 24), toy.inputs(5, 32, seed=4)
    for layer in (model, theirs):
        (layer(x) * probe).sum().backward()
    assert error(ours.V.grad, theirs.hra_u["default"].grad.T) < 1e-5
