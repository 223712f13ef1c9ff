"""The time that a method cannot go below on this machine: the bare model, its extra multiply-adds and its extra bytes.

Multiply-adds are those of matrix products, counted while ours runs; factorizations and elementwise work count as bytes alone.
Bytes are the adapter's tensors and, once in and once out, the activations that it changes.
"""

import statistics
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common.measure import forward_backward, seconds
from lora_lite.core.finding import adapters

TENSOR_PASSES = {"forward": 1, "step": 3}  # read in forward and in backward, gradient written
ACTIVATION_PASSES = {"forward": 2, "step": 4}  # read and written, and the gradient likewise
REPEATS = 15


def rates(width: int, ids: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """Multiply-adds per second of x W, x (tokens, width), W (width, width), and bytes per second of a copy of three such x."""
    x = torch.randn(ids.numel(), width, device=ids.device, dtype=dtype)
    W = torch.randn(width, width, device=ids.device, dtype=dtype)
    wide = x.repeat(1, 3)
    product = statistics.median([seconds(lambda: x @ W) for _ in range(REPEATS)][1:])
    copy = statistics.median([seconds(wide.clone) for _ in range(REPEATS)][1:])
    return {"multiply_adds_per_second": x.numel() * width / product, "bytes_per_second": 2 * wide.nbytes / copy}


def flop_counter() -> FlopCounterMode:
    """torch's, which leaves out the product that adds to a tensor in place."""

    def added(y: list[int], a: list[int], b: list[int], **_: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added})


def multiply_adds(model: nn.Module, ids: Tensor) -> dict[str, int]:
    """Of one forward without gradients, in which what the forward before it kept is not computed again, and of one step."""
    with torch.no_grad(), flop_counter() as evaluation:
        model(input_ids=ids)
    with flop_counter() as step:
        forward_backward(model, ids)
    return {"forward": evaluation.get_total_flops() // 2, "step": step.get_total_flops() // 2}


def moved_bytes(model: nn.Module, ids: Tensor) -> dict[str, int]:
    """Of the adapters' tensors, as often as each is used, and of the activations that they change, in their layer's dtype."""
    tensors, activations = 0, 0
    for _, layer, _, adapter in adapters(model):
        tensors += sum(t.numel() * t.element_size() for t in adapter.tensors().values())
        changed = adapter.d_in * adapter.changes_input() + adapter.d_out * adapter.changes_output()
        activations += ids.numel() * changed * layer.weight.element_size()
    return {kind: TENSOR_PASSES[kind] * tensors + ACTIVATION_PASSES[kind] * activations for kind in TENSOR_PASSES}


def extra(ours: nn.Module, bare: dict[str, int], ids: Tensor) -> dict[str, dict[str, int]]:
    """{"forward" | "step": {"multiply_adds", "bytes"}} that ours needs above the multiply-adds of the bare model."""
    more, moved = multiply_adds(ours, ids), moved_bytes(ours, ids)
    return {kind: {"multiply_adds": more[kind] - bare[kind], "bytes": moved[kind]} for kind in more}


def least_seconds(work: dict[str, int], rate: dict[str, float]) -> float:
    return work["multiply_adds"] / rate["multiply_adds_per_second"] + work["bytes"] / rate["bytes_per_second"]
