"""Snapshots: the numbers of an adapter at one moment, to compose and to attach again.

Two snapshots share a lineage where one attach led to both: its id is new at attach and goes with snapshots, what is made of
them by `apply`, and checkpoints, so that phases trained in different processes still belong together. `load` of one file
twice therefore gives two branches of one lineage.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..contract import shared
from ..contract.adapter import Adapter
from ..contract.attachment import Lineage
from ..contract.config import AdapterConfig
from ..core import finding
from ..core.atomic import atomic
from ..core.fingerprint import changes_of_base, fingerprint
from ..core.fitness import refuse_places
from ..core.handle import Attached
from ..core.install import build_all, configs_of, install, place_of, refuse_name, refuse_unready
from ..core.restore import layers_of, restore
from ..core.untouched import warn_left_out
from ..errors import LoraLiteError, some
from ..sites.layer import Layer
from ..sites.model import unwrapped
from ..sites.sharded import refuse_fsdp1, whole


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Tensors of one adapter, copied; `b - a` is the increment from a to b.

    tensors  named as in a checkpoint                    layers  {path: base layer}, referred to, not copied
    base     {path: fingerprint of its weight}           lineage which training, and how many snapshots it had before
    report   {path: figures}, of composing           places  {path: rank and own options}; None: as the config says
    """

    name: str
    cls: type[Adapter]
    config: AdapterConfig
    tensors: dict[str, Tensor]
    layers: dict[str, Layer]
    base: dict[str, Any]
    lineage: Lineage
    report: dict[str, dict[str, float]] = field(default_factory=dict)
    places: dict[str, dict[str, Any]] | None = None

    def __sub__(self, start: "Snapshot") -> "Increment":
        return Increment(self, start) if isinstance(start, Snapshot) else NotImplemented

    def __repr__(self) -> str:
        return f"Snapshot({self.name!r}, {self.cls.variant}, {len(self.layers)} layers, step {self.lineage.step})"


@dataclass(frozen=True)
class Increment:
    """What training added from `start` to `end`; a key of `compose`."""

    end: Snapshot
    start: Snapshot


@torch.inference_mode(False)  # what it makes outlives the caller's inference mode
def snapshot(model: nn.Module, name: str | None = None) -> Snapshot:
    """Copy the tensors of adapter `name` (None: the only one), with its config and its lineage.

    Raises LoraLiteError while it is merged and where its hooks were removed by somebody else.
    """
    model = unwrapped(model)
    refuse_fsdp1(model, "taken = ll.snapshot(model)")
    name = finding.the_name(model, name)
    found = finding.adapters(model, name)
    finding.refuse_other_root(found)
    finding.refuse_merged(finding.adapters(model))
    finding.refuse_lost(found)
    warn_left_out(model, found[0].adapter.group.base, "The snapshot")
    adapters = {f.path: f.adapter for f in found}
    own = {
        f"{p}.{key}": whole(getattr(a, key).detach()) for p, a in adapters.items() for key in a.specs() if key not in a.shared
    }
    common = {f"*.{key}": shared.held(adapters, key)[0] for key in shared.declared(adapters)}
    group = found[0].adapter.group
    taken = Snapshot(
        name=name,
        cls=type(found[0].adapter),
        config=group.cfg,
        tensors=copied(common | own),
        layers={f.path: f.layer for f in found},
        base={f.path: fingerprint(f.layer) for f in found},
        lineage=dataclasses.replace(group.lineage),
        places={f.path: place_of(f.adapter, f.layer) for f in found},
    )
    group.lineage.step += 1
    return taken


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().clone() for key, tensor in tensors.items()}


@atomic
def apply(model: nn.Module, composed: Snapshot, *, name: str, strict_base: bool = True) -> Attached:
    """Attach a snapshot, taken or composed, as an adapter called `name`: nothing is drawn or computed.

    strict_base  False attaches to a base whose weights differ from those it belongs to
    Raises LoraLiteError before anything is changed: missing layers, another base, a name in use, a compiled or sharded model.
    """
    if not isinstance(composed, Snapshot):
        raise LoraLiteError(
            f"apply takes a snapshot, not a {type(composed).__name__}.",
            expected="What ll.snapshot or ll.compose returns.",
            fix="ll.apply(model, ll.compose({composed: 1.0}), name=name)"
            if isinstance(composed, Increment)
            else "ll.apply(model, ll.snapshot(model), name=name)",
        )
    earlier = refuse_unready(model)
    targets = layers_of(model, f"{composed}", list(composed.layers))
    refuse_name(earlier, targets, name)
    refuse_places(model, composed, targets)
    if strict_base and (different := changes_of_base(targets, composed.base)):
        raise LoraLiteError(
            f"{composed} belongs to another base.",
            expected="Base weights equal to those it was taken with.",
            found=f"Different: {some(different)}.",
            fix="ll.apply(model, composed, name=name, strict_base=False)  # if the other base is meant",
        )
    adapters = build_all(composed.cls, targets, configs_of(composed.config, composed.places, targets))
    restore(f"{composed}", adapters, composed.tensors, {})
    for path, figures in composed.report.items():
        adapters[path].report.update(figures)
    lineage = Lineage(composed.lineage.id, composed.lineage.step + 1)
    install(model, targets, adapters, name, composed.config, lineage)
    return Attached(model, name, composed.config, adapters, {})


def rebuilt(taken: Snapshot) -> dict[str, Adapter]:
    """The snapshot's adapters at coefficient 1, hung nowhere. Raises LoraLiteError where the base has changed since."""
    if different := changes_of_base(taken.layers, taken.base):
        raise LoraLiteError(
            f"The base of {taken} has changed since it was taken.",
            found=f"Different: {some(different)}.",
            fix="ll.unmerge(model)  # if an adapter is merged",
        )
    adapters = build_all(taken.cls, taken.layers, configs_of(taken.config, taken.places, taken.layers))
    restore(f"{taken}", adapters, taken.tensors, {})
    for path, adapter in adapters.items():
        adapter.path, adapter.coeff = path, 1.0
    return adapters
