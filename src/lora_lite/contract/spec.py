"""ParamSpec: the declaration of one tensor of a variant, and the functions that give tensors their start values."""

import contextlib
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import LoraLiteError

Shape = tuple[int, ...]
Start = Callable[[Shape], Tensor]
"""A function of the shape. Random ones draw from torch's global CPU generator, which the core seeds from
(config seed, layer path, tensor name) and restores, so that no start depends on the order of the layers."""

F32 = torch.float32  # starts are drawn in it whatever torch's default dtype is


def zeros(shape: Shape) -> Tensor:
    return torch.zeros(shape, dtype=F32)


def ones(shape: Shape) -> Tensor:
    return torch.ones(shape, dtype=F32)


def constant(value: float) -> Start:
    return lambda shape: torch.full(shape, float(value), dtype=F32)


def uniform(bound: float) -> Start:
    return lambda shape: torch.empty(shape, dtype=F32).uniform_(-bound, bound)


def normal(std: float) -> Start:
    return lambda shape: torch.randn(shape, dtype=F32) * std


def kaiming(shape: Shape) -> Tensor:
    """Uniform in +-1/sqrt(fan in), the fan in being the last axis: what nn.Linear and LoRA's code use."""
    return uniform(1 / math.sqrt(shape[-1]))(shape)


@dataclass(frozen=True)
class ParamSpec:
    """One tensor of a variant.

    shape      at least one axis, every axis at least 1 (sharded training refuses 0-d tensors)
    start      function of the shape that gives the value before `init` and `group_init`
    trainable  True: a parameter; False: a buffer, frozen and saved
    identity   the value at which this tensor alone has no effect, None where there is no such constant
    decay      may weight decay pull this tensor to 0; only lawful where 0 is its identity
    lr         a learning rate of its own; None: the adapter's
    shared     one frozen tensor for all layers of an attach, of which each sees the leading part of its `shape`; `start`, the
               same function for every layer, is given the whole tensor's shape, the largest on each axis
    saved      False: a shared tensor that checkpoints leave out; load draws it again from the seed and compares a hash

    Raises LoraLiteError for an empty shape, an axis below 1, decay towards anything but the identity, a learning rate of 0 or
    less, a trained tensor that is shared and a tensor of one layer that is not saved.
    """

    shape: Shape
    start: Start = zeros
    trainable: bool = True
    identity: float | None = None
    decay: bool = False
    lr: float | None = None
    shared: bool = False
    saved: bool = True

    def __post_init__(self) -> None:
        shape = tuple(self.shape)
        object.__setattr__(self, "shape", shape)
        if not shape or any(not isinstance(n, int) or n < 1 for n in shape):
            raise LoraLiteError(
                f"ParamSpec(shape={shape}) cannot be built.",
                expected="A shape has at least one axis and every axis is an integer of at least 1.",
                fix="ParamSpec(shape=(1,))  # for a scalar",
            )
        if not callable(self.start):
            raise LoraLiteError(
                f"ParamSpec(start={self.start!r}) cannot be built.",
                expected="A start is a function of the shape.",
                found="lora_lite.spec has zeros, ones, constant(v), uniform(bound), normal(std), kaiming.",
                fix="ParamSpec(shape, start=kaiming)",
            )
        if self.decay and self.identity != 0:
            raise LoraLiteError(
                f"ParamSpec(decay=True, identity={self.identity}) cannot be built.",
                expected="Weight decay pulls to 0, so only a tensor whose identity is 0 may decay.",
                fix="ParamSpec(shape, identity=0, decay=True)  # store the deviation from the identity instead",
            )
        if self.lr is not None and not self.lr > 0:
            raise LoraLiteError(
                f"ParamSpec(lr={self.lr}) cannot be built.",
                expected="A learning rate above 0, or None for the adapter's.",
                fix="ParamSpec(shape, trainable=False)  # for a tensor that is not to move",
            )
        if (self.shared and self.trainable) or not (self.saved or self.shared):
            raise LoraLiteError(
                f"ParamSpec(trainable={self.trainable}, shared={self.shared}, saved={self.saved}) cannot be built.",
                expected="Layers share frozen tensors only, and only those can be drawn again.",
                fix="ParamSpec(shape, start, trainable=False, shared=True, saved=False)",
            )


class InFloat32(TorchFunctionMode):
    """New tensors of which no dtype is said are in float32, for this thread: a generator's numbers depend on the dtype."""

    made = frozenset((torch.empty, torch.eye, torch.linspace, torch.ones, torch.rand, torch.randn, torch.zeros))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **({"dtype": F32, **kwargs} if func in self.made else kwargs))


@contextlib.contextmanager
def seeded(*key: object) -> Iterator[None]:
    """torch's CPU generator seeded from the key, and as it was afterwards; new tensors are on the CPU, in float32."""
    with contextlib.ExitStack() as inside:
        inside.enter_context(torch.random.fork_rng(devices=[]))
        if torch.get_default_device().type != "cpu":  # where it is the CPU, entering it only slows every call
            inside.enter_context(torch.device("cpu"))
        if torch.get_default_dtype() != F32:
            inside.enter_context(InFloat32())
        torch.default_generator.manual_seed(zlib.crc32(repr(key).encode()))  # torch.manual_seed reseeds accelerators too
        yield


def drawn(spec: ParamSpec, shape: Shape, *key: object) -> Tensor:
    """The start value of `spec` for this shape, the same for the same key. Raises LoraLiteError where it has another shape."""
    with seeded(*key):
        value = spec.start(shape)
    if tuple(value.shape) != shape:
        raise LoraLiteError(
            f"The start of {key[-1]} has shape {tuple(value.shape)}.",
            expected=f"ParamSpec says {shape}.",
        )
    return value


def refuse_declaration(adapter: Any, specs: Mapping[str, ParamSpec]) -> None:
    """Raise LoraLiteError for a dtype that has no gradient and for tensors named as something that an adapter has already."""
    if not adapter.cfg.dtype.is_floating_point:
        raise LoraLiteError(f"dtype={adapter.cfg.dtype} cannot be trained.", expected="A float.", fix="dtype=torch.float32")
    if taken := next((name for name in specs if hasattr(type(adapter), name) or name in vars(adapter)), None):
        raise LoraLiteError(
            f"{type(adapter).__name__} declares a tensor {taken!r}.",
            expected="A tensor's name must not be an attribute that Adapter already has.",
            fix=f'{{"{taken}_": ParamSpec(...)}}',
        )
