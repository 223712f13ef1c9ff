"""Weights that other libraries keep packed: 4-bit and 8-bit of bitsandbytes, tensor subclasses of torchao.

The only place that knows these formats. Neither library is imported before a layer of it is met.

bitsandbytes rearranges a 4-bit weight for inference when its layer runs in eval mode on a CPU with bfloat16 products
("repacked" here): the block scales are rounded to bfloat16, and the kernel that reads the result has no backward pass.
"""

import contextlib
import copy
import sys
from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import LoraLiteError

REPACKS = "support_avx512bf16_for_cpu"  # bitsandbytes' flag of a layer that may repack itself
ROWS = 32  # of a repacked tile
ROUNDS_ACTIVATIONS = ("act_quant_kwargs", "activation_quantization")  # torchao's; None where it rounds weights alone


def library(weight: Tensor) -> str:
    """The package that defines the tensor's type."""
    return type(weight).__module__.partition(".")[0]


def is_packed(layer: nn.Module) -> bool:
    """Whether the weight of this Linear-like layer is stored in a format of fewer bits: numbers without their scales."""
    weight: Any = layer.weight
    if type(weight) in (Tensor, nn.Parameter):
        return not weight.is_floating_point() or weight.dtype.itemsize == 1
    return library(weight) in ("bitsandbytes", "torchao")


def four_bit(weight: Tensor) -> bool:
    return library(weight) == "bitsandbytes" and getattr(weight, "quant_state", None) is not None


def dequantised(layer: Any) -> Tensor:
    """(d_out, d_in) in float32 of a packed weight: the numbers of the layer's own product, which may round x as well.

    Raises LoraLiteError for a format that cannot be read.
    """
    weight = layer.weight
    if four_bit(weight):
        from bitsandbytes.functional import dequantize_4bit  # pyright: ignore[reportMissingImports]

        numbers, scales = blocks(weight)
        state = copy.copy(weight.quant_state)
        state.absmax, state.nested, state.dtype = scales, False, torch.float32
        return dequantize_4bit(numbers, state)
    if library(weight) == "bitsandbytes":
        dense = weight.data.float()
        return dense if weight.is_floating_point() else dense * (row_scales(layer)[:, None] / 127)
    try:
        if library(weight) != "torchao":  # plain tensors dequantise too, to numbers without their scales
            raise NotImplementedError
        dense = weight.dequantize().detach().float()
    except NotImplementedError as error:
        raise LoraLiteError(
            f"The weight of {type(layer).__name__}, {type(weight).__name__} of {weight.dtype}, cannot be read.",
            expected="bitsandbytes 4-bit or 8-bit, or a torchao tensor that can be dequantised.",
            fix="load the model without quantisation",
        ) from error
    smoothing = getattr(weight, "act_pre_scale", None)  # torchao multiplies x by it
    return dense if smoothing is None else dense * smoothing


def parts(layer: Any) -> tuple[str, list[Tensor]]:
    """(name of the format, the plain tensors that make up the packed weight), the same before and after repacking."""
    weight = layer.weight
    if four_bit(weight):
        numbers, scales = blocks(weight)
        state = weight.quant_state
        return f"bitsandbytes {state.quant_type}, blocks of {state.blocksize}", [numbers, scales.bfloat16()]
    dtype = str(weight.dtype).removeprefix("torch.")
    if library(weight) == "bitsandbytes":
        scales = [] if weight.is_floating_point() else [row_scales(layer)]
        return f"bitsandbytes {dtype}", [weight.data, *scales]
    return f"{library(weight)} {type(weight).__name__} of {dtype}", plain_tensors(weight)


def plain_tensors(tensor: Any) -> list[Tensor]:
    """The tensors inside a wrapper subclass, by torch's own protocol for those."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor.detach()]
    return [plain for name in tensor.__tensor_flatten__()[0] for plain in plain_tensors(getattr(tensor, name))]


def row_scales(layer: Any) -> Tensor:
    """(d_out,) largest value of each row of an 8-bit layer; its first call moves them from the weight to its state."""
    return layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB


def blocks(weight: Any) -> tuple[Tensor, Tensor]:
    """(two numbers a byte in the order of the dense weight (n, 1), the float32 scale of each block) of a 4-bit weight."""
    from bitsandbytes.functional import dequantize_blockwise  # pyright: ignore[reportMissingImports]

    state = weight.quant_state
    if repacked(weight):
        pairs = weight.data.reshape(-1, weight.data.shape[1], ROWS // 2, 2)  # tiles of 32 rows by 2 columns
        numbers = rearrange(torch.stack([pairs & 15, pairs >> 4], 2), "n k h m two -> (n h m k) two")
        return numbers[:, :1] << 4 | numbers[:, 1:], state.absmax.T.reshape(-1).float()
    scales = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    return weight.data.view(torch.uint8).reshape(-1, 1), scales.float()


def repacked(weight: Any) -> bool:
    return four_bit(weight) and getattr(weight.quant_state, "packing_format_for_cpu", False)


def repacking(model: nn.Module) -> list[nn.Module]:
    """The layers that are repacked when they run in eval mode."""
    present = model.modules() if "bitsandbytes" in sys.modules else ()
    return [module for module in present if vars(module).get(REPACKS)]


def keep_trainable(model: nn.Module) -> list[RemovableHandle]:
    """Hooks `trainable_again` on every layer that may be repacked, adapted or not: gradients pass through all of them."""
    again = [layer.register_forward_pre_hook(trainable_again, with_kwargs=True) for layer in repacking(model)]
    encoders = [module for module in model.modules() if isinstance(module, nn.TransformerEncoder)]
    return again + [encoder.register_forward_pre_hook(dense_again, with_kwargs=True) for encoder in encoders]


def dense_again(encoder: nn.TransformerEncoder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook: in eval mode torch packs a padded batch, since nothing of the frozen encoder needs a gradient, and its
    attention then fails on what an adapter needs one for. An input that asks for a gradient keeps the batch as it is.
    """
    src = args[0] if args else kwargs.get("src")
    if not torch.is_grad_enabled() or encoder.training or torch.compiler.is_compiling() or not isinstance(src, Tensor):
        return None
    if src.requires_grad or not src.is_floating_point():
        return None
    src = src.detach().requires_grad_()
    return ((src, *args[1:]), kwargs) if args else (args, {**kwargs, "src": src})


def trainable_again(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: before an input that asks for a gradient a repacked weight goes back, with the same dense numbers."""
    x, weight = args[0] if args else kwargs.get("x", next(iter(kwargs.values()))), layer.weight  # bitsandbytes calls it x
    if torch.is_grad_enabled() and x.requires_grad and repacked(weight):
        numbers, scales = blocks(weight)
        state = weight.quant_state
        weight.data = numbers.view(-1).view(weight.quant_storage).view(-1, 1)
        state.absmax, state.dtype, state.packing_format_for_cpu = scales, state.original_dtype, False


def refuse_without_gradient(model: nn.Module) -> None:
    """Raise where torchao rounds the activations of a layer, adapted or not: nothing before it would be trained."""
    for name, weight in model.named_parameters() if "torchao" in sys.modules else ():
        if any(getattr(weight, attribute, None) is not None for attribute in ROUNDS_ACTIVATIONS):
            raise LoraLiteError(
                f"No gradient passes {name.rpartition('.')[0] or 'this layer'}: torchao rounds its activations to integers.",
                expected="Weight-only quantisation under an adapter that is trained; ll.load takes such a base for inference.",
                fix="torchao.quantization.quantize_(model, torchao.quantization.Int8WeightOnlyConfig())",
            )


@contextlib.contextmanager
def as_stored(model: nn.Module) -> Iterator[None]:
    """Inside, no layer is repacked: what is measured in eval mode leaves the weights as they are."""
    layers = repacking(model)
    try:
        for layer in layers:
            setattr(layer, REPACKS, False)
        yield
    finally:
        for layer in layers:
            setattr(layer, REPACKS, True)
