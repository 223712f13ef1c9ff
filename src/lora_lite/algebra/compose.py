"""compose: a weighted sum of snapshots as one new adapter, in the space of weight changes or of factors."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

import torch

from ..contract.adapter import Adapter
from ..contract.attachment import Lineage
from ..contract.config import AdapterConfig
from ..contract.pattern import exactly
from ..core.gains import gains
from ..errors import LoraLiteError, some
from .ensemble import Ensemble, EnsembleConfig
from .mixture import Members, linear, mixed, widest
from .routes import absolute, parse_route
from .snapshot import Increment, Snapshot, copied, rebuilt

Gain = float | Mapping[str, float]
Weights = Mapping[Snapshot | Increment, Gain]


@torch.inference_mode(False)  # what it makes outlives the caller's inference mode
def compose(
    weights: Weights | str,
    *,
    space: Literal["delta", "factor", "output"] = "delta",
    rank: int | None = None,
    chain: Mapping[str, Snapshot] | None = None,
) -> Snapshot:
    """sum_i c_i dW_i and sum_i c_i db_i of snapshots {a: c_a, b - a: c_b, ...}, as a snapshot for `apply`.

    weights  a number for each snapshot or increment, or gains by module pattern (core/gains.py); or a route such as
             'A+0.9B+0.4C', with chain={"A": a, "B": b, "C": c} in the order of training
    space    delta   changes at coefficient 1, of any linear variants; low-rank ones side by side, B = [c_1 B_1 | c_2 B_2 ...],
                     A = [A_1; A_2; ...], exact; others as a dense matrix
             factor  the tensors themselves, sum_i c_i theta_i with sum_i c_i = 1, of snapshots of one lineage
             output  y + sum_i c_i (f_i(x, y) - y) of any variants, also those that are not linear maps: every member runs
    rank     delta only: the best approximation of at most this rank, its relative error in `report[path]["truncation"]`

    A single snapshot with weight 1 is returned as a copy. Raises LoraLiteError for members on different bases or of other
    shapes, variants that are not linear maps, other lineages in factor space, and patterns that fit nothing.
    """
    if space not in ("delta", "factor", "output"):
        raise LoraLiteError(
            f"There is no space {space!r}.", expected="'delta', 'factor' or 'output'.", fix="ll.compose(weights)"
        )
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1 or space != "delta"):
        raise LoraLiteError(
            f"rank={rank!r} in {space} space.", expected="A number of at least 1, in delta space.", fix="rank=8"
        )
    if not isinstance(weights, (str, Mapping)):
        raise LoraLiteError(
            f"compose takes weights by snapshot, not a {type(weights).__name__}.",
            expected="A mapping, or a route with its chain.",
            fix="ll.compose({a: 1.0, b: 0.5})",
        )
    members = resolved(on_chain(weights, chain))
    used = [member for member, at in members.items() if any(at.values())]
    if rank is None and len(used) == 1 and all(weight == 1 for weight in members[used[0]].values()):
        return dataclasses.replace(used[0], tensors=copied(used[0].tensors))
    if space == "delta":
        return mixed(members, linear, rank)
    return in_factor_space(members) if space == "factor" else on_outputs(members)


def on_chain(weights: Weights | str, chain: Mapping[str, Snapshot] | None) -> Weights:
    """The weights that a route gives the snapshots of a chain."""
    if isinstance(weights, str) != bool(chain):
        raise LoraLiteError(
            "A route and a chain belong together.",
            expected="The snapshots by name, in the order of training.",
            fix='ll.compose("A+0.9B", chain={"A": a, "B": b})',
        )
    if not isinstance(weights, str) or not chain:
        return weights  # type: ignore[return-value]
    lineages = {member.lineage.id for member in chain.values() if isinstance(member, Snapshot)}
    steps = [member.lineage.step for member in chain.values() if isinstance(member, Snapshot)]
    if len(lineages) == 1 and steps != sorted(steps):
        raise LoraLiteError(
            f"The chain {list(chain)} is out of order.",
            expected="Snapshots in the order they were taken.",
            found=f"Steps: {steps}.",
        )
    phases = list(chain)
    return {chain[name]: weight for name, weight in absolute(parse_route(weights, phases), phases).items()}


def resolved(weights: Weights) -> Members:
    """Weights by snapshot and layer. Raises LoraLiteError for what is no snapshot, no weight, or no common base."""
    members: Members = {}
    for key, gain in weights.items():
        if isinstance(key, Snapshot):
            ends = [(key, 1.0)]
        elif isinstance(key, Increment):
            ends = [(key.end, 1.0), (key.start, -1.0)]
        else:
            raise LoraLiteError(
                f"{key!r} is no snapshot.", expected="Snapshots or differences of two.", fix="a = ll.snapshot(model, name)"
            )
        patterns = gain if isinstance(gain, Mapping) else {"*": gain}
        of_path = gains(patterns, (path for end, _ in ends for path in end.layers))
        for end, sign in ends:
            at = members.setdefault(end, dict.fromkeys(end.layers, 0.0))
            for path in at:
                at[path] += sign * of_path[path]
    if not members:
        raise LoraLiteError("There is nothing to compose.", fix="ll.compose({ll.snapshot(model): 1.0})")
    refuse_other_bases(list(members))
    return members


def refuse_other_bases(members: list[Snapshot]) -> None:
    seen: dict[str, tuple[Snapshot, Any]] = {}
    for member in members:
        for path, base in member.base.items():
            first, expected = seen.setdefault(path, (member, base))
            if base != expected:
                shapes = base["shape"] != expected["shape"]
                raise LoraLiteError(
                    f"{first} and {member} belong to different bases.",
                    expected="Changes of the same weights.",
                    found=f"{path} differs in "
                    + (f"shape: {expected['shape']}, {base['shape']}." if shapes else "its numbers."),
                    fix="ll.snapshot(model)  # both from one base",
                )


# --- factor space -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def in_factor_space(members: Members) -> Snapshot:
    """theta = sum_i c_i theta_i on every trained tensor; what is frozen must be equal."""
    first, *others = members
    for member in others:
        if member.lineage.id != first.lineage.id or member.config != first.config or list(member.layers) != list(first.layers):
            raise LoraLiteError(
                f"{first} and {member} are no phases of one training.",
                expected="Factors of different trainings are written in different coordinates; their sum means nothing.",
                fix='ll.compose(weights, space="delta")',
            )
    for path in first.layers:
        total = sum(at[path] for at in members.values())
        if abs(total - 1) > 1e-6:
            raise LoraLiteError(
                f"The weights at {path} add up to {total:g}.",
                expected="In factor space they add up to 1, as in a + 0.9 (b - a).",
                fix='ll.compose({a: 1.0, b - a: 0.9}, space="factor")',
            )
    adapters = rebuilt(first)
    trained = {f"{path}.{name}": path for path, adapter in adapters.items() for name, _ in adapter.named_parameters()}
    for member in others:
        refuse_turned(first, member, adapters)
        if odd := [
            key for key in first.tensors if key not in trained and not torch.equal(first.tensors[key], member.tensors[key])
        ]:
            raise LoraLiteError(
                f"{first} and {member} differ in frozen tensors: {some(odd)}.",
                expected="Phases of one training share what is not trained.",
                fix='ll.compose(weights, space="delta")',
            )
    tensors = copied(first.tensors)
    for key, path in trained.items():
        total = sum(at[path] * member.tensors[key].double() for member, at in members.items())
        tensors[key] = total.to(tensors[key].dtype)  # type: ignore[union-attr]
    last = max(member.lineage.step for member in members)
    return dataclasses.replace(first, name="composed", tensors=tensors, lineage=Lineage(first.lineage.id, last + 1), report={})


def refuse_turned(first: Snapshot, member: Snapshot, adapters: dict[str, Adapter]) -> None:
    """Raise where all factors of a layer point against the first member's: (A, B) -> (-A, -B) is the same change of weight."""
    for path, adapter in adapters.items():
        keys = [f"{path}.{name}" for name, _ in adapter.named_parameters()]
        cosines = [
            torch.cosine_similarity(*(s.tensors[key].double().flatten() for s in (first, member)), dim=0) for key in keys
        ]
        if len(keys) > 1 and all(cosine < -0.5 for cosine in cosines):
            raise LoraLiteError(
                f"At {path} every factor of {member} points against that of {first}.",
                expected="Phases of one training, whose factors continue one another.",
                fix='ll.compose(weights, space="delta")',
            )


# --- output space -----------------------------------------------------------------------------------------------------


def on_outputs(members: Members) -> Snapshot:
    """The members themselves, side by side, as an Ensemble snapshot."""
    adapters = {member: rebuilt(member) for member in members}
    layers = {path: layer for member in members for path, layer in member.layers.items()}
    tensors = {
        f"{path}.m{k}_{name}": getattr(adapters[member][path], name).detach().clone()
        for path in layers
        for k, member in enumerate(m for m in members if path in m.layers)
        for name in adapters[member][path].specs()
    }
    dtype = widest(members)
    cfg = EnsembleConfig(
        members=tuple(
            json.dumps({"variant": member.cls.variant, "config": ranked(member, adapters[member]).to_json(), "weights": at})
            for member, at in members.items()
        ),
        targets=tuple(exactly(path) for path in layers),
        exclude=(),
        dtype=dtype,
        buffer_dtype=dtype,
    )
    base = {path: print_ for member in members for path, print_ in member.base.items()}
    return Snapshot("composed", Ensemble, cfg, tensors, layers, base, Lineage())


def ranked(member: Snapshot, adapters: Mapping[str, Adapter]) -> AdapterConfig:
    """The member's config with its layers' ranks by their paths; its own patterns may be a file's, which are never searched."""
    other = {exactly(path): a.cfg.r for path, a in adapters.items() if a.cfg.r != member.config.r}
    return dataclasses.replace(member.config.without_patterns(), **({"rank_pattern": other} if other else {}))
