"""Principal directions of a layer's inputs: leading eigenvectors of C = E[x x^T] - E[x] E[x]^T, from streamed sums.

For wide layers the sums hold a sketch C Omega with a fixed Omega, and `spectrum.nystrom` takes from it what one pass can give.
"""

import math
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..calibration.enough import require_rank, require_tokens, resolved
from ..calibration.statistics import Stats, sketch_matrix
from ..mathematics.spectrum import nystrom, top_eigenvectors


def required(most: float, whole: int, labels: bool = False) -> tuple[str, ...]:
    """Names of the sums that `principal` reads, for a variant's `needs`.

    most    directions that will be asked for; whole: inputs up to which C is kept, a sketch of 4 times `most` beyond
    labels  over tokens whose label is not -100
    """
    at = "/labels" if labels else ""
    return f"n{at}", f"x_tr{at}", f"x_sum{at}", f"x_sketch[{4 * math.ceil(most)},{whole}]{at}"


def principal(names: tuple[str, ...], stats: Stats, path: str, count: int, center: bool = True) -> tuple[Tensor, Tensor]:
    """V (i, count) with orthonormal columns and the shares (count,) of tr C that they explain, descending, in float64.

    names   what `required` gave
    center  False: C = E[x x^T]
    What was decomposed stays beside the sums: for layers that share an input, and for `group_init` after `ranks`.
    Shares of a sketch are lower bounds, far ones where the variances hardly fall; from the rank of the data on they are 0.
    Raises LoraLiteError for fewer tokens than directions.
    """
    n = require_tokens(stats, path, count, f"{count} principal directions", names[0])
    trace, total, S = (stats[name][path] for name in names[1:])
    known = stats.setdefault("principal", WeakTensorKeyDictionary())  # type: ignore[attr-defined]
    if S not in known or len(known[S][1]) < count:
        mean = total / n if center else torch.zeros_like(total)
        if S.shape[0] == S.shape[1]:
            V, values = top_eigenvectors(S / n - torch.outer(mean, mean), count)
            noise, width = V.square().T @ S.diagonal() / n, len(S)
        else:
            Omega = sketch_matrix(*S.shape, 0).to(S)
            V, values = nystrom(S / n - torch.outer(mean, mean @ Omega), Omega)
            noise, width = (trace / n / len(S)).expand(len(values)), (4 * len(S)) ** 2  # rounding of a sketch comes back larger
        standing = resolved(values, noise, width) if trace > 0 else 0  # squares of tiny inputs are 0 in float32
        values = torch.where(torch.arange(len(values), device=S.device) < standing, values, 0.0)
        variance = float(trace / n - mean @ mean)
        floor = 1e-6 * float(trace / n) or 1.0  # a constant input has no variance beyond the rounding of its sums
        known[S] = V[:, :count].clone(), values[:count].clamp(min=0) / max(variance, floor)
    V, shares = known[S]
    return V[:, :count], shares[:count]


def directions(names: tuple[str, ...], stats: Stats, path: str, count: int, center: bool = True) -> tuple[Tensor, Tensor]:
    """`principal`. Raises LoraLiteError where fewer than `count` of them are more than rounding."""
    V, shares = principal(names, stats, path, count, center)
    require_rank(int((shares > 0).sum()), path, count, "its principal directions")
    return V, shares


def dealt(shares: Mapping[str, Tensor], each: int) -> dict[str, int]:
    """`allotted` of `each` times as many ranks as paths. Raises LoraLiteError where too few shares are more than rounding."""
    standing, total = {path: q[q > 0] for path, q in shares.items()}, each * len(shares)
    if sum(map(len, standing.values())) < total:
        for path, q in standing.items():
            require_rank(len(q), path, each, "r principal directions")
    return allotted(standing, total)


def allotted(shares: Mapping[str, Tensor], total: int) -> dict[str, int]:
    """{path: how many of its shares are among the `total` largest of all}; of equal ones the leading, then the earlier path."""
    order = {path: place for place, path in enumerate(shares)}
    ranked = sorted((-share, k, order[path], path) for path, q in shares.items() for k, share in enumerate(q.tolist()))
    kept = Counter(path for *_, path in ranked[:total])
    return {path: kept[path] for path in shares}
