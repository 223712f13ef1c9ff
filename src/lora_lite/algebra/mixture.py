"""Weighted sums of weight changes, layer by layer: exact, or the best approximation of a given rank."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..contract.attachment import Lineage
from ..contract.pattern import exactly
from ..core.delta import Change, change, smaller_as_factors
from ..mathematics.spectrum import left_svd
from ..sites.layer import Layer, sizes
from .composed import Composed, ComposedConfig
from .snapshot import Snapshot, rebuilt

Members = dict[Snapshot, dict[str, float]]
"""{snapshot: {path: weight}}, increments resolved into the snapshots at their ends."""
Mix = Callable[[str, list[tuple[float, Change]]], Change]
"""(path, [(weight, change)]) -> their mixture on that layer."""


def linear(path: str, parts: list[tuple[float, Change]]) -> Change:
    """sum_i c_i dW_i: factors side by side, or one dense matrix where a member has none."""
    bias = torch.stack([c * part.bias for c, part in parts]).sum(0)
    rights = [part.right for _, part in parts if part.right is not None]
    if len(rights) == len(parts):
        return Change(torch.cat([c * part.left for c, part in parts], dim=1), torch.cat(rights), bias)
    return Change(functools.reduce(torch.add, (c * part.dense() for c, part in parts)), None, bias)


@torch.no_grad()
def mixed(members: Members, mix: Mix, rank: int | None) -> Snapshot:
    """The mixture on every layer that a member changes, one layer in float64 at a time, as a Composed snapshot."""
    adapters = {member: rebuilt(member) for member in members}
    layers = {path: layer for member in members for path, layer in member.layers.items()}
    dtype = widest(members)
    ranks, tensors, report = {}, {}, {}
    for path, layer in layers.items():
        parts = [
            (at[path], change(layer, adapters[member][path])) for member, at in members.items() if at.get(path, 0.0) != 0.0
        ]
        total, lost = truncated(mix(path, parts) if parts else nothing(layer), rank)
        if rank is not None:
            report[path] = {"truncation": lost}
        ranks[path], stored = declared(total)
        tensors |= {f"{path}.{key}": tensor.to(dtype).contiguous() for key, tensor in stored.items()}
    biased = any(tensors[f"{path}.b"].any() for path in layers)
    if not biased:
        tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith(".b")}
    largest = max(ranks.values())
    cfg = ComposedConfig(
        r=largest,
        targets=tuple(exactly(path) for path in layers),
        exclude=(),
        rank_pattern={exactly(path): k for path, k in ranks.items() if k != largest},
        dtype=dtype,
        buffer_dtype=dtype,
        bias=biased,
    )
    base = {path: print_ for member in members for path, print_ in member.base.items()}
    return Snapshot("composed", Composed, cfg, tensors, layers, base, Lineage(), report)


def widest(members: Members) -> torch.dtype:
    """The members' widest dtype, float32 or better."""
    return functools.reduce(torch.promote_types, (member.config.dtype for member in members), torch.float32)


def nothing(layer: Layer) -> Change:
    d_in, d_out = sizes(layer)
    zero = torch.zeros(d_out + d_in, dtype=torch.float64, device=layer.weight.device)
    return Change(zero[:d_out, None], zero[None, d_out:], zero[:d_out])


def truncated(total: Change, rank: int | None) -> tuple[Change, float]:
    """The best approximation of at most that rank, and |lost| / |whole| in the Frobenius norm.

    Factors: QR of both, then the singular values of the small product of the triangles (Eckart-Young on B A).
    """
    left, right, bias = total
    if rank is None or rank >= min(left.shape if right is None else (len(right), *left.shape, right.shape[1])):
        return total, 0.0
    if right is None:
        U, _ = left_svd(left, rank)
        rest, whole = left - U @ (U.T @ left), left.norm()
        return Change(U, U.T @ left, bias), float(rest.norm() / whole) if whole else 0.0
    (Qb, Rb), (Qa, Ra) = torch.linalg.qr(left), torch.linalg.qr(right.T)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.T)
    root, whole = S[:rank].sqrt(), S.norm()
    kept = Change(Qb @ U[:, :rank] * root, (root[:, None] * Vh[:rank]) @ Qa.T, bias)
    return kept, float(S[rank:].norm() / whole) if whole else 0.0


def declared(total: Change) -> tuple[int, dict[str, Tensor]]:
    """(rank, tensors) in the form that Composed declares for that rank: the smaller of factors and dense matrix."""
    left, right, bias = total
    d_out, d_in = len(left), (left if right is None else right).shape[1]
    k = min(d_out, d_in) if right is None else len(right)
    if right is None or not smaller_as_factors(k, d_out, d_in):
        return min(k, d_out, d_in), {"D": total.dense(), "b": bias}
    if k == 0:
        left, right = left.new_zeros(d_out, 1), right.new_zeros(1, d_in)
    return max(k, 1), {"A": right, "B": left, "b": bias}
