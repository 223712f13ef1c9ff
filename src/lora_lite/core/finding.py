"""The adapters of a model in their places, and what is refused about them: merged, lost, sharded, of another root."""

from typing import NamedTuple, cast

from torch import nn

from ..contract.adapter import Adapter
from ..errors import LoraLiteError, closest, some
from ..sites.layer import Layer
from ..sites.model import plain, unwrapped
from ..sites.sharded import is_sharded

ATTACH = "ll.attach(model, ll.config(variant))  # variant: one of ll.names()"
"""The repair where a model has no adapter."""


class Found(NamedTuple):
    """An adapter in its place."""

    path: str
    layer: Layer
    name: str
    adapter: Adapter


def adapters(model: nn.Module, name: str | None = None) -> list[Found]:
    """The adapters of the model in its order; those called `name`, or all.

    Raises LoraLiteError for a name that no adapter has.
    """
    modules = dict(unwrapped(model).named_modules())
    places = [(*path.rpartition(".")[::2], child) for path, child in modules.items() if isinstance(child, Adapter)]
    found = [Found(plain(path), cast(Layer, modules[path]), child.group.name or word, child) for path, word, child in places]
    if name is None:
        return found
    names = {f.name for f in found}
    if name not in names:
        raise LoraLiteError(
            f"There is no adapter {name!r} on this model.",
            found=closest(str(name), names) if names else "It has none.",
            fix="ll.status(model)" if names else ATTACH,
        )
    return [f for f in found if f.name == name]


def refuse_other_root(found: list[Found]) -> None:
    """Raise where adapters were attached through a part of this model or through something around it."""
    if other := next((f for f in found if f.path != f.adapter.path), None):
        raise LoraLiteError(
            f"Adapter {other.name!r} on {other.path or 'this layer'} was attached through another module.",
            expected="attach, load, save and detach take one and the same module: it holds names and requires_grad flags.",
            found=f"There the layer is called {other.adapter.path!r}.",
            fix="ll.detach(that_module); ll.attach(model, cfg)  # targets and layers choose a part of it",
        )


def refuse_merged(found: list[Found]) -> None:
    """Raise where a weight holds an adapter's change: statistics, starts and checkpoints belong to the base."""
    if merged := [f for f in found if f.adapter.original is not None]:
        raise LoraLiteError(
            f"Adapter {merged[0].name!r} is merged at {merged[0].path}.",
            expected="The base weights as they were.",
            fix="ll.unmerge(model)",
        )


def missing(found: list[Found]) -> dict[str, set[str]]:
    """{name: paths} of layers that were adapted and are no more in the model; {} when seen from another module."""
    if any(f.path != f.adapter.path for f in found):
        return {}
    gone = {f.name: f.adapter.group.paths - {g.path for g in found if g.name == f.name} for f in found}
    return {name: paths for name, paths in gone.items() if paths}


def refuse_lost(found: list[Found]) -> None:
    """Raise where an adapter of `found` acts no more: its hooks were removed, or another module stands in its layer's place."""
    for name, paths in missing(found).items():
        raise LoraLiteError(
            f"Adapter {name!r} is gone from {some(sorted(paths))}: another program replaced the layer.",
            expected="The modules that were there at attach.",
            fix=f"ll.detach(model, {name!r}); ll.attach(model, cfg, name={name!r})  # or put the layer back",
        )
    if lost := [f for f in found if not f.adapter.hooked(f.layer)]:
        raise LoraLiteError(
            f"The hooks of adapter {lost[0].name!r} are gone from {some(f.path for f in lost if f.name == lost[0].name)}: "
            "another program removed them.",
            expected="What was trained since then was not this adapter.",
            fix="ll.repair(model)",
        )


def refuse_sharded(found: list[Found]) -> None:
    if f := next((f for f in found if is_sharded(f.layer)), None):
        raise LoraLiteError(
            f"{f.path} is sharded over processes.",
            expected="Whole tensors, of a plain model.",
            fix="ll.save(model, path); ll.load(plain_model, path)  # and go on with plain_model",
        )


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the attached adapters, in the order they were attached on any layer."""
    return list(dict.fromkeys(found.name for found in adapters(model)))


def present(model: nn.Module, name: str | None) -> list[Found]:
    """As `adapters`, and raises LoraLiteError where there is none at all."""
    found = adapters(model, name)
    if not found:
        raise LoraLiteError("The model has no adapter.", fix=ATTACH)
    return found


def dead(found: list[Found]) -> list[Found]:
    """Those that never ran although the model, or another layer of the same adapter, did."""
    alive = {f.name for f in found if f.adapter.fired or f.adapter.group.ran}
    return [f for f in found if not f.adapter.fired and f.name in alive]


def the_name(model: nn.Module, name: str | None) -> str:
    """`name`, or the only adapter's where None. Raises LoraLiteError for none or several."""
    if name is not None:
        return adapters(model, name)[0].name
    present = adapter_names(model)
    if len(present) != 1:
        raise LoraLiteError(
            f"The model has {len(present)} adapters.",
            expected="Without a name there must be exactly one.",
            found=f"Here: {present}.",
            fix=f"name={present[0]!r}" if present else ATTACH,
        )
    return present[0]
