"""Kept: what a variant computes from parameters, coefficient and base weight alone, reused while nothing changes."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..sites.layer import Base

T = TypeVar("T")


class Entry(NamedTuple):
    """A result and what it was computed from: copies of `of`, the base weight and its state."""

    value: Any
    of: tuple[Tensor | float, ...]
    weight: Callable[[], Tensor | None]
    state: tuple[Any, ...]


class Kept:
    """The last result of one computation, with copies of what it was computed from.

    Reused where those are equal number by number, however they were written, and the base weight, where one is given, is the
    same tensor in the same version. On the CPU only: elsewhere every layer would wait for the device to compare. The entry is
    replaced as one object, so that another thread sees a result with what belongs to it.
    """

    def __init__(self) -> None:
        self.entry: Entry | None = None

    def __call__(self, make: Callable[[], T], of: tuple[Tensor | float, ...], base: Base | None = None) -> T:
        entry = self.entry
        if entry is None or not all(map(equal, of, entry.of)) or not same(entry, base):
            copies = tuple(one.detach().clone() if isinstance(one, Tensor) else one for one in of)
            weight, known = (
                (weakref.ref(base.layer.weight), state(base.layer.weight)) if base is not None else (lambda: None, ())
            )
            self.entry = entry = Entry(make(), copies, weight, known)
        return entry.value


def same(entry: Entry, base: Base | None) -> bool:
    return base is None or (entry.weight() is base.layer.weight and entry.state == state(base.layer.weight))


def reusable(of: Iterable[Tensor | float], frozen: Iterable[Tensor | None], base: Any = None) -> bool:
    """Whether results may be reused: no gradient, no graph that is being recorded, no autocast; `of` are numbers, parameters or
    among the `frozen` ones, on the CPU. What torch.func puts in their place is no parameter.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"):
        return False
    if base is not None and (not isinstance(base, Base) or base.layer.weight.is_inference()):
        return False
    known = {id(tensor) for tensor in frozen if type(tensor) is Tensor}
    tensors = [one for one in of if not isinstance(one, (int, float))]
    return all((type(tensor) is nn.Parameter or id(tensor) in known) and tensor.device.type == "cpu" for tensor in tensors)


def state(weight: Tensor) -> tuple[Any, ...]:
    return weight._version, weight.data_ptr(), weight.dtype


def equal(one: Tensor | float, other: Tensor | float) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)
