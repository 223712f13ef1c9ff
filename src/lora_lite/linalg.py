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
BLOCK = 128  # rows of a symmetric matrix that are worked on at a time
MOST_ROWS = 1024  # of a matrix that are copied at a time to another precision


# --- products ---------------------------------------------------------------------------------------------------------


def lin(z: Tensor, M: Tensor) -> Tensor:
    """z M^T on the last axis, in the dtype of z: (..., i), (o, i) -> (..., o)."""
    return F.linear(z, M.to(z.dtype))


def low_rank(x: Tensor, A: Tensor, B: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """B diag(scale) A x: (..., i), (r, i), (o, r) -> (..., o); scale is a number or broadcasts to (..., r)."""
    return lin((lin(x, A) * scale).to(x.dtype), B)


def add_lin(y: Tensor, z: Tensor, M: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """y + scale M z, the sum inside the product: (..., o), (..., r), (o, r); scale is a number or broadcasts to (..., r).

    Without a temporary of the size of y, and y bit for bit where M is 0.
    """
    if isinstance(scale, Tensor):
        z, scale = (z * scale).to(z.dtype), 1.0
    if y.dtype != z.dtype or torch.is_autocast_enabled(y.device.type):  # autocast would round y
        return y + scale * lin(z, M)
    Y, Z = y.reshape(-1, y.shape[-1]), z.reshape(-1, z.shape[-1])
    return torch.addmm(Y, Z, M.to(z.dtype).T, alpha=scale).reshape(y.shape)


def add_low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """y + B diag(scale) A x, as `low_rank` and `add_lin`."""
    return add_lin(y, lin(x, A), B, scale)


def stretched(y: Tensor, g: Tensor, bias: Tensor | None = None) -> Tensor:
    """y + g * (y - b) in one pass over y; g broadcasts to (..., o), and in bfloat16 keeps its digits beside the 1."""
    g = g.to(torch.promote_types(torch.promote_types(g.dtype, y.dtype), torch.float32))
    return y * (1 + g) if bias is None else torch.addcmul(-g * bias, y, 1 + g)


def is_finite(tensor: Tensor) -> bool:
    """Whether every number is: one pass, as a sum is finite only if all are; a sum that overflows is looked at again."""
    return math.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())


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

    Both go through the Gram matrix of the shorter side.

    exact  in float64, since a float32 Gram matrix fails on the outlier spectra of language models: of few directions by
           `leading_eigenpairs`, of many, or where that does not converge, by all eigenvectors. Smallest directions of
           ill-conditioned matrices go through a float64 SVD.
    fast   in the dtype of M, by `leading_eigenpairs` alone, accepted with its proof that U captures at least 1 - tol of
           the largest |U^T M|^2 there is, and where |M M^T u_k - s_k^2 u_k| <= s_k^2 sqrt(tol) / 2; else exact, with a warning.
    auto   fast where r is at most a sixteenth of a shorter side above 2048.
    Results come in the dtype of M.
    """
    shorter = min(M.shape)
    if not smallest and (method == "fast" or (method == "auto" and shorter > 2048 and r <= shorter // 16)):
        found = fast_left_svd(M, r, tol)
        if found is not None:
            return found
        warnings.warn(f"the fast SVD missed tol={tol}; the exact one was taken", LoraLiteWarning, stacklevel=2)
    return exact_left_svd(M, r, smallest)


def exact_left_svd(M: Tensor, r: int, smallest: bool) -> tuple[Tensor, Tensor]:
    wide = M.shape[0] <= M.shape[1]
    G = gram(M if wide else M.T, torch.float64)
    if not smallest:
        return from_eigenvectors(M, *top_eigenvectors(G, r))
    values, vectors = torch.linalg.eigh(G)
    if values[0] < 1e-12 * values[-1]:  # singular values below 1e-6 of the largest: lost in a Gram matrix
        U, S, _ = torch.linalg.svd(M.double(), full_matrices=False)
        return U[:, -r:].to(M.dtype), S[-r:].to(M.dtype)
    return from_eigenvectors(M, vectors[:, :r].flip(1), values[:r].flip(0))


def fast_left_svd(M: Tensor, r: int, tol: float) -> tuple[Tensor, Tensor] | None:
    """What `left_svd` calls fast, None where it cannot be had. In float64 where values are too far apart for the dtype of M."""
    for dtype in (M.dtype, torch.float64):
        G = gram(M if M.shape[0] <= M.shape[1] else M.T, dtype)
        found = leading_eigenpairs(G, r, tol, residual=tol**0.5 / 2)
        rounding = len(G) ** 0.5 * torch.finfo(dtype).eps
        if found is not None and (dtype == torch.float64 or rounding * found[1][0] <= tol * found[1][-1]):
            return from_eigenvectors(M, *found)
    return None


def from_eigenvectors(M: Tensor, V: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """U (o, r) and S (r,) of M (o, i) from eigenvectors V of the Gram matrix of its shorter side, and their eigenvalues."""
    if M.shape[0] <= M.shape[1]:
        return V.to(M.dtype), values.clamp(min=0).sqrt().to(M.dtype)
    # M v / s loses orthogonality where s is small; QR restores it.
    Q, R = torch.linalg.qr(torch.cat([rows.to(V.dtype) @ V for rows in M.split(MOST_ROWS)]))
    return (Q * torch.where(R.diagonal() < 0, -1.0, 1.0)).to(M.dtype), R.diagonal().abs().to(M.dtype)


def gram(M: Tensor, dtype: torch.dtype) -> Tensor:
    """M M^T (n, n) of M (n, m), in `dtype` without a whole copy of M."""
    G = torch.zeros(len(M), len(M), dtype=dtype, device=M.device)
    for columns in M.split(MOST_ROWS, dim=1):
        add_upper(G, columns.to(dtype))
    for k in range(BLOCK, len(G), BLOCK):
        G[k:, k - BLOCK : k] = G[k - BLOCK : k, k:].T
    return G


def add_upper(G: Tensor, M: Tensor, factor: float = 1.0) -> None:
    """G += factor M M^T on the blocks on and above the diagonal, which are little more than half of the work."""
    for k in range(0, len(G), BLOCK):
        G[k : k + BLOCK, k:].addmm_(M[k : k + BLOCK], M[k:].T, alpha=factor)


def top_eigenvectors(G: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """(vectors (n, r), values (r,)) of a symmetric matrix in float64, descending: few of a large one by
    `leading_eigenpairs` down to a residual of 1e-7, which is what float32 resolves, else all by `torch.linalg.eigh`.
    """
    G = G.double()
    found = leading_eigenpairs(G, r, tol=1e-6, residual=1e-7) if len(G) >= 768 and 48 * r <= len(G) else None
    if found is None:
        values, vectors = torch.linalg.eigh(G)
        found = vectors.flip(1)[:, :r], values.flip(0)[:r]
    return found


def leading_eigenpairs(G: Tensor, r: int, tol: float, residual: float) -> tuple[Tensor, Tensor] | None:
    """(V (n, r), values (r,)), descending, of a symmetric G (n, n), with proof; None where half the space does not suffice.

    Block Lanczos with full orthogonalization from a fixed random start, until |G v_k - q_k v_k| <= residual q_k for all k;
    then `nearly_all` must prove that sum q_k is at least 1 / (1 + tol) of the largest possible sum, whatever the start missed.
    """
    n, b = len(G), max(8, r // 2)
    most = max(n // 2, 3 * b)
    if most + b > n:
        return None
    Q, T = G.new_empty(most + b, n), G.new_zeros(most + b, most + b)  # vectors are rows: products are fastest so
    start = torch.randn(n, b, generator=torch.Generator().manual_seed(0), device="cpu").to(G)
    Q[:b] = torch.linalg.qr(start).Q.T
    check, earlier = 3 * b, (0, 1.0)
    for j in range(b, most + 1, b):
        known, last = Q[:j], slice(j - b, j)
        Z = Q[last] @ G
        T[last, :j] = H = Z @ known.T
        T[:j, last] = H.T
        step, R = torch.linalg.qr((Z - H @ known).T)
        # Once more, against rounding and where Z has no full rank.
        following, S = torch.linalg.qr((step.T - step.T @ known.T @ known).T)
        Q[j : j + b] = following.T
        if j < check:
            continue
        values, vectors = torch.linalg.eigh(T[:j, :j])
        q, Y = values[-r:].flip(0), vectors[:, -r:].flip(1)
        reached = float(((S @ R @ Y[last]).norm(dim=0) / q).max())
        if reached <= residual:
            V = (Y.T @ known).T
            if nearly_all(G, V, q, tol):
                return V, q
            residual = reached / 2
        # Looking costs j^3: the rate so far tells when it may be enough.
        rate = math.log(earlier[1] / reached) / (j - earlier[0]) if 0 < reached < earlier[1] else 0.0
        check = j + min(math.log(max(reached / residual, 1)) / rate, j / 4) if rate else 1.25 * j
        earlier = (j, reached)
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
    B = (V * (most - t).clamp(min=0)) @ V.T - G
    B.diagonal().add_(t)
    return positive_definite(B)


def positive_definite(A: Tensor) -> bool:
    """Whether a symmetric A (n, n) has a Cholesky factor; overwrites A. torch's own is slower by the copies it makes."""
    while len(A):
        block, A, right = A[:BLOCK, :BLOCK], A[BLOCK:, BLOCK:], A[:BLOCK, BLOCK:]
        L, info = torch.linalg.cholesky_ex(block)
        if info:
            return False
        add_upper(A, torch.linalg.solve_triangular(L, right, upper=False).T, -1.0)
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
    """Orthonormal columns spanning those of V (o, k), in float32 or better."""
    V = V.to(torch.promote_types(V.dtype, torch.float32))
    if V.shape[1] == 1:
        return V / V.norm(dim=0).clamp(min=1e-12)
    return torch.linalg.qr(V).Q


# --- rotations and reflections ----------------------------------------------------------------------------------------


def skew(q: Tensor, b: int) -> Tensor:
    """Skew matrices (n, b, b) with q (n, b(b-1)/2) above the diagonal, row by row, and -q below."""
    if b == 1:
        return q.new_zeros(len(q), 1, 1)
    k = torch.arange(b, device=q.device)
    low, high = torch.minimum(k[:, None], k), torch.maximum(k[:, None], k)
    place = (low * (2 * b - low - 1) // 2 + high - low - 1).clamp(min=0)  # on the diagonal any, it meets a sign of 0
    return q.index_select(1, place.flatten()).view(-1, b, b) * (k - k[:, None]).sign()


class Cayley(torch.autograd.Function):
    """N = (I - X)^-1 2 X for any X (n, b, b), whose gradient 2 J^T g J^T, J = (I - X)^-1 = I + N/2, needs no second solve."""

    generate_vmap_rule = True

    @staticmethod
    def forward(X: Tensor) -> Tensor:
        return torch.linalg.solve_ex(torch.eye(X.shape[-1], dtype=X.dtype, device=X.device) - X, 2 * X)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (N,), (g,) = ctx.saved_tensors, grads
        with torch.autocast(g.device.type, enabled=False):
            left = torch.baddbmm(g, N.mT, g, alpha=0.5)
            return torch.baddbmm(left, left, N.mT, beta=2)


def cayley_shift(X: Tensor) -> Tensor:
    """R - I for R = (I - X)^-1 (I + X), X (n, b, b) skew: exactly 0 at X = 0, precise for small rotations."""
    X = X.to(torch.promote_types(X.dtype, torch.float32))
    # The solve has a gradient of its own, with two more solves; without gradients applying a Function costs 20% of it.
    return Cayley.apply(X) if X.requires_grad and torch.is_grad_enabled() else Cayley.forward(X)


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
