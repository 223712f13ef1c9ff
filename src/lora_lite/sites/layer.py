"""The one way to read the weight of a Linear-like layer; quantised.py knows packed ones."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import LoraLiteError
from .offloaded import present
from .quantised import dequantised, is_packed
from .sharded import is_flat

Layer = nn.Linear
"""Type of an adapted layer: nn.Linear, or a module with its attributes (Conv1D, quantised Linears)."""


def is_conv1d(layer: nn.Module) -> bool:
    """transformers' Conv1D: a Linear whose weight is stored (d_in, d_out)."""
    return type(layer).__name__ == "Conv1D" and type(layer).__module__ == "transformers.pytorch_utils"


def is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or is_conv1d(layer)


INPUTS = ("input", "x", "hidden_states", "inputs", "input_", "hidden", "features")
"""What a Linear-like layer may call its activation; where several arguments could be it, the first of these is."""


@functools.lru_cache(maxsize=256)
def place_of_input(forward: Callable[..., Any]) -> tuple[int, str]:
    """(position, name) of the activation among the arguments of a layer's forward, `self` aside."""
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = [p.name for p in inspect.signature(forward).parameters.values() if p.kind in kinds][1:]
    known = [name for name in INPUTS if name in names]
    name = known[0] if known else (names or ["input"])[0]
    return (names.index(name) if name in names else 0), name


def by_keyword(layer: nn.Module, name: str, kwargs: dict[str, Any]) -> str:
    """The keyword under which this call gives the activation. Raises LoraLiteError where none can be it."""
    if name in kwargs:
        return name
    if len(kwargs) == 1:  # a forward(*args, **kwargs) that hands on to another
        return next(iter(kwargs))
    raise LoraLiteError(
        f"A call of {type(layer).__name__} gives no {name!r}.",
        expected="The activation as the forward names it, or the only argument.",
        found=f"Keywords: {', '.join(kwargs) or 'none'}.",
        fix=f"layer({name}=x)",
    )


def no_tensor(layer: nn.Module, verb: str, value: Any) -> LoraLiteError:
    return LoraLiteError(
        f"{type(layer).__name__} {verb} a {type(value).__name__}.",
        expected="One tensor: an adapter changes W x + b.",
        fix="exclude=(...)  # the name of the layer",
    )


def unfit(layer: nn.Module) -> str | None:
    """Why no adapter can stand on this Linear-like layer; None where one can."""
    weight = getattr(layer, "weight", None)
    if weight is None or nn.parameter.is_lazy(weight):
        return "lazy: no shape before its first call"
    if weight.is_complex():
        return "complex: its weight is no matrix of real numbers"
    return None


def refuse_unfit(layer: nn.Module, path: str = "") -> None:
    """Raise LoraLiteError for a layer that is `unfit`."""
    if reason := unfit(layer):
        raise LoraLiteError(
            f"{path or type(layer).__name__} takes no adapter, {reason}.",
            fix="model(batch)  # once, before ll.attach" if "first call" in reason else "exclude=(...)  # its name",
        )


def sizes(layer: Layer) -> tuple[int, int]:
    """(d_in, d_out). Raises LoraLiteError for a layer that is `unfit`."""
    refuse_unfit(layer)
    if is_conv1d(layer):
        return layer.weight.shape[0], layer.weight.shape[1]
    return layer.in_features, layer.out_features


def stands_for_another(weight: Tensor) -> bool:
    """Whether it is torch's own stand-in for a plain tensor while a graph is recorded, as torch.export's."""
    return type(weight).__module__.startswith("torch._subclasses.")


def oriented_weight(layer: Layer) -> Tensor:
    """The weight as (d_out, d_in), a view of the layer's own storage; a copy where that is offloaded.

    Raises LoraLiteError for packed and for sharded weights.
    """
    weight: Any = present(layer, "weight")
    if hasattr(weight, "full_tensor") or (weight.ndim != 2 and is_flat(layer)):
        raise LoraLiteError(
            f"The weight of {type(layer).__name__} is sharded over processes.",
            expected="Outside the layer's own forward a whole weight is there on a plain model only.",
            fix="ll.save(model, path); ll.load(plain_model, path); ll.merge(plain_model)",
        )
    if is_packed(layer) or not (type(weight) in (Tensor, nn.Parameter) or stands_for_another(weight)):
        raise LoraLiteError(
            f"The weight of {type(layer).__name__} is stored as {type(weight).__name__} of {weight.dtype}.",
            expected="A weight of floating-point numbers is needed here.",
            fix="load the model without quantisation",
        )
    return weight.T if is_conv1d(layer) else weight


@torch.no_grad()
def dense_weight(layer: Layer) -> Tensor:
    """A copy of the weight, (d_out, d_in), in float32 (float64 stays), never the weight itself; packed ones dequantised."""
    if is_packed(layer):
        return dequantised(layer)
    weight = oriented_weight(layer)
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)


class Base:
    """The frozen layer as lent to `forward` for one call: `base(z)` is W z without bias and without hooks.

    z is (..., d_in); the product runs in the dtype of the weight and comes back in the dtype of z. A packed weight is
    dequantised for the call and again for its backward pass, in the dtype of z; what the layer itself does to activations is
    left out, so that base is linear where an int8 layer is not. `base.bias` is (d_out,) or None.
    """

    def __init__(self, layer: Layer):
        self.layer = layer

    @property
    def bias(self) -> Tensor | None:
        return present(self.layer, "bias")

    def __call__(self, z: Tensor) -> Tensor:
        if is_packed(self.layer):
            if torch.is_grad_enabled() and z.requires_grad:  # a plain product would keep every dense weight until backward
                return checkpoint(self.unpacked, z, use_reentrant=False, preserve_rng_state=False)
            return self.unpacked(z)
        weight = oriented_weight(self.layer)
        return F.linear(z.to(weight.dtype), weight).to(z.dtype)

    def unpacked(self, z: Tensor) -> Tensor:
        return F.linear(z, dense_weight(self.layer).to(z.dtype))

    def detach(self) -> None:
        """Refused: who takes the arguments of an adapter for tensors alone, as Opacus does, has no gradients per sample."""
        raise LoraLiteError(
            "Another program captures the arguments of an adapter, and not all of them are tensors.",
            expected="Gradients per sample need modules that Opacus or its like knows.",
            fix="torch.func.vmap(torch.func.grad(loss_of_one_sample), in_dims=(None, 0))(parameters, batch)",
        )
