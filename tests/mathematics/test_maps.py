"""Shared linear algebra against explicit dense products in float64, at random values."""

import math

import pytest
import torch

import lora_lite as ll
from lora_lite.mathematics import maps, rotations
from lora_lite.testing import toy
from lora_lite.testing.checks import error

T64 = 1e-12


def random(*shape, seed=1, dtype=torch.float64):
    return toy.inputs(*shape, seed=seed, dtype=dtype)


def skew_by_hand(q, b):
    """Row by row above the diagonal, from the convention alone."""
    X = torch.zeros(len(q), b, b, dtype=q.dtype)
    for block in range(len(q)):
        numbers = iter(q[block])
        for row in range(b):
            for column in range(row + 1, b):
                X[block, row, column] = next(numbers)
                X[block, column, row] = -X[block, row, column]
    return X


def householder_product(V):
    eye = torch.eye(V.shape[1], dtype=torch.float64)
    Q = eye
    for v in V.double():
        Q = Q @ (eye - 2 * torch.outer(v, v) / (v @ v))
    return Q


def split_pairs(r, i, split, dtype=torch.float64):
    """Adjacent rows that differ by `split` of their size."""
    V = random(r // 2, i).repeat_interleave(2, dim=0)
    V[1::2] += split * random(r // 2, i, seed=2)
    return V.to(dtype)


def angles(N):
    """Largest eigen-angle of I + N."""
    return torch.linalg.eigvals(N.double() + torch.eye(N.shape[-1])).angle().abs().max()


# --- products ---------------------------------------------------------------------------------------------------------


def chained(turn, matrices):
    """x and the matrices of a chain that fits, and the chain as plain products."""
    x, Ms, last, other = random(2, 5, 6), [], 6, 5
    for k, width in enumerate((3, 4, 7)[:matrices]):
        if k == turn:
            last, other = other, last
        Ms.append(random(width, last, seed=k + 2))
        last = width

    def plain(x, *Ms):
        for k, M in enumerate(Ms):
            x = (x.mT if k == turn else x) @ M.T
        return x

    return x, Ms, plain


@pytest.mark.parametrize("matrices", [1, 2, 3])
@pytest.mark.parametrize("turn", [-1, 0, 1, 2])
def test_chain_is_its_products_in_values_and_in_two_orders_of_gradients(turn, matrices):
    x, Ms, plain = chained(turn, matrices)
    assert error(maps.chain(x, *Ms, turn=turn), plain(x, *Ms)) < T64
    inputs = [tensor.requires_grad_() for tensor in (x, *Ms)]
    found = []
    for make in (lambda x, *Ms: maps.chain(x, *Ms, turn=turn), plain):
        first = torch.autograd.grad(make(*inputs).square().sum(), inputs, create_graph=True)
        found.append((*first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs)))
    for ours, wanted in zip(*found, strict=True):
        assert error(ours, wanted) < T64


def test_chain_of_one_token_without_other_axes_has_gradients():
    x, A, B = random(6).requires_grad_(), random(3, 6, seed=2).requires_grad_(), random(4, 3, seed=3).requires_grad_()
    found = torch.autograd.grad(maps.chain(x, A, B).square().sum(), (x, A, B))
    for ours, wanted in zip(found, torch.autograd.grad((B @ A @ x).square().sum(), (x, A, B)), strict=True):
        assert error(ours, wanted) < T64


def test_chain_keeps_its_input_and_its_matrices_alone():
    x, Ms, _ = chained(1, 3)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        maps.chain(x, *(M.requires_grad_() for M in Ms), turn=1)
    assert set(kept) == {t.data_ptr() for t in (x, *Ms)}


@pytest.mark.parametrize("autocast", [False, True])
def test_chain_of_bfloat16_activations_has_float32_gradients_of_float32_matrices(autocast):
    x, Ms, plain = chained(1, 3)
    x, Ms = x.to(torch.float32 if autocast else torch.bfloat16), [M.float().requires_grad_() for M in Ms]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = maps.chain(x, *Ms, turn=1)
    assert y.dtype is torch.bfloat16
    y.float().square().sum().backward()
    wanted = [M.detach().double().requires_grad_() for M in Ms]
    plain(x.double(), *wanted).square().sum().backward()
    for ours, exact in zip(Ms, wanted, strict=True):
        assert ours.grad.dtype is torch.float32
        assert float((ours.grad - exact.grad).norm() / exact.grad.norm()) < 2e-2


def test_chain_goes_through_vmap():
    x, Ms, plain = chained(1, 3)
    batch = random(4, *x.shape, seed=8)
    mapped = torch.func.vmap(torch.func.grad(lambda x: maps.chain(x, *Ms, turn=1).square().sum()))(batch)
    assert error(mapped, torch.func.vmap(torch.func.grad(lambda x: plain(x, *Ms).square().sum()))(batch)) < T64


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_unit_has_the_asked_length_but_for_what_is_shorter_than_the_floor(dim, dtype):
    V = random(3, 5, dtype=dtype)
    V.select(1 - dim, 0).mul_(1e-3)
    lengths = V.double().norm(dim=dim, keepdim=True)
    U = maps.unit(V, dim, 0.1, 2.5)
    assert U.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert error(U, 2.5 * V.double() / lengths.clamp(min=0.1)) < (T64 if dtype is torch.float64 else 1e-6)
    assert int((lengths < 0.1).sum()) == 1


@pytest.mark.parametrize("scale", [0.3, random(4, 1, 1, seed=9)])
def test_low_rank_is_the_scaled_dense_product(scale):
    x, A, B = random(4, 5, 12), random(3, 12, seed=2), random(7, 3, seed=3)
    assert error(maps.low_rank(x, A, B, scale), scale * (x @ (B @ A).T)) < T64


def test_products_run_in_the_dtype_of_the_activations():
    x, A, B = random(4, 12, dtype=torch.bfloat16), random(3, 12), random(7, 3, seed=3)
    got = maps.low_rank(x, A, B, 0.5)
    assert got.dtype is torch.bfloat16
    assert error(got, 0.5 * x.double() @ (B @ A).T) < 0.02


@pytest.mark.parametrize("scale", [0.3, random(4, 1, 1, seed=9), random(3, seed=9)])
def test_sum_inside_the_product_is_the_sum_and_so_are_its_gradients(scale):
    y, x, A, B = (t.requires_grad_() for t in (random(4, 5, 7), random(4, 5, 12), random(3, 12, seed=2), random(7, 3, seed=3)))
    got, want = maps.add_low_rank(y, x, A, B, scale), y + (x @ A.T * scale) @ B.T
    assert error(got, want) < T64
    for a, e in zip(*(torch.autograd.grad(z.sin().sum(), (y, x, A, B)) for z in (got, want))):
        assert error(a, e) < T64
    assert error(maps.add_lin(y[0, 0], x[0, 0], B @ A, 2.0), y[0, 0] + 2 * B @ A @ x[0, 0]) < T64
    assert maps.add_lin(y[:0], x[:0], B @ A).shape == (0, 5, 7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 3, 64, 515])
def test_sum_inside_a_product_of_zeros_keeps_every_bit(tokens, dtype):
    y, z = 1e3 * random(tokens, 40, dtype=dtype), random(tokens, 6, dtype=dtype)
    assert torch.equal(maps.add_lin(y, z, torch.zeros(40, 6), -0.7), y)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float32])
def test_sum_inside_the_product_never_rounds_what_it_adds_to(low):
    y, z, M = random(8, 40, dtype=torch.float32), random(8, 6, dtype=low), torch.zeros(40, 6)
    with torch.autocast("cpu", torch.bfloat16, enabled=low is torch.float32):
        assert torch.equal(maps.add_lin(y, z, M), y)


@pytest.mark.parametrize("bias", [None, random(7, seed=3)])
def test_stretch_adds_a_part_of_what_is_not_bias(bias):
    y, g = random(4, 5, 7), random(7, seed=2)
    assert error(maps.stretched(y, g, bias), y + g * (y - (0 if bias is None else bias))) < T64
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert torch.equal(maps.stretched(y.to(dtype), torch.zeros(7, dtype=dtype), bias).to(dtype), y.to(dtype))


def test_small_stretch_keeps_its_digits_beside_the_one():
    """2^-10 beside 1 has no digit in bfloat16, and 1e-9 none in float32."""
    y = random(64, 7)
    got = maps.stretched(y.bfloat16(), torch.full((7,), 2.0**-10, dtype=torch.bfloat16)).double()
    assert error(got, y.bfloat16().double() * (1 + 2.0**-10)) < 1e-6
    assert error((maps.stretched(y, torch.full((7,), 1e-9)) - y) * 1e9, y) < 1e-5


def test_without_bias():
    y, bias = random(5, 7), random(7, seed=2)
    assert torch.equal(maps.without_bias(y, bias), y - bias)
    assert maps.without_bias(y, None) is y


# --- one map per coefficient ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_is_finite_finds_one_bad_number_and_is_not_misled_by_a_sum_that_overflows(dtype):
    most = torch.finfo(dtype).max
    for last, wanted in ((most, True), (torch.nan, False), (torch.inf, False), (-torch.inf, False)):
        assert maps.is_finite(torch.tensor([most, most, 0.0, last], dtype=dtype)) is wanted
    assert not maps.is_finite(torch.tensor([torch.inf, -torch.inf], dtype=dtype))
    assert maps.is_finite(torch.zeros(0, dtype=dtype))


def test_per_value_hands_a_float_through():
    z = random(3, 4)
    assert torch.equal(maps.per_value(0.5, z, lambda c, z: c * c * z), 0.25 * z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 1, 1), (6, 2, 1)])
def test_per_value_gives_each_sample_its_own(shape, dtype):
    coeff = torch.tensor([0.0, 0.5, -0.7, 0.5, 0.1, 2.0])[:, None, None].expand(shape).to(dtype)
    z = random(6, 2, 4)
    calls = []

    def change(c, z):
        calls.append(c)
        return c * c * z

    assert error(maps.per_value(coeff, z, change), coeff.double() ** 2 * z) < T64
    assert sorted(calls) == sorted(set(coeff[coeff != 0].tolist()))


def test_known_values_spare_the_search_and_change_nothing():
    coeff, z = torch.tensor([0.0, 0.5, -0.7])[:, None], random(3, 4)
    values = maps.distinct(coeff)
    assert values is not None
    assert sorted(values.tolist()) == [pytest.approx(-0.7), 0.5]
    found = [maps.per_value(coeff, z, lambda c, z: c * c * z, values=given) for given in (None, values, values[:0])]
    assert torch.equal(found[0], found[1])
    assert not found[2].any()


def test_per_value_is_exactly_zero_where_the_coefficient_is():
    z = torch.full((2, 3), 1e30)
    got = maps.per_value(torch.tensor([[0.0], [1.0]]), z, lambda c, z: z * torch.inf)
    assert not got[0].any()
    assert got[1].isinf().all()


def test_per_value_carries_gradients_of_z_and_parameters():
    z, q = random(3, 8).requires_grad_(), random(2, 6, seed=2).requires_grad_()
    coeff = torch.tensor([[0.0], [0.5], [-1.0]])

    def turned(z, q):
        return maps.per_value(
            coeff, z, lambda c, z: rotations.block_product(z, rotations.cayley_shift(c * rotations.skew(q, 4)))
        )

    assert torch.autograd.gradcheck(turned, (z, q))


def test_per_value_refuses_many_values_and_trained_ones():
    z = random(17, 4)
    with pytest.raises(ll.LoraLiteError, match="17 distinct values"):
        maps.per_value(torch.arange(17.0)[:, None], z, lambda c, z: z)
    with pytest.raises(ll.LoraLiteError, match="requires a gradient"):
        maps.per_value(torch.ones(17, 1, requires_grad=True), z, lambda c, z: z)


# --- rotations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("b", [1, 2, 3, 8])
def test_skew_puts_the_numbers_above_the_diagonal_row_by_row(b):
    q = random(3, b * (b - 1) // 2)
    X = rotations.skew(q, b)
    assert torch.equal(X, skew_by_hand(q, b))
    assert torch.equal(X, -X.mT)
    if b > 1:
        assert torch.autograd.gradcheck(lambda q: rotations.skew(q, b), q.requires_grad_())


@pytest.mark.parametrize("size", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("b", [2, 8, 32])
def test_cayley_is_the_rotation_of_the_definition(b, size):
    X = size * skew_by_hand(random(3, b * (b - 1) // 2), b)
    eye = torch.eye(b, dtype=torch.float64)
    N = rotations.cayley_shift(X)
    R = eye + N
    assert error(R, torch.inverse(eye - X) @ (eye + X)) < T64
    assert error(R, (eye + X) @ torch.inverse(eye - X)) < T64
    assert error(R @ R.mT, eye.expand(3, b, b)) < T64
    assert error(torch.linalg.det(R), torch.ones(3)) < T64
    assert error(rotations.cayley_shift(-X), N.mT) < T64
    assert abs(angles(N) - 2 * torch.atan(torch.linalg.matrix_norm(X, ord=2).max())) < 1e-9


def test_cayley_of_zero_is_exactly_zero_and_bfloat16_is_solved_in_float32():
    assert not rotations.cayley_shift(torch.zeros(2, 4, 4)).any()
    assert rotations.cayley_shift(torch.zeros(2, 4, 4, dtype=torch.bfloat16)).dtype is torch.float32


def test_small_rotations_keep_their_digits():
    q = 1e-5 * random(4, 28)
    want = rotations.cayley_shift(rotations.skew(q, 8))
    eye = torch.eye(8)
    X = rotations.skew(q.float(), 8)
    assert (rotations.cayley_shift(X).double() - want).norm() < 1e-6 * want.norm()
    assert ((torch.linalg.solve(eye - X, eye + X) - eye).double() - want).norm() > 1e-5 * want.norm()  # R, then R - I
    z = random(6, 32, dtype=torch.bfloat16)
    got = rotations.block_product(z, rotations.cayley_shift(X)).double()
    exact = rotations.block_product(z.double(), want)
    assert (got - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("size", [0.0, 1.0])
def test_cayley_gradients(size):
    q = (size * random(2, 6)).requires_grad_()
    assert torch.autograd.gradcheck(lambda q: rotations.cayley_shift(rotations.skew(q, 4)), q)


def test_second_gradients_of_rotations_and_maps_over_batches_of_them():
    X, z = skew_by_hand(random(2, 6), 4).requires_grad_(), random(5, 8).requires_grad_()

    def turned(X, z):
        return rotations.block_turn(z, rotations.cayley_shift(X))

    assert torch.autograd.gradgradcheck(turned, (X, z))
    many = torch.stack([X, -X, 2 * X])
    gradient = torch.func.grad(lambda X, z: turned(X, z).sin().sum())
    for f in (turned, gradient):
        for got, one in zip(torch.vmap(f, (0, None))(many, z), many):
            assert error(got, f(one, z)) < T64


def test_gradient_of_a_rotation_stays_in_float32_under_autocast():
    X = skew_by_hand(random(2, 28), 8).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        (inside,) = torch.autograd.grad(rotations.cayley_shift(X), X, torch.ones(2, 8, 8))
    assert torch.equal(inside, torch.autograd.grad(rotations.cayley_shift(X), X, torch.ones(2, 8, 8))[0])


def test_block_turn_adds_the_block_product():
    z, N = random(5, 3, 12).transpose(0, 1), random(3, 4, 4, seed=2)
    assert error(rotations.block_turn(z, N), z + z @ torch.block_diag(*N)) < T64
    assert torch.equal(rotations.block_turn(z.bfloat16(), torch.zeros(3, 4, 4)), z.bfloat16())
    assert torch.autograd.gradcheck(rotations.block_turn, (random(2, 4).requires_grad_(), random(2, 2, 2).requires_grad_()))


def test_block_product_is_the_product_with_a_block_diagonal_matrix():
    z, N = random(3, 5, 12), random(3, 4, 4, seed=2)
    assert error(rotations.block_product(z, N), z @ torch.block_diag(*N)) < T64
    assert rotations.block_product(z.bfloat16(), N).dtype is torch.bfloat16
    assert torch.autograd.gradcheck(rotations.block_product, (random(2, 4).requires_grad_(), random(2, 2, 2).requires_grad_()))


# --- bounded angles ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("b", [2, 4, 8, 64])
def test_no_angle_exceeds_the_bound(b, dtype):
    for size in (0.01, 1.0, 1e3, 1e6):
        q = (size * random(3, b * (b - 1) // 2)).to(dtype)
        assert angles(rotations.cayley_shift(rotations.bounded(rotations.skew(q, b), 0.5))) <= 0.5 + 1e-6


def test_the_bound_is_reached_in_the_limit_and_none_is_no_bound():
    X = rotations.skew(torch.tensor([[1e6]], dtype=torch.float64), 2)
    assert angles(rotations.cayley_shift(rotations.bounded(X, 0.5))) > 0.4999
    assert rotations.bounded(X, None) is X
    assert angles(rotations.cayley_shift(X)) > 3.1


def test_bound_scales_each_block_by_its_own_norm():
    X, t = rotations.skew(random(3, 6), 4), math.tan(0.25)
    for block, got in zip(X, rotations.bounded(X, 0.5), strict=True):
        assert error(got, block / math.sqrt(1 + block.norm().item() ** 2 / (2 * t * t))) < T64


def test_bound_leaves_small_rotations_and_gradients_at_zero_alone():
    X = rotations.skew(1e-6 * random(3, 6), 4)
    assert ((rotations.bounded(X, 0.5) - X).norm() / X.norm()) < 1e-9
    for size in (0.0, 1.0):
        q = (size * random(2, 6)).requires_grad_()
        assert torch.autograd.gradcheck(lambda q: rotations.bounded(rotations.skew(q, 4), 0.5), q)
    q = torch.zeros(1, 6, dtype=torch.float64)
    slope = torch.autograd.functional.jacobian(lambda q: rotations.bounded(rotations.skew(q, 4), 0.5)[0, 0, 1:], q)
    assert error(slope[:, 0], torch.eye(6)[:3]) < T64


# --- reflections ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [None, 1e-3, 0.0])
@pytest.mark.parametrize("r", [2, 8, 64])
def test_reflections_are_the_product_in_order(r, split):
    V = random(r, 96) if split is None else split_pairs(r, 96, split)
    P, M = rotations.reflections(V)
    Q = torch.eye(96) - P.T @ M @ P
    assert error(Q, householder_product(V)) < T64
    assert error(Q @ Q.T, torch.eye(96)) < T64
    assert abs(torch.linalg.det(Q) - 1) < 1e-10
    assert abs(torch.linalg.det(M).log2() - r) < 1e-9
    if split is None and r > 2:
        assert error(Q, householder_product(V.flip(0))) > 0.1


def test_reflections_in_float32():
    V = random(64, 512, dtype=torch.float32)
    P, M = rotations.reflections(V)
    assert error(-P.T @ M @ P, householder_product(V) - torch.eye(512)) < 2e-6
    assert rotations.reflections(V.bfloat16())[1].dtype is torch.float32


@pytest.mark.parametrize("r", [2, 4, 8, 16, 32, 64])
def test_equal_pairs_cancel_exactly(r):
    for seed in range(20):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            P, M = rotations.reflections(random(r // 2, 80, seed=seed, dtype=dtype).repeat_interleave(2, dim=0))
            x = random(3, 80, dtype=dtype)
            assert not maps.low_rank(x, M @ P, P.T).any()
            assert not maps.lin(maps.lin(maps.lin(x, P), M), P.T).any()


@pytest.mark.parametrize("split", [1.0, 1e-2, 0.0])
def test_reflection_gradients(split):
    def shift(V):
        P, M = rotations.reflections(V)
        return P.T @ M @ P

    assert torch.autograd.gradcheck(shift, split_pairs(4, 5, split).requires_grad_())


def test_identical_and_vanishing_rows_are_finite():
    V = random(1, 12, dtype=torch.float32).expand(8, -1).clone().requires_grad_()
    P, M = rotations.reflections(V)
    (P.T @ M @ P).square().sum().backward()
    assert error(P.T @ M @ P, torch.zeros(12, 12)) < 1e-5
    assert V.grad.isfinite().all()
    rows = random(4, 12)
    rows[1] = 0  # reflects along nothing
    P, M = rotations.reflections(rows)
    assert error(torch.eye(12) - P.T @ M @ P, householder_product(rows[[0, 2, 3]])) < T64


def test_pairs_that_are_nearly_equal_survive_bfloat16():
    V = split_pairs(8, 512, 1e-3, torch.float32)
    x = random(32, 512, dtype=torch.bfloat16)
    want = x.double() @ (torch.eye(512) - householder_product(V)).T
    P, M = rotations.reflections(V)
    assert (maps.low_rank(x, M @ P, P.T).double() - want).norm() < 0.01 * want.norm()


def test_parameter_products_stay_in_float32_under_autocast():
    V = random(8, 66, dtype=torch.float32)

    def rotation():
        return rotations.cayley_shift(rotations.bounded(rotations.skew(V, 12), 0.5))

    with torch.autocast("cpu", torch.bfloat16):
        inside, turned = rotations.reflections(V), rotation()
    assert all(map(torch.equal, inside, rotations.reflections(V)))
    assert torch.equal(turned, rotation())


# --- bounded strengths ------------------------------------------------------------------------------------------------


def test_box_clamps_and_cuts_only_outward_gradients():
    values = [-0.5, 0.0, 1.0, 2.0, 2.5]
    for sign, kept in ((1.0, [0, 0, 1, 1, 1]), (-1.0, [1, 1, 1, 0, 0])):
        p = torch.tensor(values, requires_grad=True)
        out = maps.box(p, 0.0, 2.0)
        assert torch.equal(out.detach(), torch.tensor(values).clamp(0, 2))
        (sign * 3 * out).sum().backward()
        assert torch.equal(p.grad, sign * 3 * torch.tensor(kept, dtype=torch.float32))


def test_box_keeps_the_dtype_and_its_gradient():
    p = torch.tensor([-1.0, 0.5], dtype=torch.bfloat16, requires_grad=True)
    maps.box(p, 0.0, 1.0).sum().backward()
    assert p.grad.dtype is torch.bfloat16
    assert p.grad.tolist() == [0.0, 1.0]


def descend(held, lr=0.01, start=0.3, steps=(100, 300)):
    """AdamW pushed down for steps[0] and up for steps[1]; the values of p and of held(p) on the way."""
    p = torch.nn.Parameter(torch.tensor([start]))
    optimizer = torch.optim.AdamW([p], lr=lr, weight_decay=0.0)
    path = []
    for sign, count in ((1, steps[0]), (-1, steps[1])):
        for _ in range(count):
            optimizer.zero_grad()
            out = held(p, 0.0, 2.0)
            (sign * out).sum().backward()
            optimizer.step()
            path.append((p.item(), out.item()))
    return path


def test_box_lets_a_strength_come_back_where_a_clamp_does_not():
    boxed, clamped = descend(maps.box), descend(torch.clamp)
    assert boxed[99][0] < 0
    assert clamped[99][0] < 0
    assert boxed[-1][1] == 2.0
    assert clamped[-1][1] == 0.0
    assert clamped[-1][0] < -0.05
    assert all(0 <= out <= 2 for _, out in boxed)


def test_momentum_carries_a_boxed_strength_only_a_few_steps_out():
    for lr in (1e-3, 1e-2):
        assert -12 * lr < min(p for p, _ in descend(maps.box, lr=lr, start=30 * lr, steps=(100, 0))) < 0


def test_box_compiles_without_a_break():
    compiled = torch.compile(lambda p: maps.box(p, 0.0, 1.0), backend="eager", fullgraph=True)
    p = torch.tensor([-1.0, 0.5], requires_grad=True)
    compiled(p).sum().backward()
    assert p.grad.tolist() == [0.0, 1.0]
