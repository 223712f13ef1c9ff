"""Orthogonal maps: Cayley transforms of skew blocks, block products, Householder reflections. Letters as in maps.py."""

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from .maps import unit

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


def softened(X: Tensor, max_angle: float | None) -> Tensor:
    """X with every entry e as t tanh(e / t), t = tan(max_angle / 2): no plane alone turns by max_angle (radians) or more.

    A block of several planes can: its eigen-angles are up to 2 arctan((b - 1) t).
    """
    if max_angle is None:
        return X
    X = X.to(torch.promote_types(X.dtype, torch.float32))
    t = math.tan(max_angle / 2)
    return t * (X / t).tanh()


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
    v = unit(V, 1, 1e-12)
    u, d = v[0::2], v[1::2] - v[0::2]
    P = rearrange([u, d], "two pairs i -> (pairs two) i")
    e = d.square().sum(1) / 2
    half = torch.full_like(e, 0.5)
    own = rearrange([half, 0.5 - e, -half, e], "(a b) pairs -> a b pairs", a=2)
    pair = torch.arange(len(P), device=V.device) // 2
    with torch.autocast(V.device.type, enabled=False):  # a Gram matrix in bfloat16 costs orthogonality
        K = torch.where(pair[:, None] < pair, P @ P.T, 0.0) + rearrange(torch.diag_embed(own), "a b p q -> (p a) (q b)")
    return P, torch.linalg.inv(K)
