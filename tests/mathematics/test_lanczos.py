"""Block Lanczos and what refines it, against all eigenvectors in float64."""

import math
from itertools import pairwise

import pytest
import torch

from lora_lite.mathematics.lanczos import fast_in_bfloat16, lanczos, orthonormal, powered
from lora_lite.testing import toy
from lora_lite.testing.checks import error

N, R = 256, 6


def symmetric(values, dtype=torch.float64):
    Q = orthonormal(toy.inputs(N, N, dtype=torch.float64))
    return (Q * values @ Q.T).to(dtype)


def pairs(G, residual=1e-1, r=R):
    return lanczos(lambda rows: rows @ G, G, r, residual)


def left_over(G, V, q):
    """The largest |G v_k - q_k v_k| / q_k."""
    return float(((G @ V - V * q).norm(dim=0) / q).max())


@pytest.mark.parametrize(("dtype", "floor"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_pairs_get_better_by_half_down_to_rounding(dtype, floor):
    G = symmetric(torch.arange(1, N + 1, dtype=torch.float64) ** -0.5, dtype)
    wanted = torch.linalg.eigvalsh(G.double()).flip(0)[:R]
    found = [left_over(G, V, q) for V, q in pairs(G)]
    assert len(found) > 2
    assert found[0] < 1e-1
    assert all(after < max(before / 2 * (1 + 1e-3), floor) for before, after in pairwise(found))
    *_, (V, q) = pairs(G)
    assert V.dtype is q.dtype is dtype
    assert V.shape == (N, R)
    assert error(q.double(), wanted) < floor
    assert error(V.T @ V, torch.eye(R)) < floor


def test_the_first_pair_is_as_good_as_asked():
    G = symmetric(torch.arange(1, N + 1, dtype=torch.float64) ** -0.5)
    for residual in (1e-2, 1e-4, 1e-6):
        V, q = next(pairs(G, residual))
        assert left_over(G, V, q) < residual


def test_ends_at_half_the_space_and_before_it_begins_where_blocks_do_not_fit():
    seen = []
    G = symmetric(torch.arange(N, 0, -1, dtype=torch.float64) / N)
    assert list(lanczos(lambda rows: seen.append(len(rows)) or rows @ G, G, R, 1e-12)) == []
    assert sum(seen) == N // 2
    assert list(lanczos(lambda rows: rows, torch.eye(20), R, 1.0)) == []


def test_fewer_directions_than_a_block_are_completed():
    """A product of rank 2 leaves nothing to go on with: what comes next is orthogonal all the same."""
    G = symmetric(torch.where(torch.arange(N) < 2, 1.0, 0.0).double())
    V, q = next(pairs(G, 1e-8, r=2))
    assert error(q, torch.ones(2)) < 1e-12
    assert error(G @ V, V) < 1e-8


def near(M, r, angle):
    """The r leading left singular vectors of M, turned by `angle` into directions that are not among them."""
    U = torch.linalg.svd(M).U
    return U[:, :r] * math.cos(angle) + U[:, -r:] * math.sin(angle)


def test_powered_turns_what_spans_the_directions_into_them():
    M = toy.inputs(40, 60, dtype=torch.float64)
    U, S, _ = torch.linalg.svd(M)
    mixed = U[:, :5] @ orthonormal(toy.inputs(5, 5, dtype=torch.float64))
    V, q = powered(M, mixed, 1e-10)
    assert error(q, S[:5].square()) < 1e-12
    assert error((V * U[:, :5]).sum(0).abs(), torch.ones(5)) < 1e-12


def test_powered_multiplies_until_it_is_precise_enough_and_at_most_three_times():
    U = torch.linalg.qr(toy.inputs(40, 40, dtype=torch.float64)).Q
    M = U * torch.where(torch.arange(40) < 5, 1.0, 0.1).double()  # M M^T makes the rest a hundred times smaller
    tangent = math.tan(0.1)
    for times in (1, 2, 3):  # each takes it below what the next residual asks
        V, q = powered(M, near(M, 5, 0.1), 1.1 * tangent / 100 ** (times - 1))
        assert float((U[:, 5:].T @ V).norm(dim=0).max()) == pytest.approx(tangent / 100**times, rel=0.01)
        assert error(q, torch.ones(5)) < 1.1 * (tangent / 100 ** (times - 1)) ** 2
        assert error(V.T @ V, torch.eye(5)) < 1e-12
    assert powered(M, near(M, 5, 0.1), 0.9 * tangent / 100**2) is None


def test_powered_gives_directions_that_the_matrix_lacks_the_value_zero():
    M = torch.zeros(8, 9)
    M[0, 0] = 2
    V, q = powered(M, torch.eye(8)[:, [3, 0]], 0.1)
    assert torch.equal(q, torch.tensor([4.0, 0.0]))
    assert torch.equal(V[:, 0].abs(), torch.eye(8)[0])
    assert error(V.T @ V, torch.eye(2)) < 1e-6


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [
        ({"avx512_bf16": True, "amx_bf16": False, "cpu_name": "x"}, True),
        ({"bf16": True, "sve_max_length": 256}, True),
        ({"avx512_bf16": False, "avx512_f": True}, False),
        ({}, False),
    ],
)
def test_a_processor_is_fast_in_bfloat16_where_it_has_the_instructions(capabilities, fast, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert fast_in_bfloat16(torch.device("cpu")) is fast
    assert not fast_in_bfloat16(torch.device("meta"))


def test_a_torch_that_cannot_tell_or_does_not_use_them_is_taken_for_slow(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"bf16": True}, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not fast_in_bfloat16(torch.device("cpu"))
    monkeypatch.undo()
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not fast_in_bfloat16(torch.device("cpu"))
