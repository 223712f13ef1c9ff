"""The rotation core against U diag(sigma + c d) R(c) P in dense float64."""

import math

import pytest
import torch

import lora_lite as ll
from lora_lite.families.subspace import rotation
from lora_lite.testing import checks, toy
from lora_lite.testing.checks import error
from lora_lite.testing.formula import T64, adapted, check_dense
from tests.families.test_subspace import BASES, batches
from tests.oracles.kinds import of_options
from tests.oracles.layer import check_rest_stays

MODES = ("V", "U", "both")


def generator(theta, b, max_angle):
    """Skew matrices X, entry by entry, each shrunk to the bound."""
    blocks = []
    for row in theta:
        X, entries = row.new_zeros(b, b), iter(row)
        for i in range(b):
            for j in range(i + 1, b):
                e = next(entries) / 2
                X = X + e * torch.outer(torch.eye(b)[i], torch.eye(b)[j]).to(row.dtype)
                X = X - e * torch.outer(torch.eye(b)[j], torch.eye(b)[i]).to(row.dtype)
        if max_angle is not None:
            X = X / (1 + (X**2).sum() / 2 / math.tan(max_angle / 2) ** 2) ** 0.5
        blocks.append(X)
    return torch.block_diag(*blocks)


def cayley(X):
    I = torch.eye(len(X), dtype=X.dtype)
    return torch.linalg.inv(I - X) @ (I + X)


def turn(a, side, c):
    theta = getattr(a, f"theta_{side}")
    return cayley(c * generator(theta, a.cfg.block_size, a.cfg.max_angle))


def dense(a, W, b, c):
    """W_res + U R_u^T diag(sigma + c d) R_v P; an identity for the side that does not turn."""
    I = torch.eye(a.cfg.r, dtype=W.dtype)
    Rv = I if a.cfg.rotate == "U" else turn(a, "v", c)
    Ru = I if a.cfg.rotate == "V" else turn(a, "u", c)
    P = (a.U.T @ W) / a.sigma[:, None]
    core = Ru.T @ torch.diag(a.sigma + c * a.d) @ Rv
    return W - a.U @ (a.U.T @ W) + a.U @ core @ P, b


def config(rotate="V", **fields):
    return ll.AntiPaSTORotConfig(**{"r": 8, "rotate": rotate, **fields})


@pytest.mark.parametrize("rotate", ["U", "both"])
@pytest.mark.parametrize(
    "check", [pytest.param(check, marks=of_options(check), id=check.function.__name__) for check in checks("antipasto_rot")]
)
def test_other_sides_are_lawful(check, rotate):
    check.function(check.cls, config(rotate))


@pytest.mark.parametrize("fields", [{}, {"block_size": 8, "max_angle": None}, {"block_size": 2, "max_angle": 1.5}], ids=str)
@pytest.mark.parametrize("rotate", MODES)
def test_output_and_gradients_equal_the_dense_form(rotate, fields):
    check_dense(config(rotate, **fields), dense)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("rotate", MODES)
def test_every_basis_gives_the_dense_form(rotate, basis):
    cfg = config(rotate, r=12, basis=basis)
    model, adapter = adapted(cfg, 24, 40, data=None if basis == "svd" else batches())
    x = toy.inputs(5, 24, dtype=torch.float64)
    W, b = dense(adapter, model.o_proj.weight, model.o_proj.bias, 1.0)
    assert error(model(x), x @ W.T + b) < T64


def paper_rotation(A, c, max_angle=None):
    """Equations 7 and 8 of the paper, of its skew matrix A: an oracle that shares neither sign nor scale with ours."""
    I = torch.eye(len(A), dtype=A.dtype)
    if max_angle is not None:
        limit = 2 * math.tan(max_angle / 2)
        A = limit * torch.tanh(A / limit)
    return (I - c / 2 * A) @ torch.linalg.inv(I + c / 2 * A)


def paper_skew(theta):
    """A with -theta above its diagonal, row by row."""
    A = theta.new_zeros(8, 8)
    A[tuple(torch.triu_indices(8, 8, 1))] = -theta.flatten()
    return A - A.T


@pytest.mark.parametrize("coeff", [1.0, -0.6])
@pytest.mark.parametrize("cap", [None, math.pi / 3])
def test_one_block_of_all_directions_is_the_papers_form(cap, coeff):
    model, adapter = adapted(config(block_size=8, max_angle=cap, cap="plane"))
    W, b = model.o_proj.weight.detach(), model.o_proj.bias
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    signs = (adapter.U * U[:, :8]).sum(0).sign()
    U, Vh = U[:, :8] * signs, Vh[:8] * signs[:, None]
    rest = W - U * S[:8] @ Vh
    A, d = paper_skew(adapter.theta_v.detach()), adapter.d.detach()
    x = toy.inputs(5, 24, dtype=torch.float64)

    def off(A):
        want = rest + U * (S[:8] + coeff * d) @ paper_rotation(A, coeff, cap) @ Vh
        with ll.scale(model, coeff):
            return error(model(x), x @ want.T + b)

    assert off(A) < T64
    assert off(-A) > 1e-2


def test_planes_are_capped_each_or_the_block_as_a_whole():
    theta = torch.zeros(1, 6, dtype=torch.float64)
    theta[0, 0] = 1e3  # one plane alone: both caps end at the largest angle
    for cap in ("plane", "block"):
        R = torch.eye(4, dtype=torch.float64) + rotation(theta, 1.0, 4, 0.5, cap)
        assert abs(float(torch.linalg.eigvals(R).angle().abs().max()) - 0.5) < 1e-6
    theta[0] = 1e3  # all six planes
    most = {}
    for cap in ("plane", "block"):
        R = torch.eye(4, dtype=torch.float64) + rotation(theta, 1.0, 4, 0.5, cap)
        most[cap] = float(torch.linalg.eigvals(R).angle().abs().max())
    assert most["block"] < 0.5 < most["plane"] <= 2 * math.atan(3 * math.tan(0.25))


def antiparallel(model, x, u):
    """The paper's loss without its barriers: the product of what both signs of coeff do along one direction."""
    with ll.disabled(model):
        base = model(x)
    sides = []
    for coeff in (1.0, -1.0):
        with ll.scale(model, coeff):
            sides.append((model(x) - base) @ u)
    return (sides[0] * sides[1]).mean()


@pytest.mark.parametrize("rotate", MODES)
def test_only_a_start_off_the_base_moves_under_the_antiparallel_loss(rotate):
    x, u = toy.inputs(16, 24), toy.inputs(1, 32)[0]
    ended = {}
    for fields in ({}, {"theta_init": 3e-3}, {"d_init": 4e-4}):
        model = toy.one(24, 32)
        ll.attach(model, config(rotate, **fields))
        optimizer = torch.optim.AdamW(ll.param_groups(model, lr=1e-2))
        for _ in range(20):
            loss = antiparallel(model, x, u)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ended[next(iter(fields), "exact")] = float(loss.detach())
    assert ended["exact"] == 0
    assert ended["theta_init"] < -1e-2
    assert ended["d_init"] < -1e-2


@pytest.mark.parametrize("rotate", MODES)
@pytest.mark.parametrize("block_size", [2, 4, 8])
def test_a_random_start_is_within_its_bound_and_drawn_by_the_seed(rotate, block_size):
    sides = 2 if rotate == "both" else 1
    for theta, d in ((3e-3, 0.0), (0.1, 0.0), (3e-3, 4e-4)):
        model = toy.one(24, 32, dtype=torch.float64)
        fields = {"block_size": block_size, "theta_init": theta, "d_init": d, "dtype": torch.float64}
        adapter = ll.attach(model, config(rotate, **fields)).layers["o_proj"]
        thetas = torch.cat([p.flatten() for p in adapter.thetas().values()])
        assert thetas.abs().max() <= theta
        assert thetas.abs().max() > theta / 4
        moved = torch.linalg.matrix_norm(ll.delta_weight(model, "o_proj").double(), 2)
        W = torch.linalg.matrix_norm(model.o_proj.weight, 2)
        bound = sides * theta * (block_size * (block_size - 1) / 2) ** 0.5 * W + d
        assert bound / 20 < moved <= bound * (1 + 1e-6)
        with ll.scale(model, 0.0):
            zero = model(toy.inputs(3, 24, dtype=torch.float64))
        with ll.disabled(model):
            assert torch.equal(model(toy.inputs(3, 24, dtype=torch.float64)), zero)


def test_rotations_are_orthogonal_with_determinant_one():
    for b in (2, 4, 8):
        theta = 3 * toy.inputs(6, b * (b - 1) // 2)
        for c in (1.0, 0.5, -0.7, 2.0):
            R = torch.eye(b) + rotation(theta, c, b, None)
            assert error(R @ R.mT, torch.eye(b).expand(6, b, b)) < 1e-5
            assert error(torch.linalg.det(R), torch.ones(6)) < 1e-5


@pytest.mark.parametrize("b", [2, 4, 8])
def test_no_rotation_exceeds_the_largest_angle(b):
    count = b * (b - 1) // 2
    for theta in (toy.inputs(20, count), 1e6 * toy.inputs(20, count), torch.full((1, count), 5.0), torch.eye(count) * 1e3):
        R = torch.eye(b, dtype=torch.float64) + rotation(theta.double(), 1.0, b, 0.5)
        assert float(torch.linalg.eigvals(R).angle().abs().max()) <= 0.5 + 1e-9
    free = torch.eye(b, dtype=torch.float64) + rotation(torch.full((1, count), 5.0).double(), 1.0, b, None)
    assert float(torch.linalg.eigvals(free).angle().abs().max()) > 0.5
    pair = torch.eye(2, dtype=torch.float64) + rotation(torch.full((1, 1), 1e6).double(), 1.0, 2, 0.5)
    assert abs(float(torch.linalg.eigvals(pair).angle().abs().max()) - 0.5) < 1e-6


def test_angle_is_theta_to_first_order():
    R = torch.eye(2, dtype=torch.float64) + rotation(torch.tensor([[0.01]], dtype=torch.float64), 1.0, 2, None)
    assert abs(float(torch.atan2(R[0, 0, 1], R[0, 0, 0])) - 2 * math.atan(0.005)) < 1e-12


def test_negative_coeff_is_the_transpose_and_twice_is_not_the_square():
    theta = toy.inputs(3, 6, dtype=torch.float64)
    I = torch.eye(4, dtype=torch.float64)
    R = {c: I + rotation(theta, c, 4, 0.5) for c in (1.0, -1.0, 2.0)}
    assert error(R[-1.0], R[1.0].mT) < 1e-12
    assert error(I + rotation(-theta, 1.0, 4, 0.5), R[1.0].mT) < 1e-12
    assert error(R[2.0], R[1.0] @ R[1.0]) > 1e-4


@pytest.mark.parametrize("rotate", ["V", "U"])
def test_minus_one_undoes_one_where_only_one_side_turns(rotate):
    model, adapter = adapted(config(rotate))
    x = toy.inputs(5, 24, dtype=torch.float64)
    with torch.no_grad():
        adapter.d.zero_()
    with ll.disabled(model):
        base = model(x)
    second = ll.attach(model, config(rotate, dtype=torch.float64, coeff=-1.0), name="back").layers["o_proj"]
    second.load_state_dict(adapter.state_dict())
    assert error(model(x), base) < T64
    with ll.disabled(model, "back"):
        assert error(model(x), base) > 1e-2


def test_singular_values_of_the_adapted_part_are_the_shifted_ones():
    for rotate in MODES:
        model, adapter = adapted(config(rotate))
        W = model.o_proj.weight.detach().double()
        new = W + ll.delta_weight(model, "o_proj").double()
        got = torch.linalg.svdvals(adapter.U.T @ new)
        want = (adapter.sigma + adapter.d.detach()).abs().sort(descending=True).values
        assert error(got, want) < 1e-6


@pytest.mark.parametrize("rotate", MODES)
def test_blocks_do_not_mix(rotate):
    model, adapter = adapted(config(rotate))
    x = toy.inputs(5, 24, dtype=torch.float64)
    before = model(x) @ adapter.U
    with torch.no_grad():
        for theta in (p for name, p in adapter.named_parameters() if name.startswith("theta")):
            theta[0] += 0.5
    change = model(x) @ adapter.U - before
    assert error(change[:, 4:], torch.zeros(5, 4)) < T64
    assert change[:, :4].abs().max() > 1e-2


def test_the_rest_of_the_output_stays():
    check_rest_stays(*adapted(config("both")))


def test_signs_of_singular_vectors_are_absorbed_by_the_angles():
    model, adapter = adapted(config("both"))
    x = toy.inputs(5, 24, dtype=torch.float64)
    before = model(x)
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0] * 2, dtype=torch.float64)
    pairs = torch.triu_indices(4, 4, 1)
    flips = (signs[:4][pairs[0]] * signs[:4][pairs[1]]).expand(2, 6)
    adapter.U.mul_(signs)
    with torch.no_grad():
        adapter.theta_v.mul_(flips)
        adapter.theta_u.mul_(flips)
    assert error(model(x), before) < T64


def test_shift_start_gives_even_losses_a_gradient():
    x = toy.inputs(5, 24, dtype=torch.float64)
    for start, moves in ((0.0, False), (4e-4, True)):
        model, adapter = adapted(config(d_init=start), size=0)
        assert error(adapter.d, torch.full((8,), start)) < 1e-9
        with ll.disabled(model):
            base = model(x)
        assert torch.equal(model(x), base) is not moves
        (model(x) - base).square().sum().backward()
        assert adapter.theta_v.grad.any().item() is moves


def test_bias_is_left_alone_unless_asked():
    x = torch.zeros(1, 24, dtype=torch.float64)
    for include in (False, True):
        model, _ = adapted(config("both", include_bias=include))
        change = error(model(x)[0], model.o_proj.bias)
        assert change > 1e-3 if include else change < 1e-12
