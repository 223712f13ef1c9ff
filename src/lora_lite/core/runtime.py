"""What can be done to attached adapters while they run: scale, disable, repair, group for the optimizer."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..contract import rows
from ..contract.adapter import Adapter
from ..errors import LoraLiteError, LoraLiteWarning, some
from ..mathematics.maps import distinct
from ..sites.model import unwrapped
from ..sites.quantised import keep_trainable
from ..sites.routing import batch_first, routed
from .finding import Found, adapters, present
from .gains import gains
from .untouched import base_tensors


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


class Scaling:
    """A coefficient set on adapters; leaving it as a context manager puts the old ones back."""

    def __init__(self, model: nn.Module, chosen: list[Adapter], coeff: float | Tensor, common: float | Tensor | None = None):
        self.model, self.coeff, self.common, self.values = model, coeff, common, None
        if isinstance(coeff, Tensor) and not coeff.requires_grad:
            self.coeff = coeff.clone()  # what the caller writes into it later would not be among the values
            self.values = distinct(coeff)
        self.before = [(adapter, adapter.set_coeff, adapter.common, adapter.values) for adapter in chosen]
        self.__enter__()

    def __enter__(self) -> "Scaling":
        for adapter, *_ in self.before:
            adapter.take(self.coeff, self.common)
            adapter.values = self.values
        self.watch()
        return self

    def __exit__(self, *error: object) -> None:
        for adapter, coeff, common, values in self.before:
            adapter.take(coeff, common)
            adapter.values = values
        self.watch()

    def watch(self) -> None:
        rows.watch(self.model, [adapter for adapter, *_ in self.before])


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
        return scaled(unwrapped(model), found, lambda f: gain[f.path])
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
    if isinstance(coeff, Tensor):
        mark(unwrapped(model))
    return Scaling(unwrapped(model), chosen, coeff)


def mark(model: nn.Module) -> None:
    """Note which adapters stand behind a router, where rows are gathered, and whether activations are batch first."""
    known = batch_first(model)
    lists = tuple(f"{path}." for path in routed(model))
    for f in adapters(model):
        f.adapter.batch_leads = f.adapter.batch_leads or known
        f.adapter.behind_router = f.adapter.behind_router or f.path.startswith(lists)


def scaled(model: nn.Module, found: list[Found], gain: Callable[[Found], float]) -> GroupScaling:
    """Set c g for every adapter: c is the coefficient last set for all its layers, g its gain."""
    refuse_scaling_merged([f.adapter for f in found])
    common = [f.adapter.set_coeff if f.adapter.common is None else f.adapter.common for f in found]
    for f, c in zip(found, common):
        warn_outside(f.adapter, torch.as_tensor(c).detach() * gain(f))
    return GroupScaling([Scaling(model, [f.adapter], c * gain(f), c) for f, c in zip(found, common)])


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
    """Inside, adapter `name` (or every one) does no work: the output is the base model's, whatever `scale` sets meanwhile.

    A model without adapters is disabled as it is. Under gradient checkpointing call backward inside, as with `scale`.
    Raises LoraLiteError for a merged adapter.
    """
    chosen = [found.adapter for found in adapters(model, name)]
    refuse_scaling_merged(chosen)
    closed: list[Adapter] = []
    try:
        for adapter in chosen:
            closed.append(adapter)
            adapter.disabled_by, adapter.asleep = adapter.disabled_by + 1, True
        yield
    finally:
        for adapter in closed:
            adapter.disabled_by -= 1
            adapter.asleep = adapter.disabled_by > 0


def param_groups(model: nn.Module, lr: float | None = None, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Optimizer groups of all adapters: the variant's own learning rate, decay only where a tensor's identity is 0.

    lr            for every adapter; None takes each config's recommended one. A tensor that declares its own keeps it
    weight_decay  for the tensors that declare `decay`; all others get 0
    Warns of parameters of the base that ask for a gradient: they stand in no group.
    """
    if trained := [name for name, p in base_tensors(unwrapped(model)).items() if p.requires_grad]:
        warnings.warn(
            f"{some(trained)} of the base ask for a gradient and stand in no group of param_groups. To train them: "
            f'[*ll.param_groups(model), {{"params": [model.get_parameter(name) for name in {trained[:12]}]}}]',
            LoraLiteWarning,
            stacklevel=2,
        )
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for found in present(model, None):
        specs = found.adapter.specs()
        for key, parameter in found.adapter.named_parameters():
            rate = specs[key].lr or (found.adapter.cfg.lr if lr is None else lr)
            decay = weight_decay if specs[key].decay else 0.0
            group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "weight_decay": decay})
            group["params"].append(parameter)
    return list(groups.values())
