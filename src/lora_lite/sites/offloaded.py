"""Weights that accelerate keeps elsewhere (cpu_offload, disk_offload) and lends to a layer for its own forward alone."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..errors import LoraLiteError

REMOVE = "accelerate.hooks.remove_hook_from_module(model, recurse=True)  # and offload it again afterwards"


def hooks_of(module: nn.Module) -> list[Any]:
    hook = vars(module).get("_hf_hook")
    return [] if hook is None else [hook, *getattr(hook, "hooks", ())]


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate exchanges the module's tensors around each of its calls."""
    return any(getattr(hook, "weights_map", None) is not None for hook in hooks_of(module))


def present(module: nn.Module, name: str) -> Tensor | None:
    """The tensor `name` of the module, fetched where it is offloaded. Raises LoraLiteError where nobody has its numbers."""
    tensor = getattr(module, name)
    if tensor is None or not tensor.is_meta:
        return tensor
    for hook in hooks_of(module):
        numbers = getattr(hook, "weights_map", None)
        if numbers is not None:
            return numbers[name].to(hook.execution_device)
    raise LoraLiteError(
        f"The {name} of {type(module).__name__} is on the meta device.",
        expected="Numbers, in memory or kept by accelerate's offloading.",
        fix=REMOVE,
    )


def with_tensors(module: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """call(x), a method of the module beside its forward, with the module's tensors in memory where they are offloaded."""
    hook = vars(module).get("_hf_hook")
    if hook is None:
        return call(x)
    args, _ = hook.pre_forward(module, x)
    return hook.post_forward(module, call(*args))
