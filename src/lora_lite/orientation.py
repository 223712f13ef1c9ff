"""Which output directions matter: left singular vectors of W M^(1/2) for a metric M on the inputs, without ever inverting M.

C = E[x x^T], G = E[(y - b)(y - b)^T] = W C W^T, K = E[(y - b) x^T] = W C; damping C + d I adds d W W^T to G and d W to K.

    plain  M = I    singular vectors of W
    sqrt   M = C    of W C^(1/2): eigenvectors of G, S their roots; the best r directions for E|(W - B) x|^2
    full   M = C^2  of W C = K, which is what CorDA prints
"""

import torch
from torch import Tensor

from .calibrate import Stats
from .linalg import left_svd, top_eigenvectors

MOMENTS = {"sqrt": "y_moment", "full": "yx_moment"}


def required(metric: str, call_norm: bool = False) -> tuple[str, ...]:
    """Names of the statistics that `oriented_left_svd` reads, for a variant's `needs`."""
    if metric == "plain":
        return ()
    moment = MOMENTS[metric]
    return ("n", "calls", "x_tr/call", f"{moment}/call") if call_norm else ("n", "x_tr", moment)


def oriented_left_svd(
    metric: str,
    stats: Stats,
    path: str,
    W: Tensor,
    r: int,
    damp: float = 0.0,
    smallest: bool = False,
    call_norm: bool = False,
) -> tuple[Tensor, Tensor]:
    """The r leading (or smallest) left singular vectors of W M^(1/2): U (o, r) orthonormal, S (r,) descending, on W's device.

    W          (o, i), r at most its shorter side; where W has full rank, U lies in its column space
    damp       d = damp tr(C) / i
    call_norm  every call's activations divided by |max x|, the mean taken over calls instead of tokens
    """
    if metric == "plain":
        return left_svd(W, r, smallest=smallest)
    *_, count, trace, moment = required(metric, call_norm)
    n, trace, M = (stats[name][path].to(W.device) for name in (count, trace, moment))
    W, M, delta = W.double(), M / n, damp * trace / n / W.shape[1]
    if metric == "full":
        return left_svd(M + delta * W, r, smallest=smallest)
    Q = None
    if W.shape[0] > W.shape[1]:  # stay in its column space: the zeros that the rest adds to G would be the smallest
        Q = torch.linalg.qr(W).Q
        W, M = Q.T @ W, Q.T @ M @ Q
    V, values = top_eigenvectors(M + delta * W @ W.T, len(W))
    kept = slice(len(W) - r, None) if smallest else slice(r)
    U = V[:, kept] if Q is None else Q @ V[:, kept]
    return U, values[kept].clamp(min=0).sqrt()
