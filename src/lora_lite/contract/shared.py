"""Tensors that all adapters of one attach hold together: allocated, drawn and stored once, seen by each layer as a view.

A ParamSpec with `shared=True` gives the shape that one layer uses. The tensor is as large as the largest layer asks on each
axis, and a layer's buffer is its leading part.
"""

from collections.abc import Callable, MutableMapping
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..errors import LoraLiteError, some
from .spec import ParamSpec, Shape, drawn

Place = tuple[torch.device, torch.dtype]


def place(tensor: Tensor) -> Place:
    return tensor.device, tensor.dtype


def leading(tensor: Tensor, shape: Shape) -> Tensor:
    """The view (shape) of the first numbers on each axis."""
    return tensor[tuple(slice(n) for n in shape)]


class Shared:
    """Holder of one tensor, the same object for every adapter that sees it.

    Models are moved module by module, and parts of them alone: each move ends at a holder in the new place, and layers that
    come to one place with the same numbers meet at one holder again. Nothing is kept that no adapter holds.
    """

    def __init__(self, tensor: Tensor, family: "MutableMapping[Place, Shared] | None" = None):
        self.tensor = tensor
        self.moved: MutableMapping[Place, Shared] = WeakValueDictionary()  # where this one went
        self.family = WeakValueDictionary() if family is None else family  # the latest in each place
        self.family[place(tensor)] = self

    def __reduce__(self) -> Any:
        return Shared, (self.tensor,)

    def applied(self, fn: Callable[[Tensor], Tensor]) -> "Shared":
        """The holder after `fn` of nn.Module._apply; this one still serves the adapters that stay."""
        probe = self.tensor.new_empty(0)
        after = fn(probe)
        if after is probe:  # nothing to do, or done in place
            fn(self.tensor)
            return self
        found = self.moved.get(place(after))
        if found is None:
            tensor, found = fn(self.tensor), self.family.get(place(after))
            if found is None or not (tensor.is_meta or torch.equal(found.tensor, tensor)):
                found = Shared(tensor, self.family)
            self.moved[place(after)] = found
        return found


def declared(adapters: dict[str, Any]) -> dict[str, tuple[ParamSpec, Shape]]:
    """{name: (a spec, the whole tensor's shape)} of what these adapters share.

    Raises LoraLiteError where layers do not declare it alike.
    """
    specs = {path: adapter.specs() for path, adapter in adapters.items()}
    shared = {name: spec for of in specs.values() for name, spec in of.items() if spec.shared}
    for name, spec in shared.items():
        kind = True, spec.saved, len(spec.shape)
        odd = [p for p, s in specs.items() if name not in s or (s[name].shared, s[name].saved, len(s[name].shape)) != kind]
        if odd:
            raise LoraLiteError(
                f"{name} is shared, and not declared alike by every layer: {some(odd)}.",
                expected="Of a shared tensor only the sizes may differ between layers.",
                fix=f'{{"{name}": ParamSpec(shape, start, trainable=False, shared=True)}}  # whatever d_in and d_out',
            )
    return {name: (spec, tuple(map(max, zip(*(s[name].shape for s in specs.values()))))) for name, spec in shared.items()}


def allocate(adapters: dict[str, Any]) -> None:
    """Give every adapter its view of the tensors it shares: one tensor per device and dtype, not yet filled."""
    for name, (_, shape) in declared(adapters).items():
        family: MutableMapping[Place, Shared] = WeakValueDictionary()
        for adapter in adapters.values():
            device, dtype = key = place(getattr(adapter, name))
            adapter.share(name, family.get(key) or Shared(torch.zeros(shape, device=device, dtype=dtype), family))


def draw(name: str, spec: ParamSpec, shape: Shape, seed: int) -> Tensor:
    """The whole start value in float32, from the seed and the name alone."""
    return drawn(spec, shape, seed, "shared", name)


def draws(adapters: dict[str, Any], seed: int) -> dict[str, Tensor]:
    return {name: draw(name, spec, shape, seed) for name, (spec, shape) in declared(adapters).items()}


def holders(adapters: dict[str, Any], name: str) -> list[Shared]:
    """The tensors called `name`, one per device and dtype."""
    return list({id(adapter.shared[name]): adapter.shared[name] for adapter in adapters.values()}.values())


def held(adapters: dict[str, Any], name: str) -> list[Tensor]:
    """All that layers use as `name`: the whole tensors, widest numbers first, and parts that others put in a view's place."""
    wholes = [holder.tensor for holder in holders(adapters, name)]
    views = {t.untyped_storage().data_ptr() for t in wholes}
    parts = [getattr(adapter, name) for adapter in adapters.values()]
    wholes.sort(key=lambda t: torch.finfo(t.dtype).bits, reverse=True)
    return wholes + [t for t in parts if t.untyped_storage().data_ptr() not in views]


def agrees(whole: Tensor, used: list[Tensor]) -> bool:
    """Whether every tensor in `used` is the leading part of `whole`, cast to its dtype."""
    return all(torch.equal(leading(whole, tuple(t.shape)).to(t.device, t.dtype), t) for t in used)


def fill(adapters: dict[str, Any], values: dict[str, Tensor]) -> None:
    """Write whole values into the shared tensors."""
    for name, value in values.items():
        for holder in holders(adapters, name):
            holder.tensor.copy_(value)
