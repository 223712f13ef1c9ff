"""What can be done to attached adapters while they run: scale, disable, inspect, group for the optimizer."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .algebra.groups import gains
from .errors import LoraLiteError, LoraLiteWarning, closest, some
from .linalg import distinct
from .quantised import keep_trainable
from .sharded import is_sharded
from .targets import Layer, plain, unwrapped

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
    found = [Found(plain(path), cast(Layer, modules[path]), child_name, child) for path, child_name, child in places]
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


def repair(model: nn.Module) -> list[str]:
    """Put back hooks that another program removed, in the order of attach; the paths of the layers that needed it.

    Every tensor of the adapters that are declared trainable requires a gradient again, also those that you froze yourself.
    Nothing of the base is touched. Raises LoraLiteError for a model without an adapter.
    """
    by_layer: dict[str, list[Found]] = {}
    for f in present(model, None):
        by_layer.setdefault(f.path, []).append(f)
    broken = [path for path, found in by_layer.items() if not all(f.adapter.hooked(f.layer) for f in found)]
    for path in broken:
        for f in by_layer[path]:
            f.adapter.unhook()
        for f in by_layer[path]:
            f.adapter.hook(f.layer)
    for found in by_layer.values():
        for f in found:
            f.adapter.requires_grad_(True)
    for group in {id(f.adapter.group): f.adapter.group for found in by_layer.values() for f in found}.values():
        for handle in group.handles:
            handle.remove()
        group.handles[:] = keep_trainable(unwrapped(model))
    return broken


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the attached adapters, in the order they were attached on any layer."""
    return list(dict.fromkeys(found.name for found in adapters(model)))


def present(model: nn.Module, name: str | None) -> list[Found]:
    """As `adapters`, and raises LoraLiteError where there is none at all."""
    found = adapters(model, name)
    if not found:
        raise LoraLiteError("The model has no adapter.", fix=ATTACH)
    return found


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


class Scaling:
    """A coefficient set on adapters; leaving it as a context manager puts the old ones back."""

    def __init__(self, chosen: list[Adapter], coeff: float | Tensor, common: float | Tensor | None = None):
        self.coeff, self.common, self.values = coeff, common, None
        if isinstance(coeff, Tensor) and not coeff.requires_grad:
            self.coeff = coeff.clone()  # what the caller writes into it later would not be among the values
            self.values = distinct(coeff)
        self.before = [(adapter, adapter.coeff, adapter.common, adapter.values) for adapter in chosen]
        self.__enter__()

    def __enter__(self) -> "Scaling":
        for adapter, *_ in self.before:
            adapter.take(self.coeff, self.common)
            adapter.values = self.values
        return self

    def __exit__(self, *error: object) -> None:
        for adapter, coeff, common, values in self.before:
            adapter.take(coeff, common)
            adapter.values = values


class GroupScaling:
    """Several settings that go and come back as one."""

    def __init__(self, parts: "Sequence[Scaling | GroupScaling]"):
        self.parts = parts

    def __enter__(self) -> "GroupScaling":
        for part in self.parts:
            part.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        for part in self.parts:
            part.__exit__()


def scale(model: nn.Module, coeff: float | Tensor | Mapping[str, float], *, name: str | None = None) -> Scaling | GroupScaling:
    """Set the runtime coefficient of adapter `name`, or of all, at once: 1 is the trained adapter, 0 the base model.

    coeff  a number, or a tensor aligned with the leading axes of the activations: (batch,) one value per sample,
           (batch, time) one per token. It is copied, unless it requires a gradient. Or {"layers.0-7": 0.25, "o_proj": 0.5}:
           gains g by module pattern (see algebra/groups.py), 1 where none matches; each layer runs at c g, c being the
           coefficient last set for all layers
    `with ll.scale(model, 0.5): ...` puts the old coefficients back on leaving. Under gradient checkpointing call backward
    inside the block: the recomputation runs with the coefficient of its own time.
    Raises LoraLiteError for a coefficient that is neither, or not finite, for a merged adapter and for a model without one.
    """
    if isinstance(coeff, Mapping):
        found = present(model, name)
        gain = gains(coeff, [f.path for f in found])
        return scaled(found, lambda f: gain[f.path])
    if isinstance(coeff, Tensor):
        coeff = float(coeff) if coeff.ndim == 0 and not coeff.requires_grad else coeff
    elif isinstance(coeff, bool) or not isinstance(coeff, (int, float)):
        raise LoraLiteError(f"coeff={coeff!r} is no coefficient.", expected="A number or a tensor.", fix="ll.scale(model, 0.5)")
    else:
        coeff = float(coeff)
    values = coeff.detach() if isinstance(coeff, Tensor) else torch.tensor(coeff)
    if not values.isfinite().all():
        raise LoraLiteError(f"coeff={coeff} is not finite.", expected="Finite numbers.", fix="ll.scale(model, 1.0)")
    chosen = [found.adapter for found in present(model, name)]
    refuse_scaling_merged(chosen)
    for adapter in {adapter.variant: adapter for adapter in chosen}.values():
        warn_outside(adapter, values)
    return Scaling(chosen, coeff)


def scaled(found: list[Found], gain: Callable[[Found], float]) -> GroupScaling:
    """Set c g for every adapter: c is the coefficient last set for all its layers, g its gain."""
    refuse_scaling_merged([f.adapter for f in found])
    common = [f.adapter.coeff if f.adapter.common is None else f.adapter.common for f in found]
    for f, c in zip(found, common):
        warn_outside(f.adapter, torch.as_tensor(c).detach() * gain(f))
    return GroupScaling([Scaling([f.adapter], c * gain(f), c) for f, c in zip(found, common)])


def refuse_scaling_merged(chosen: list[Adapter]) -> None:
    if any(adapter.original is not None for adapter in chosen):
        raise LoraLiteError(
            "A merged adapter cannot be scaled or disabled: its change is in the weights.",
            fix="ll.unmerge(model); ll.scale(model, coeff); ll.merge(model)",
        )


def warn_outside(adapter: Adapter, values: Tensor) -> None:
    safe = adapter.claims.safe_coeff
    if safe is not None and (values.min() < safe[0] or values.max() > safe[1]):
        warnings.warn(
            f"coeff outside {list(safe)}: what {adapter.variant} promises holds inside only",
            LoraLiteWarning,
            stacklevel=3,
        )


@contextlib.contextmanager
def disabled(model: nn.Module, name: str | None = None) -> Iterator[None]:
    """Inside, adapter `name` (or every one) does no work: the output is the base model's. Coefficients come back.

    A model without adapters is disabled as it is. Under gradient checkpointing call backward inside, as with `scale`.
    """
    if name is None and not adapters(model):
        yield
        return
    with scale(model, 0.0, name=name):
        yield


def param_groups(model: nn.Module, lr: float | None = None, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Optimizer groups of all adapters: the variant's own learning rate, decay only where a tensor's identity is 0.

    lr            for every adapter; None takes each config's recommended one. A tensor that declares its own keeps it
    weight_decay  for the tensors that declare `decay`; all others get 0
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for found in present(model, None):
        specs = found.adapter.specs()
        for key, parameter in found.adapter.named_parameters():
            rate = specs[key].lr or (found.adapter.cfg.lr if lr is None else lr)
            decay = weight_decay if specs[key].decay else 0.0
            group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "weight_decay": decay})
            group["params"].append(parameter)
    return list(groups.values())


@dataclass(frozen=True)
class LayerStatus:
    """One adapter on one layer. frozen counts a tensor that several layers share where it stands first.

    fired     its hook ran at least once             dead      it did not, though another layer of this adapter ran
    hooked    its hooks are on the layer now         replaced  another module stands in the layer's place
    merged    the weight holds the change            grad_off  none of its tensors requires a gradient
    """

    name: str
    path: str
    variant: str
    trainable: int
    frozen: int
    dtype: torch.dtype
    coeff: float | Tensor
    fired: bool
    dead: bool
    hooked: bool
    replaced: bool
    merged: bool
    grad_off: bool
    report: dict[str, float]

    @property
    def state(self) -> str:
        """replaced, hook_lost, merged, fired, dead or not run yet, the first that holds; grad_off may stand beside it."""
        holding = {
            "replaced": self.replaced,
            "hook_lost": not self.hooked,
            "merged": self.merged,
            "fired": self.fired,
            "dead": self.dead,
            "not run yet": True,
        }
        return next(state for state, holds in holding.items() if holds) + (", grad_off" if self.grad_off else "")


@dataclass(frozen=True)
class Status:
    """Rows of `status`, one per adapter and layer; prints as a table."""

    layers: tuple[LayerStatus, ...]

    @property
    def trainable(self) -> int:
        return sum(row.trainable for row in self.layers)

    @property
    def frozen(self) -> int:
        return sum(row.frozen for row in self.layers)

    @property
    def dead(self) -> list[str]:
        """Paths whose hook has not run although another layer of the same adapter has."""
        return [row.path for row in self.layers if row.dead]

    @property
    def lost(self) -> list[str]:
        """Paths whose hooks somebody removed (`repair` puts them back) or whose layer was replaced."""
        return [row.path for row in self.layers if row.replaced or not row.hooked]

    def __str__(self) -> str:
        if not self.layers:
            return "no adapters"
        head = ("adapter", "layer", "variant", "trainable", "frozen", "dtype", "coeff", "state", "report")
        rows = [
            (
                r.name,
                r.path,
                r.variant,
                f"{r.trainable:,}",
                f"{r.frozen:,}",
                str(r.dtype).removeprefix("torch."),
                short(r.coeff),
                r.state,
                " ".join(f"{key}={value:.3g}" for key, value in r.report.items()),
            )
            for r in self.layers
        ]
        rows.append(("total", f"{len(self.layers)} layers", "", f"{self.trainable:,}", f"{self.frozen:,}", "", "", "", ""))
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in (head, *rows))


def short(coeff: float | Tensor) -> str:
    return f"tensor {tuple(coeff.shape)}" if isinstance(coeff, Tensor) else f"{coeff:g}"


def status(model: nn.Module) -> Status:
    """What is attached where, in which state: per adapter and layer the variant, numbers, dtype, coefficient, fired or dead."""
    found = adapters(model)
    first = {id(holder): f.adapter for f in reversed(found) for holder in f.adapter.shared.values()}
    alive = {f.name for f in found if f.adapter.fired}
    rows = [
        LayerStatus(
            name=name,
            path=path,
            variant=adapter.variant,
            trainable=sum(p.numel() for p in adapter.parameters()),
            frozen=sum(b.numel() for key, b in adapter.named_buffers() if key not in adapter.shared)
            + sum(holder.tensor.numel() for holder in adapter.shared.values() if first[id(holder)] is adapter),
            dtype=next(iter(adapter.tensors().values())).dtype,
            coeff=adapter.coeff,
            fired=adapter.fired,
            dead=not adapter.fired and name in alive,
            hooked=adapter.hooked(layer),
            replaced=False,
            merged=adapter.original is not None,
            grad_off=not any(p.requires_grad for p in adapter.parameters()),
            report=dict(adapter.report),
        )
        for path, layer, name, adapter in found
    ]
    kin = {row.name: row for row in rows}
    empty = {"trainable": 0, "frozen": 0, "fired": False, "dead": False, "hooked": False, "replaced": True, "report": {}}
    for name, paths in missing(found).items():
        rows += [replace(kin[name], path=path, **empty) for path in sorted(paths)]
    return Status(tuple(rows))
