"""A few leading eigenvectors of a symmetric matrix that is known by its products, by block Lanczos.

Shapes as einsum letters: n rows of the matrix, m columns, b block size, r vectors asked for.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def lanczos(times: Callable[[Tensor], Tensor], like: Tensor, r: int, residual: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Better and better (V (n, r), q (r,)) of a symmetric G: V orthonormal, q descending.

    times   (b, n) -> (b, n), a new tensor: rows times G
    like    (n, ...): dtype and device of the result
    The first pair comes where |G v_k - q_k v_k| <= residual q_k for all k by the recurrence, each other one at half of what the
    one before reached; ends at half the space. Full orthogonalization, from a fixed random start.
    """
    n, b = len(like), max(8, r // 2)
    most = max(n // 2, 3 * b) // b * b
    if most + b > n:
        return
    Q, T = like.new_empty(most + b, n), like.new_zeros(most + b, most + b)  # vectors are rows: products are fastest so
    start = torch.randn(n, b, generator=torch.Generator().manual_seed(0), device="cpu", dtype=torch.float32).to(like)
    Q[:b] = torch.linalg.qr(start).Q.T
    check = min(most, max(3 * b, int(5 * n**0.5)))  # what a random matrix needs, the hardest there is
    earlier = (0, 1.0)
    for j in range(b, most + 1, b):
        known, last, near = Q[:j], slice(j - b, j), slice(max(0, j - 2 * b), j)
        Z = times(Q[last])  # its parts along blocks before the two last ones are rounding
        T[last, near] = H = Z @ Q[near].T
        T[near, last] = H.T
        step, R = torch.linalg.qr(Z.addmm_(H, Q[near], alpha=-1).T)
        for _ in range(4):  # against that rounding, and again where it was most of what is left, as Z had no full rank
            step, S = torch.linalg.qr((step.T - step.T @ known.T @ known).T)
            R = S @ R
            if S.diagonal().abs().min() > 0.5:
                break
        Q[j : j + b] = step.T
        if j < check:
            continue
        values, vectors = torch.linalg.eigh(T[:j, :j])
        q, Y = values[-r:].flip(0), vectors[:, -r:].flip(1)
        reached = float(((R @ Y[last]).norm(dim=0) / q).max())
        if reached <= residual:
            yield orthonormal((Y.T @ known).T), q
            residual = reached / 2
        # Looking costs j^3: the rate so far tells when it may be enough.
        rate = math.log(earlier[1] / reached) / (j - earlier[0]) if 0 < reached < earlier[1] else 0.0
        check = min(most, j + min(math.log(max(reached / residual, 1)) / rate, j / 2) if rate else 1.5 * j)
        earlier = (j, reached)


def powered(M: Tensor, V: Tensor, residual: float) -> tuple[Tensor, Tensor] | None:
    """(V (n, r), q (r,)), descending: orthonormal columns near leading eigenvectors of M M^T (M (n, m)), from V near them.

    V is turned into Ritz vectors and multiplied by M M^T, which takes it nearer, until the Ritz vectors before that had
    |M M^T v_k - q_k v_k| <= residual q_k, q their values; None where these of V, M M^T V and (M M^T)^2 V have not.
    """
    for _ in range(3):
        Z = M @ (V.T @ M).T
        values, Y = torch.linalg.eigh(V.T @ Z)
        q, Y = values.flip(0), Y.flip(1)
        Z = Z @ Y
        precise = (Z - V @ Y * q).norm(dim=0) <= residual * q
        V = orthonormal(Z)
        if bool(precise.all()):
            return V, q
    return None


def orthonormal(V: Tensor) -> Tensor:
    """V (n, r), nearly orthogonal columns, made orthonormal without a change of sign."""
    Q, R = torch.linalg.qr(V)
    return Q * torch.where(R.diagonal() < 0, -1.0, 1.0)


def fast_in_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for products of bfloat16 and torch uses them; False where torch cannot tell."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older versions lack it
    return any(there for name, there in capabilities.items() if "bf16" in name)
