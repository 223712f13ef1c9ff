"""The coefficient: `scale` sets it for all threads, `scaled` and `disabled` are blocks of the thread that entered them."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..contract import here, rows
from ..contract.adapter import Adapter
from ..contract.here import HERE, OFF, Setting, setting
from ..errors import LoraLiteError, LoraLiteWarning
from ..mathematics.maps import distinct
from ..sites.model import unwrapped
from ..sites.routing import batch_first, routed
from .finding import Found, adapters, present
from .gains import gains
from .quiet import quiet

New = list[tuple[Adapter, Setting, float | Tensor | None]]
"""[(adapter, its coefficient, the coefficient of all layers where gains multiply it)]."""


class Scaling(contextlib.ExitStack):
    """Coefficients set on adapters for all threads; leaving it as a context manager puts the old ones back."""

    def __init__(self, model: nn.Module, new: New):
        super().__init__()
        self.model, self.new = model, new
        self.before: New = [(a, Setting(a.set_coeff, a.set_values), a.common) for a, *_ in new]
        self.put(new)

    def put(self, wanted: New) -> None:
        """All of them or none. Waits until no other thread runs the model, so that a forward sees the old ones or the new."""
        now: New = [(a, Setting(a.set_coeff, a.set_values), a.common) for a, *_ in wanted]
        try:
            for adapter, coeff, _ in wanted:
                rows.watch(self.model, [adapter], coeff.coeff)
            with quiet(self.model, inside=True):
                for adapter, coeff, common in wanted:
                    adapter.take(coeff, common)
        except BaseException:
            for adapter, coeff, common in now:
                adapter.take(coeff, common)
            raise

    def __enter__(self) -> "Scaling":
        for _ in range(2):  # an interruption of the first leaves the second
            self.callback(self.leave)
        try:
            self.put(self.new)
            here.blocks.add(id(self))
        except BaseException:
            self.close()
            raise
        return self

    def leave(self) -> None:
        here.blocks.discard(id(self))
        self.put(self.before)


def scale(model: nn.Module, coeff: float | Tensor | Mapping[str, float], *, name: str | None = None) -> Scaling:
    """Set the runtime coefficient of adapter `name`, or of all, for every thread: 1 is the trained adapter, 0 the base model.

    coeff  a number, or a tensor aligned with the leading axes of the activations: (batch,) one value per sample,
           (batch, time) one per token. It is copied, unless it requires a gradient. Or {"layers.0-7": 0.25, "o_proj": 0.5}:
           gains g by module pattern (see gains.py), 1 where none matches; each layer runs at c g, c being the
           coefficient last set for all layers
    `with ll.scale(model, 0.5): ...` puts the old coefficients back on leaving, in a program of one thread; `scaled` is the
    block that other threads do not see.
    Raises LoraLiteError for a coefficient that is neither, or not finite, for a merged adapter and for a model without one.
    """
    return Scaling(unwrapped(model), settings(model, coeff, name))


def settings(model: nn.Module, coeff: float | Tensor | Mapping[str, float], name: str | None) -> New:
    """What `scale` and `scaled` set on which adapter. Raises and warns as they say."""
    if isinstance(coeff, Mapping):
        found = present(model, name)
        gain = gains(coeff, [f.path for f in found])
        return by_gain(found, lambda f: gain[f.path])
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
    if not isinstance(coeff, Tensor):
        return [(adapter, Setting(coeff), None) for adapter in chosen]
    mark(unwrapped(model))
    if coeff.requires_grad:
        return [(adapter, Setting(coeff), None) for adapter in chosen]
    coeff = coeff.clone()  # what the caller writes into it later would not be among the values
    one = Setting(coeff, distinct(coeff))
    return [(adapter, one, None) for adapter in chosen]


def by_gain(found: list[Found], gain: Callable[[Found], float]) -> New:
    """c g for every adapter: c is the coefficient last set for all its layers, g its gain."""
    refuse_scaling_merged([f.adapter for f in found])
    common = [setting(f.adapter).coeff if f.adapter.common is None else f.adapter.common for f in found]
    for f, c in zip(found, common):
        warn_outside(f.adapter, torch.as_tensor(c).detach() * gain(f))
    products = [c * gain(f) for f, c in zip(found, common)]
    values = [distinct(p) if isinstance(p, Tensor) and not p.requires_grad else None for p in products]
    return [(f.adapter, Setting(p, v), c) for f, p, v, c in zip(found, products, values, common)]


@contextlib.contextmanager
def scaled(model: nn.Module, coeff: float | Tensor | Mapping[str, float], *, name: str | None = None) -> Iterator[None]:
    """Inside, adapter `name` (or every one) runs at `coeff` in this thread; other threads do not notice.

    coeff as `scale` takes it. Blocks nest, the innermost counts; in a `disabled` block nothing acts. A recomputation under
    gradient checkpointing runs with the coefficients of its forward, also after the block and in another thread.
    Threads that are started inside begin outside of it. Raises LoraLiteError as `scale`.
    """
    over: dict[int, Any] = {}
    for adapter, one, common in settings(model, coeff, name):
        rows.watch(unwrapped(model), [adapter], one.coeff)
        if common is None:
            over[adapter.group.key] = one
        else:
            over.setdefault(adapter.group.key, {})[adapter.path] = one
    with block(over):
        yield


@contextlib.contextmanager
def disabled(model: nn.Module, name: str | None = None) -> Iterator[None]:
    """Inside, adapter `name` (or every one) does no work in this thread: the output is the base model's, whatever is set.

    A model without adapters is disabled as it is. Raises LoraLiteError for a merged adapter.
    """
    chosen = [found.adapter for found in adapters(model, name)]
    refuse_scaling_merged(chosen)
    with block(dict.fromkeys((adapter.group.key for adapter in chosen), OFF)):
        yield


@contextlib.contextmanager
def block(over: dict[int, Any]) -> Iterator[None]:
    before = HERE.over
    outer = before or {}
    try:
        try:
            HERE.over = {**outer, **{key: one for key, one in over.items() if outer.get(key) is not OFF}}
            yield
        finally:
            HERE.over = before
    except BaseException:  # also an interruption of the line above
        HERE.over = before
        raise


def mark(model: nn.Module) -> None:
    """Note which adapters stand behind a router, where rows are gathered, and whether activations are batch first."""
    known = batch_first(model)
    lists = tuple(f"{path}." for path in routed(model))
    for f in adapters(model):
        f.adapter.batch_leads = f.adapter.batch_leads or known
        f.adapter.behind_router = f.adapter.behind_router or f.path.startswith(lists)


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
            stacklevel=4,
        )
