"""The one way to read the weight of a Linear-like layer; quantised.py knows packed ones."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import LoraLiteError
from .quantised import dequantised, is_packed

Layer = nn.Linear
"""Type of an adapted layer: nn.Linear, or a module with its attributes (Conv1D, quantised Linears)."""


def is_conv1d(layer: nn.Module) -> bool:
    """transformers' Conv1D: a Linear whose weight is stored (d_in, d_out)."""
    return type(layer).__name__ == "Conv1D" and type(layer).__module__ == "transformers.pytorch_utils"


def is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or is_conv1d(layer)


def sizes(layer: Layer) -> tuple[int, int]:
    """(d_in, d_out)."""
    if is_conv1d(layer):
        return layer.weight.shape[0], layer.weight.shape[1]
    return layer.in_features, layer.out_features


def oriented_weight(layer: Layer) -> Tensor:
    """The weight as (d_out, d_in), a view of the layer's own storage. Raises for packed and for sharded weights."""
    weight = layer.weight
    if hasattr(weight, "full_tensor"):
        raise LoraLiteError(
            f"The weight of {type(layer).__name__} is sharded over processes.",
            expected="Outside the layer's own forward a whole weight is there on a plain model only.",
            fix="ll.save(model, path); ll.load(plain_model, path); ll.merge(plain_model)",
        )
    if is_packed(layer) or type(weight) not in (Tensor, nn.Parameter):
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
        self.bias = layer.bias

    def __call__(self, z: Tensor) -> Tensor:
        if is_packed(self.layer):
            if torch.is_grad_enabled() and z.requires_grad:  # a plain product would keep every dense weight until backward
                return checkpoint(self.unpacked, z, use_reentrant=False, preserve_rng_state=False)
            return self.unpacked(z)
        weight = oriented_weight(self.layer)
        return F.linear(z.to(weight.dtype), weight).to(z.dtype)

    def unpacked(self, z: Tensor) -> Tensor:
        return F.linear(z, dense_weight(self.layer).to(z.dtype))
