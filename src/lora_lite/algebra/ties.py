"""Merges that look at single numbers of the weight changes: TIES and DARE, for any linear variants.

TIES  Yadav et al. 2023, arXiv:2306.01708, sec. 3:  trim, elect a sign, merge what agrees with it
DARE  Yu et al. 2023, arXiv:2311.03099, eq. 1-2:    drop at random, rescale the rest
Both leave no low rank: results are dense unless `rank` is given. Numbers are trimmed within each layer, as in PEFT and
mergekit, not over all layers together.
"""

import torch
from torch import Tensor

from ..contract.spec import seeded
from ..core.delta import Change
from ..errors import LoraLiteError
from .compose import Weights, resolved
from .mixture import mixed
from .snapshot import Snapshot


@torch.inference_mode(False)  # what it makes outlives the caller's inference mode
def ties(weights: Weights, *, density: float = 0.2, rank: int | None = None) -> Snapshot:
    """The TIES merge of snapshots {a: c_a, b: c_b, ...}; equal weights are the paper's lambda. A snapshot for `apply`.

    With t_i = c_i trim(dW_i), the largest `density` of its numbers by magnitude, and on each number g = sign(sum_i t_i):
    dW = mean of the t_i whose sign is g.  The bias change is merged in the same way.
    rank: as in `compose`. Raises LoraLiteError for a density outside (0, 1] and as `compose` does.
    """
    if not 0 < density <= 1:
        raise LoraLiteError(f"density={density}", expected="The share of numbers to keep, in (0, 1].", fix="density=0.2")

    def mix(path: str, parts: list[tuple[float, Change]]) -> Change:
        def merged(tensors: list[Tensor]) -> Tensor:
            return elected([c * trimmed(t, density) for (c, _), t in zip(parts, tensors)])

        return Change(merged([p.dense() for _, p in parts]), None, merged([p.bias for _, p in parts]))

    return mixed(resolved(weights), mix, rank)


def trimmed(t: Tensor, density: float) -> Tensor:
    """t with all but its `density` largest numbers by magnitude set to 0."""
    dropped = t.numel() - max(1, round(density * t.numel()))
    return t if dropped == 0 else torch.where(t.abs() > t.abs().flatten().kthvalue(dropped).values, t, 0.0)


def elected(tensors: list[Tensor]) -> Tensor:
    """On each number: the mean of those whose sign is that of the sum."""
    t = torch.stack(tensors)
    agree = (t.sign() == t.sum(0).sign()) & (t != 0)
    return torch.where(agree, t, 0.0).sum(0) / agree.sum(0).clamp(min=1)


@torch.inference_mode(False)  # what it makes outlives the caller's inference mode
def dare(weights: Weights, *, drop: float = 0.9, seed: int = 0, rank: int | None = None) -> Snapshot:
    """The DARE merge of snapshots {a: c_a, b: c_b, ...}: a snapshot for `apply`.

    dW = sum_i c_i (1 - m_i) * dW_i / (1 - drop), every number of m_i being 1 with probability `drop`; the same for the bias
    change. `ties({dare({a: 1.0}): 1.0, dare({b: 1.0}, seed=1): 1.0})` is DARE with TIES.
    seed: masks depend on it, the place of the member and the layer's path. rank: as in `compose`.
    Raises LoraLiteError for a probability outside [0, 1) and as `compose` does.
    """
    if not 0 <= drop < 1:
        raise LoraLiteError(f"drop={drop}", expected="A probability in [0, 1).", fix="drop=0.9")

    def mix(path: str, parts: list[tuple[float, Change]]) -> Change:
        def merged(tensors: list[Tensor]) -> Tensor:
            return sum((c * thinned(t, drop) for (c, _), t in zip(parts, tensors)), torch.zeros_like(tensors[0]))

        with seeded(seed, path, "dare"):
            return Change(merged([p.dense() for _, p in parts]), None, merged([p.bias for _, p in parts]))

    return mixed(resolved(weights), mix, rank)


def thinned(t: Tensor, drop: float) -> Tensor:
    """t with numbers set to 0 with probability `drop` and the others divided by 1 - drop, so that its mean stays."""
    kept = torch.rand(t.shape, device="cpu").to(t.device) >= drop
    return torch.where(kept, t / (1 - drop), 0.0)
