"""Kept: what a variant computes from its parameters and the base weight alone, reused while nothing changes."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .targets import Base

T = TypeVar("T")


class Kept:
    """The last result of one computation, with copies of the tensors that it was computed from.

    Reused where those are equal number by number, however they were written, and the base weight is the same tensor in the same
    version. On the CPU only: elsewhere every layer would wait for the device to compare.
    """

    def __init__(self) -> None:
        self.of: tuple[Tensor, ...] = ()
        self.weight: Callable[[], Tensor | None] = lambda: None
        self.state: tuple[Any, ...] = ()
        self.value: Any = None

    def __call__(self, make: Callable[[Base], T], base: Base, of: tuple[Tensor, ...]) -> T:
        weight = base.layer.weight
        if self.weight() is not weight or self.state != state(weight) or not all(map(equal, of, self.of)):
            self.value, self.of = make(base), tuple(tensor.detach().clone() for tensor in of)
            self.weight, self.state = weakref.ref(weight), state(weight)
        return self.value


def reusable(base: Any, of: tuple[Tensor, ...], frozen: Iterable[Tensor | None]) -> bool:
    """Whether results may be reused: no gradient, no graph that is being recorded, no autocast; `of` are parameters or among
    the `frozen` ones, on the CPU. What torch.func puts in their place is no parameter.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if not isinstance(base, Base) or torch.is_autocast_enabled("cpu") or base.layer.weight.is_inference():
        return False
    known = {id(tensor) for tensor in frozen if type(tensor) is Tensor}
    return all((type(tensor) is nn.Parameter or id(tensor) in known) and tensor.device.type == "cpu" for tensor in of)


def state(weight: Tensor) -> tuple[Any, ...]:
    return weight._version, weight.data_ptr(), weight.dtype


def equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)
