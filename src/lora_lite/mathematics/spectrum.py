"""Singular vectors and eigenvectors for starts: few or all of them, as precise as the dtype allows or as a tolerance asks.

Pure functions, shapes as einsum letters: o outputs, i inputs, n either, r rank, b block size.
"""

import warnings
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ..errors import LoraLiteWarning
from .lanczos import fast_in_bfloat16, lanczos, orthonormal, powered
from .maps import binade, is_finite

BLOCK = 128  # rows of a symmetric matrix that are worked on at a time
MOST_ROWS = 1024  # of a matrix that are copied at a time to another precision


def left_svd(
    M: Tensor, r: int, method: Literal["exact", "fast", "auto"] = "exact", smallest: bool = False, tol: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """The r leading (or smallest) left singular vectors of M (o, i): U (o, r) orthonormal and S (r,), descending.

    exact  by the Gram matrix of the shorter side. Few directions by `leading_eigenpairs`, in float32 only where that is as
           precise as an SVD in float32; many, or where it does not converge, by all eigenvectors in float64, since a float32
           Gram matrix fails on the outlier spectra of language models. Smallest ones of ill-conditioned M: a float64 SVD.
    fast   without a Gram matrix: `lanczos` on M in bfloat16, where the device has instructions for that and tol allows it, else
           in the dtype of M. Accepted where |M M^T v_k - s_k^2 v_k| <= s_k^2 sqrt(tol) / 3 in the dtype of M, for the v_k that
           M M^T then takes nearer (`powered`); else exact, with a warning. tol: share of the largest |U^T M|^2 to be missed.
    auto   fast where r is at most a sixteenth of a shorter side above 2048.
    Results come in the dtype of M; NaN where M is not finite.
    """
    shorter, unit = min(M.shape), binade(M)
    if unit != 1:  # squares of M could leave float32
        if unit != unit:
            return M.new_full((len(M), r), torch.nan), M.new_full((r,), torch.nan)
        U, S = left_svd(M / unit, r, method, smallest, tol)
        return U, S * unit
    if not smallest and (method == "fast" or (method == "auto" and shorter > 2048 and r <= shorter // 16)):
        found = fast_left_svd(M, r, tol)
        if found is not None:
            return found
        warnings.warn(f"the fast SVD missed tol={tol}; the exact one was taken", LoraLiteWarning, stacklevel=2)
    return exact_left_svd(M, r, smallest)


def exact_left_svd(M: Tensor, r: int, smallest: bool) -> tuple[Tensor, Tensor]:
    shorter = M if M.shape[0] <= M.shape[1] else M.T
    if not smallest and M.dtype == torch.float32 and len(shorter) >= max(512, 32 * r):
        # An SVD in float32 leaves |M M^T u_k - s_k^2 u_k| / s_k^2 of about 1.3e-6. This tolerance leaves to float64 what is too
        # far apart for a Gram matrix: 1024 wide, an r-th singular value below half the first.
        found = leading_eigenpairs(gram(shorter, M.dtype), r, tol=1.5e-5, residual=2e-6)
        if found is not None:
            return from_eigenvectors(M, *found)
    G = gram(shorter, torch.float64)
    if not smallest:
        return from_eigenvectors(M, *top_eigenvectors(G, r))
    values, vectors = torch.linalg.eigh(G)
    if values[0] < 1e-12 * values[-1]:  # singular values below 1e-6 of the largest: lost in a Gram matrix
        U, S, _ = torch.linalg.svd(M.double(), full_matrices=False)
        return U[:, -r:].to(M.dtype), S[-r:].to(M.dtype)
    return from_eigenvectors(M, vectors[:, :r].flip(1), values[:r].flip(0))


def fast_left_svd(M: Tensor, r: int, tol: float) -> tuple[Tensor, Tensor] | None:
    """What `left_svd` calls fast; None where it cannot be had."""
    wide = M if M.shape[0] <= M.shape[1] else M.T
    residual = tol**0.5 / 3
    coarse = fast_in_bfloat16(M.device) and residual > torch.finfo(torch.bfloat16).eps
    for dtype in (torch.bfloat16, M.dtype) if coarse else (M.dtype,):
        near = next(lanczos(partial(times_gram, M=wide.to(dtype)), wide, r, residual), None)
        found = near and powered(wide, near[0], residual)
        if found is not None:
            return from_eigenvectors(M, *found)
    return None


def times_gram(rows: Tensor, M: Tensor) -> Tensor:
    """rows M M^T (b, n) of rows (b, n) and M (n, m), in the precision of M."""
    return (rows.to(M.dtype) @ M @ M.T).to(rows.dtype)


def from_eigenvectors(M: Tensor, V: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """U (o, r) and S (r,) of M (o, i) from eigenvectors V of the Gram matrix of its shorter side, and their eigenvalues."""
    S = values.clamp(min=0).sqrt().to(M.dtype)
    if M.shape[0] <= M.shape[1]:
        return V.to(M.dtype), S
    # M v / s loses orthogonality where s is small; QR restores it.
    return orthonormal(torch.cat([rows.to(V.dtype) @ V for rows in M.split(MOST_ROWS)])).to(M.dtype), S


def gram(M: Tensor, dtype: torch.dtype) -> Tensor:
    """M M^T (n, n) of M (n, m), in `dtype` without a whole copy of M."""
    G = torch.zeros(len(M), len(M), dtype=dtype, device=M.device)
    for columns in M.split(MOST_ROWS, dim=1):
        columns = columns.to(dtype)
        add_upper(G, columns, columns)
    return mirrored(G)


def congruent(W: Tensor, C: Tensor) -> Tensor:
    """W C W^T (o, o) of W (o, i) and a symmetric C (i, i)."""
    G = C.new_zeros(len(W), len(W))
    add_upper(G, W @ C, W)
    return mirrored(G)


def add_upper(G: Tensor, M: Tensor, N: Tensor, factor: float = 1.0) -> None:
    """G += factor M N^T on the blocks on and above the diagonal: of a symmetric product, little more than half of the work."""
    for k in range(0, len(G), BLOCK):
        G[k : k + BLOCK, k:].addmm_(M[k : k + BLOCK], N[k:].T, alpha=factor)


def mirrored(G: Tensor) -> Tensor:
    """G (n, n) with the blocks above the diagonal copied below it, in place."""
    for k in range(BLOCK, len(G), BLOCK):
        G[k:, k - BLOCK : k] = G[k - BLOCK : k, k:].T
    return G


def top_eigenvectors(G: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """(vectors (n, r), values (r,)) of a symmetric matrix in float64, descending: few of a large one by
    `leading_eigenpairs` down to a residual of 1e-7, which is what float32 resolves, else all by `torch.linalg.eigh`.
    NaN where G is not finite.
    """
    G = G.double()
    if not is_finite(G):
        return G.new_full((len(G), r), torch.nan), G.new_full((r,), torch.nan)
    found = leading_eigenpairs(G, r, tol=1e-6, residual=1e-7) if len(G) >= 768 and 48 * r <= len(G) else None
    if found is None:
        values, vectors = torch.linalg.eigh(G)
        found = vectors.flip(1)[:, :r], values.flip(0)[:r]
    return found


def leading_eigenpairs(G: Tensor, r: int, tol: float, residual: float) -> tuple[Tensor, Tensor] | None:
    """(V (n, r), values (r,)), descending, of a symmetric G (n, n), with |G v_k - q_k v_k| <= residual q_k.

    `nearly_all` proves, in n^3 / 6 multiply-adds, that sum q_k is at least 1 / (1 + tol) of the largest sum there is, whatever
    the start of `lanczos` missed. None where half the space does not suffice for that, and where the first value is so far
    above the r-th that rounding, sqrt(n) times it, exceeds `tol` of that.
    """
    rounding = len(G) ** 0.5 * torch.finfo(G.dtype).eps
    for V, q in lanczos(lambda rows: (G @ rows.T).T, G, r, residual):
        if rounding * q[0] > tol * q[-1]:
            return None
        if nearly_all(G, V, q, tol):
            return V, q
    return None


def nearly_all(G: Tensor, V: Tensor, q: Tensor, tol: float) -> bool:
    """Whether the r largest eigenvalues of a symmetric G (n, n) sum to at most (1 + tol) sum q, up to rounding.

    V (n, r) orthonormal, q (r,) descending and positive. Proven by a Cholesky factor of B - G for a B whose eigenvalues c_k are
    known: as G < B, each eigenvalue of G is below that of B (Weyl). B = t I + V diag(c - t) V^T, c_k = max((1 + tol/2) q_k, t),
    with the t that makes sum c = (1 + tol) sum q. False may only mean that V is not accurate enough.
    """
    most = (1 + tol / 2) * q
    counts = torch.arange(1, len(q) + 1, device=q.device)
    t = ((tol / 2 * q.sum() + most.flip(0).cumsum(0)) / counts).min()  # the level to which this much fills up the lowest
    B = torch.addmm(G, V * (most - t).clamp(min=0), V.T, beta=-1)
    B.diagonal().add_(t)
    return positive_definite(B)


def positive_definite(A: Tensor) -> bool:
    """Whether a symmetric A (n, n) has a Cholesky factor; overwrites A. torch's own is slower by the copies it makes."""
    while len(A):
        block, A, right = A[:BLOCK, :BLOCK], A[BLOCK:, BLOCK:], A[:BLOCK, BLOCK:]
        L, info = torch.linalg.cholesky_ex(block)
        if info:
            return False
        inverse = torch.linalg.solve_triangular(L, torch.eye(len(L), dtype=A.dtype, device=A.device), upper=False)
        right = (inverse @ right).T  # solving for every column takes twice the time
        add_upper(A, right, right, -1.0)
    return True


def nystrom(S: Tensor, Omega: Tensor) -> tuple[Tensor, Tensor]:
    """(vectors (i, q), values (q,)), float64, descending, of a symmetric C >= 0 (i, i) of which only S = C Omega is known.

    Those of S (Omega^T S)^+ S^T: C itself where its rank is at most q, never above it (Tropp et al. 2017, arXiv:1706.05736).
    Omega (i, q) has orthonormal columns. Directions of Omega^T S below 1e-7 of the largest are rounding and left out.
    """
    S, Omega = S.double(), Omega.double()
    core = Omega.T @ S
    values, Q = torch.linalg.eigh((core + core.T) / 2)
    root = torch.where(values > 1e-7 * values[-1], values.rsqrt(), 0.0)
    U, lengths, _ = torch.linalg.svd(S @ (Q * root), full_matrices=False)
    return U, lengths.square()


def orth(V: Tensor) -> Tensor:
    """Orthonormal columns spanning those of V (o, k), in float32 or better.

    A column that the ones before it span up to rounding becomes any that is orthogonal to them, without a gradient.
    """
    V = V.to(torch.promote_types(V.dtype, torch.float32))
    if V.shape[1] == 1:
        return V / V.norm(dim=0).clamp(min=1e-12)
    if V.requires_grad:  # the gradient of QR divides by what is left of each column
        Q, R = torch.linalg.qr(V.detach())
        spanned = R.diagonal().abs() <= 4 * len(V) ** 0.5 * torch.finfo(V.dtype).eps * R.abs().amax(0)
        V = torch.where(spanned, Q, V)
    return torch.linalg.qr(V).Q
