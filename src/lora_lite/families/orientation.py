"""Which output directions matter: left singular vectors of W M^(1/2) for a metric M on the inputs, without ever inverting M.

C = E[x x^T], G = E[(y - b)(y - b)^T] = W C W^T, K = E[(y - b) x^T] = W C; damping C + d I adds d W W^T to G and d W to K.

    plain  M = I    singular vectors of W
    sqrt   M = C    of W C^(1/2): eigenvectors of G, S their roots; the best r directions for E|(W - B) x|^2
    full   M = C^2  of W C = K, which is what CorDA prints

C is measured where a layer has i <= o, or shares its input with such a layer, and is held once there; G or K elsewhere.
"""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..calibration.enough import require_rank, resolved
from ..calibration.statistics import Stats
from ..mathematics.spectrum import congruent, gram, left_svd, top_eigenvectors

MOMENTS = {"sqrt": "x_moment|y_moment", "full": "x_moment|yx_moment"}


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
    U and S come in the dtype of W, without fewer digits than an SVD in it has; the decomposition is that of the shorter side.
    """
    if metric == "plain":
        return left_svd(W, r, smallest=smallest)
    *_, count, trace, moment = required(metric, call_norm)
    n, trace, M = (stats[name][path].to(W.device) for name in (count, trace, moment))
    o, i = W.shape
    delta = float(damp * trace / n / i)
    if metric == "full" and not smallest:
        # As precise as the products of the batches that the sums consist of. By a number: a float64 tensor would make torch
        # divide in float64, in two copies.
        M = M.to(W.dtype, copy=True).div_(float(n))
    else:
        M = M / n
    inputs = M.shape == (i, i)  # M is C; of a square layer always
    if inputs:
        M.diagonal().add_(delta)
    if metric == "full":
        U, S = left_svd(W.to(M) @ M if inputs else M.add_(W, alpha=delta), r, smallest=smallest)
        if not smallest:
            require_rank(rank_of(W, U, M, delta + float(trace / n) / i), path, r, "r directions")
        return U.to(W), S.to(W)
    if not smallest and o > i:
        U, S = left_svd(W @ root(stats, moment, path, M, delta).to(W), r)  # precise as above
        if S[-1] > 1e-6 * S[0]:
            require_rank(rank_of(W, U, M), path, r, "r directions")
            return U, S
    wide = W.double()
    if o <= i:
        U, S = rooted(congruent(wide, M) if inputs else M + delta * gram(W, M.dtype), r, smallest)
    else:
        Q = torch.linalg.qr(wide).Q  # stay in the column space of W: there is nothing beside it, but that too is orthogonal
        V, S = rooted(congruent(Q.T @ wide, M), r, smallest)
        U = Q @ V
    if not smallest:
        if not inputs:
            M = M + delta * gram(W, M.dtype)
        require_rank(rank_of(W, U, M), path, r, "r directions")
    return U.to(W), S.to(W)


def rank_of(W: Tensor, U: Tensor, M: Tensor, mean: float = 0.0) -> int:
    """How many columns of U (o, r) stand out from rounding in M: C (i, i), G (o, o), or K (o, i) with C_jj about `mean`."""
    U = U.to(M)
    P = (U.T @ W.to(M)).double()  # its squares may leave float32
    if M.shape == (W.shape[1], W.shape[1]):
        energy, noise = ((P.to(M) @ M) * P).sum(1), P.square() @ M.diagonal().double()
    elif M.shape == W.shape:
        energy, noise = ((U.T @ M) * P).sum(1), P.square().sum(1) * mean
    else:
        energy, noise = ((M @ U) * U).sum(0), U.square().T @ M.diagonal()
    return resolved(energy, noise, W.shape[1], W.dtype)


def rooted(G: Tensor, r: int, smallest: bool) -> tuple[Tensor, Tensor]:
    """The r leading (or smallest) eigenvectors of G (n, n) and the roots of their eigenvalues, descending."""
    if not smallest:
        U, values = top_eigenvectors(G, r)
    else:
        values, U = (part.flip(-1) for part in torch.linalg.eigh(G))
        U, values = U[:, len(G) - r :], values[len(G) - r :]
    return U, values.clamp(min=0).sqrt()


def root(stats: Stats, moment: str, path: str, C: Tensor, delta: float) -> Tensor:
    """R (i, i) with R R^T = C, which is stats[moment][path] over the count and damped; once for layers that share an input."""
    known = stats.setdefault("roots", WeakTensorKeyDictionary())  # type: ignore[attr-defined]
    key = stats[moment][path]
    if known.get(key, (None,))[0] != delta:
        values, Q = torch.linalg.eigh(C)
        known[key] = delta, Q * values.clamp(min=0).sqrt()
    return known[key][1]
