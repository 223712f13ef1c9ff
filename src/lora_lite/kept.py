"""Kept: what a variant computes from its parameters and the base weight alone, reused while nothing changes."""

import weakref
from collections.abc import Callable
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
        self.weight: tuple[Any, ...] = ()
        self.value: Any = None

    def __call__(self, make: Callable[[Base], T], base: Base, of: tuple[Tensor, ...]) -> T:
        weight = identity(base.layer.weight)
        if weight != self.weight or not all(map(equal, of, self.of)):
            self.value = make(base)
            self.weight, self.of = weight, tuple(tensor.detach().clone() for tensor in of)
        return self.value


def reusable(base: Any, of: tuple[Tensor, ...]) -> bool:
    """Whether results may be reused: no gradient, no graph that is being recorded, no autocast, plain parameters on the CPU."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if not isinstance(base, Base) or torch.is_autocast_enabled("cpu") or base.layer.weight.is_inference():
        return False
    return all(type(tensor) in (nn.Parameter, Tensor) and tensor.device.type == "cpu" for tensor in of)


def identity(weight: Tensor) -> tuple[Any, ...]:
    return weakref.ref(weight), weight._version, weight.data_ptr(), weight.dtype


def equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)
