"""Kept: what a variant computes from parameters, coefficient and base weight alone, reused while nothing changes."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..sites.layer import Base

T = TypeVar("T")


class Kept:
    """The last result of one computation, with copies of what it was computed from.

    Reused where those are equal number by number, however they were written, and the base weight, where one is given, is the
    same tensor in the same version. On the CPU only: elsewhere every layer would wait for the device to compare.
    """

    def __init__(self) -> None:
        self.of: tuple[Tensor | float, ...] | None = None
        self.weight: Callable[[], Tensor | None] = lambda: None
        self.state: tuple[Any, ...] = ()
        self.value: Any = None

    def __call__(self, make: Callable[[], T], of: tuple[Tensor | float, ...], base: Base | None = None) -> T:
        if self.of is None or not all(map(equal, of, self.of)) or not self.same(base):
            self.value, self.of = make(), tuple(one.detach().clone() if isinstance(one, Tensor) else one for one in of)
            if base is not None:
                self.weight, self.state = weakref.ref(base.layer.weight), state(base.layer.weight)
        return self.value

    def same(self, base: Base | None) -> bool:
        return base is None or (self.weight() is base.layer.weight and self.state == state(base.layer.weight))


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
