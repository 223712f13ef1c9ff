"""The formulas of objectives and geometry as pure functions of rows X (n, D) or attention maps P (B, H, T, T).

X are the hidden rows of valid tokens in batch-major order. Everything is differentiable and computed in the dtype given.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Num
from torch import Tensor

TINY = 1e-12  # norms below count as this


def unit(X: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
    """v = x / max(|x|, TINY), row by row."""
    return F.normalize(X, dim=-1, eps=TINY)


def off_diagonal_mean(M: Float[Tensor, "... n n"]) -> Float[Tensor, "..."]:
    """Mean over the ordered pairs i != j; 0 for n < 2."""
    n = M.shape[-1]
    return (M.sum((-2, -1)) - M.diagonal(dim1=-2, dim2=-1).sum(-1)) / max(n * (n - 1), 1)


def repulsion(X: Float[Tensor, "n D"]) -> Float[Tensor, ""]:
    """Mean over ordered pairs i != j of exp(-|v_i - v_j|^2), in [e^-4, 1]; 0 for fewer than two rows. Zero rows are equal."""
    v = unit(X)
    square = v.square().sum(-1)
    return off_diagonal_mean((-(square[:, None] + square - 2 * v @ v.T).clamp_min(0)).exp())


def l1(X: Float[Tensor, "n D"]) -> Float[Tensor, ""]:
    """Mean of |X|; 0 without rows."""
    return X.abs().sum() / max(X.numel(), 1)


def excess(X: Float[Tensor, "n D"], tau: float) -> Float[Tensor, "n n"]:
    """max(0, cos(x_i, x_j) - tau)^2, what each pair pays for gossiping."""
    v = unit(X)
    return (v @ v.T - tau).clamp_min(0).square()


def gossip(X: Float[Tensor, "n D"], peers: Int[Tensor, "n k"], tau: float) -> Float[Tensor, ""]:
    """Mean over the n k pairs (i, p) of max(0, cos(x_i, x_p) - tau)^2; the gradient reaches both members of a pair."""
    return excess(X, tau).gather(1, peers).mean() if len(X) > 1 else X.sum() * 0


def expected_gossip(X: Float[Tensor, "n D"], tau: float, draw: str = "uniform") -> Float[Tensor, ""]:
    """The expectation of `gossip` over its peers, exactly; 0 for fewer than two rows."""
    E, n = excess(X, tau), len(X)
    if draw == "uniform" or n < 2:
        return off_diagonal_mean(E)
    following = E.gather(1, (torch.arange(n, device=X.device)[:, None] + 1) % n)  # takes the place of a drawn self
    return (E.sum() - E.diagonal().sum() + following.sum()) / (n * n)


def uniform_peers(n: int, k: int, generator: torch.Generator) -> Int[Tensor, "n k"]:
    """k peers for each of n >= 2 rows, uniform over the other rows."""
    r = torch.randint(0, n - 1, (n, k), generator=generator)
    return r + (r >= torch.arange(n)[:, None])


def ring_peers(n: int, k: int, generator: torch.Generator) -> Int[Tensor, "n k"]:
    """k peers for each of n >= 2 rows, uniform over all rows; a row that draws itself takes the next one instead.

    The next row then has probability 2/n, which favours neighbouring tokens.
    """
    i = torch.arange(n)[:, None]
    p = torch.randint(0, n, (n, k), generator=generator)
    return torch.where(p == i, (i + 1) % n, p)


def subset(n: int, most: int, generator: torch.Generator) -> Int[Tensor, " m"]:
    """All of n rows in order, or `most` of them, drawn and in order."""
    return torch.arange(n) if n <= most else torch.randperm(n, generator=generator)[:most].sort().values


def head_similarity(P: Float[Tensor, "B H T T"], mask: Num[Tensor, "B T"]) -> Float[Tensor, " N"]:
    """Mean over ordered head pairs i != j of cos(vec P_i, vec P_j), in [0, 1], of each of the N sequences with a valid token.

    Rows of masked queries and columns of masked keys count as 0. With a single head it is 0.
    """
    valid = mask.bool()
    used = valid.any(1)
    keep = (valid[:, :, None] & valid[:, None, :])[used, None]
    v = unit(P[used].where(keep, 0).flatten(2))
    return off_diagonal_mean(v @ v.mT)
