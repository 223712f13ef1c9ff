"""Linear algebra shared by the variants: pure functions, row form, shapes as einsum letters.

Letters: o outputs, i inputs, r rank, k kept directions, n a count of blocks, b block size, ... leading axes.
Products with activations run in the activations' dtype; factorizations, solves and norms in float32 or better.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .errors import LoraLiteError, LoraLiteWarning

MOST_VALUES = 16  # of one coefficient tensor, for maps that are evaluated once per distinct value


# --- products ---------------------------------------------------------------------------------------------------------


def lin(z: Tensor, M: Tensor) -> Tensor:
    """z M^T on the last axis, in the dtype of z: (..., i), (o, i) -> (..., o)."""
    return F.linear(z, M.to(z.dtype))


def low_rank(x: Tensor, A: Tensor, B: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """B diag(scale) A x: (..., i), (r, i), (o, r) -> (..., o); scale is a number or broadcasts to (..., r)."""
    return lin((lin(x, A) * scale).to(x.dtype), B)


def distinct(coeff: Tensor) -> Tensor | None:
    """The values (k,) other than 0 of a coefficient tensor, in float64 on the CPU: each multiplies as a Python number does.

    None where there are more than 16 values.
    """
    values = coeff.detach().unique().cpu().double()
    return values[values != 0] if len(values) <= MOST_VALUES else None


def per_value(
    coeff: float | Tensor,
    z: Tensor,
    change: Callable[[Any, Tensor], Tensor],
    at_zero: Tensor | None = None,
    values: Tensor | None = None,
) -> Tensor:
    """`change(c, z)` for a float; for a tensor of coefficients, once per distinct value, each sample taking its own.

    For maps that are not linear in the coefficient, such as the Cayley transform. coeff: aligned with z, last axes 1; c is a
    number or a tensor without axes; at_zero: the result where coeff is 0, None: zeros; values: `distinct(coeff)` where it is
    known already, which a compiled graph needs: it has one pass per value and cannot count them itself.
    Raises LoraLiteError above 16 distinct values, and for a coefficient that is to be trained: values have no gradient.
    """
    if not isinstance(coeff, Tensor):
        return change(coeff, z)
    if coeff.requires_grad:
        raise LoraLiteError(
            "The coefficient tensor requires a gradient.",
            expected="This variant evaluates its map once per value, and values carry no gradient.",
            fix="coeff = coeff.detach()",
        )
    values = distinct(coeff) if values is None else values
    if values is None:
        raise LoraLiteError(
            f"The coefficient tensor holds {len(coeff.unique())} distinct values.",
            expected=f"This variant evaluates its map once per value and takes at most {MOST_VALUES}.",
            fix="coeff = (coeff * 8).round() / 8",
        )
    out = torch.zeros_like(z) if at_zero is None else at_zero
    for value in values:
        out = torch.where(coeff == value, change(value, z), out)
    return out


def without_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """y - b, (..., o)."""
    return y if bias is None else y - bias


# --- singular vectors -------------------------------------------------------------------------------------------------


def left_svd(
    M: Tensor, r: int, method: Literal["exact", "fast", "auto"] = "exact", smallest: bool = False, tol: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """The r leading (or smallest) left singular vectors of M (o, i): U (o, r) orthonormal and S (r,), descending.

    exact  eigenvectors of the Gram matrix of the shorter side in float64; a float32 Gram matrix fails on the outlier
           spectra of language models. Smallest directions of ill-conditioned matrices go through a float64 SVD.
    fast   subspace iteration with oversampling, accepted when max_k |M v_k - s_k u_k| / s_k <= tol, else exact.
    auto   fast where r is at most a sixteenth of a shorter side above 2048.
    Results come in the dtype of M.
    """
    shorter = min(M.shape)
    if not smallest and (method == "fast" or (method == "auto" and shorter > 2048 and r <= shorter // 16)):
        found = subspace_iteration(M, r, tol)
        if found is not None:
            return found
        warnings.warn(f"the fast SVD missed tol={tol}; the exact one was taken", LoraLiteWarning, stacklevel=2)
    return exact_left_svd(M, r, smallest)


def exact_left_svd(M: Tensor, r: int, smallest: bool) -> tuple[Tensor, Tensor]:
    D, wide = M.double(), M.shape[0] <= M.shape[1]
    values, vectors = torch.linalg.eigh(D @ D.T if wide else D.T @ D)
    kept = slice(len(values) - r, None) if smallest else slice(r)
    if smallest and values[0] < 1e-12 * values[-1]:  # singular values below 1e-6 of the largest: lost in a Gram matrix
        U, S, _ = torch.linalg.svd(D, full_matrices=False)
        U, S = U[:, kept], S[kept]
    elif wide:
        U, S = vectors.flip(1)[:, kept], values.clamp(min=0).sqrt().flip(0)[kept]
    else:
        # M v / s loses orthogonality where s is small; QR restores it.
        Q, R = torch.linalg.qr(D @ vectors.flip(1)[:, kept])
        U, S = Q * torch.where(R.diagonal() < 0, -1.0, 1.0), R.diagonal().abs()
    return U.to(M.dtype), S.to(M.dtype)


def subspace_iteration(M: Tensor, r: int, tol: float) -> tuple[Tensor, Tensor] | None:
    """Randomized SVD with q = r + max(r, 16) columns, checked after 4, 8 and 16 rounds; None if tol is not reached."""
    q = min(r + max(r, 16), *M.shape)
    start = torch.randn(M.shape[1], q, generator=torch.Generator().manual_seed(0), dtype=M.dtype).to(M.device)
    Q = torch.linalg.qr(M @ start).Q
    for round_ in range(1, 17):
        Q = torch.linalg.qr(M @ torch.linalg.qr(M.T @ Q).Q).Q
        if round_ in (4, 8, 16):
            U, S, Vh = torch.linalg.svd(Q.T @ M, full_matrices=False)
            U, S, Vh = Q @ U[:, :r], S[:r], Vh[:r]
            # M^T u - s v is zero by construction and says nothing; this residual does.
            residual = ((M @ Vh.T - U * S).norm(dim=0) / S.clamp(min=torch.finfo(S.dtype).tiny)).max()
            if residual <= tol:
                return U, S
    return None


def top_eigenvectors(G: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """(vectors (n, r), values (r,)) of a symmetric matrix in float64, descending."""
    values, vectors = torch.linalg.eigh(G.double())
    return vectors.flip(1)[:, :r], values.flip(0)[:r]


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
    """Orthonormal columns spanning those of V (o, k), in float32 or better."""
    V = V.to(torch.promote_types(V.dtype, torch.float32))
    if V.shape[1] == 1:
        return V / V.norm(dim=0).clamp(min=1e-12)
    return torch.linalg.qr(V).Q


# --- rotations and reflections ----------------------------------------------------------------------------------------


def skew(q: Tensor, b: int) -> Tensor:
    """Skew matrices (n, b, b) with q (n, b(b-1)/2) above the diagonal, row by row, and -q below."""
    upper = torch.triu_indices(b, b, 1, device=q.device)
    X = q.new_zeros(q.shape[0], b, b).index_put((torch.arange(q.shape[0], device=q.device)[:, None], upper[0], upper[1]), q)
    return X - X.mT


def cayley_shift(X: Tensor) -> Tensor:
    """R - I for R = (I - X)^-1 (I + X), X (n, b, b) skew: exactly 0 at X = 0, precise for small rotations."""
    X = X.to(torch.promote_types(X.dtype, torch.float32))
    eye = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    return torch.linalg.solve(eye - X, 2 * X)


def bounded(X: Tensor, max_angle: float | None) -> Tensor:
    """X (n, b, b) shrunk so that no eigen-angle of its Cayley rotation reaches max_angle (radians), smooth at 0.

    X / sqrt(1 + |X|_F^2 / (2 t^2)), t = tan(max_angle / 2): the spectral norm of a skew X is at most |X|_F / sqrt 2.
    """
    if max_angle is None:
        return X
    X = X.to(torch.promote_types(X.dtype, torch.float32))  # in bfloat16 rounding alone breaks the bound
    t = math.tan(max_angle / 2)
    return X / (1 + X.square().sum((-2, -1), keepdim=True) / (2 * t * t)).sqrt()


def block_product(z: Tensor, N: Tensor) -> Tensor:
    """z blockdiag(N) in row form: (..., n b), (n, b, b) -> (..., n b), in the dtype of z."""
    blocks = rearrange(z, "... (n k) -> n (...) k", n=len(N))
    return rearrange(torch.bmm(blocks, N.to(z.dtype)), "n t c -> t (n c)").reshape(z.shape)


def block_turn(z: Tensor, N: Tensor) -> Tensor:
    """z + z blockdiag(N), the sum inside the product: one pass less over z."""
    blocks = rearrange(z, "... (n k) -> n (...) k", n=len(N))
    return rearrange(torch.baddbmm(blocks, blocks, N.to(z.dtype)), "n t c -> t (n c)").reshape(z.shape)


def reflections(V: Tensor) -> tuple[Tensor, Tensor]:
    """(P, M) with H_0 H_1 ... H_(r-1) - I = -P^T M P, H_k the reflection along row k of V (r, i), r even.

    WY form in the pair basis: rows (u, v) of each adjacent pair become (u, d), d = v - u, so that equal pairs, whose
    reflections cancel, give exactly 0 and nearly equal pairs lose no digits. det of the inverted matrix is 2^-r always.
    """
    V = V.to(torch.promote_types(V.dtype, torch.float32))
    unit = V / V.norm(dim=1, keepdim=True).clamp(min=1e-12)
    u, d = unit[0::2], unit[1::2] - unit[0::2]
    P = rearrange([u, d], "two pairs i -> (pairs two) i")
    e = d.square().sum(1) / 2
    half = torch.full_like(e, 0.5)
    own = rearrange([half, 0.5 - e, -half, e], "(a b) pairs -> a b pairs", a=2)
    pair = torch.arange(len(P), device=V.device) // 2
    with torch.autocast(V.device.type, enabled=False):  # a Gram matrix in bfloat16 costs orthogonality
        K = torch.where(pair[:, None] < pair, P @ P.T, 0.0) + rearrange(torch.diag_embed(own), "a b p q -> (p a) (q b)")
    return P, torch.linalg.inv(K)


# --- bounded strengths ------------------------------------------------------------------------------------------------


class Box(torch.autograd.Function):
    """clamp(p, lo, hi) whose gradient is cut only where a descent step would leave the box."""

    generate_vmap_rule = True

    @staticmethod
    def forward(p: Tensor, lo: float, hi: float) -> Tensor:
        return p.clamp(lo, hi)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        p, ctx.lo, ctx.hi = inputs
        ctx.save_for_backward(p)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (p,), (g,) = ctx.saved_tensors, grads
        outward = ((p <= ctx.lo) & (g > 0)) | ((p >= ctx.hi) & (g < 0))
        return torch.where(outward, 0.0, g), None, None


def box(p: Tensor, lo: float, hi: float) -> Tensor:
    """p held in [lo, hi]; a plain clamp has no gradient outside, so a parameter pushed out would never come back."""
    return Box.apply(p, lo, hi)
