"""Tensors that all adapters of one attach hold together: allocated, drawn and stored once, seen by each layer as a view.

A ParamSpec with `shared=True` gives the shape that one layer uses. The tensor is as large as the largest layer asks on each
axis, and a layer's buffer is its leading part.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .spec import ParamSpec, Shape, drawn


@dataclass
class Shared:
    """Holder of one tensor, so that moving it moves it for every adapter."""

    tensor: Tensor

    def part(self, shape: Shape) -> Tensor:
        """The view (shape) that one layer uses."""
        return self.tensor[tuple(slice(n) for n in shape)]


def declared(adapters: dict[str, Any]) -> dict[str, tuple[ParamSpec, Shape]]:
    """{name: (a spec, the whole tensor's shape)} of what these adapters share."""
    specs = [adapter.specs() for adapter in adapters.values()]
    names = [name for name, spec in (specs[0] if specs else {}).items() if spec.shared]
    return {name: (specs[0][name], tuple(map(max, zip(*(s[name].shape for s in specs))))) for name in names}


def allocate(adapters: dict[str, Any]) -> None:
    """Give every adapter its view of the tensors it shares: one tensor per device and dtype, not yet filled."""
    for name, (_, shape) in declared(adapters).items():
        holders: dict[Any, Shared] = {}
        for adapter in adapters.values():
            place = getattr(adapter, name)
            key = place.device, place.dtype
            if key not in holders:
                holders[key] = Shared(torch.zeros(shape, dtype=place.dtype, device=place.device))
            adapter.share(name, holders[key])


def draws(adapters: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """The start values in float32, whole, from the seed alone."""
    return {name: drawn(spec, shape, seed, "shared", name) for name, (spec, shape) in declared(adapters).items()}


def holders(adapters: dict[str, Any], name: str) -> list[Shared]:
    """The tensors called `name`, one per device and dtype."""
    return list({id(adapter.shared[name]): adapter.shared[name] for adapter in adapters.values()}.values())


def fill(adapters: dict[str, Any], values: dict[str, Tensor]) -> None:
    """Write whole values into the shared tensors."""
    for name, value in values.items():
        for holder in holders(adapters, name):
            holder.tensor.copy_(value)
