"""A model seen from outside: its Linear-like layers by path, and the wrappers of other programs around it."""

import gc
import re
import warnings
from collections import Counter
from typing import cast

import torch
from torch import nn

from ..errors import LoraLiteError, LoraLiteWarning, some
from .layer import Layer, is_linear


def block_index(path: str) -> int | None:
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    return int(found[1]) if found else None


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own model inside DDP, DataParallel and torch.compile, whose paths are the ones that are saved."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


WRAPPING = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?:\.|$)")


def plain(path: str) -> str:
    """The path without the names that torch.compile, checkpoint_wrapper and FSDP put around inner modules."""
    return WRAPPING.sub("", path).removesuffix(".")


def is_compiled(module: nn.Module) -> bool:
    """By torch.compile(module) or module.compile()."""
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None


def refuse_wrapped(model: nn.Module) -> None:
    """Raise where hooks would go unseen or processes drift apart: compiled, sharded or replicated models."""
    order = "ll.attach(model, cfg); model = torch.compile(model)  # the same order for fully_shard and DDP"
    for path, module in model.named_modules():
        compiled = is_compiled(module)
        wrapped = type(module).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel")
        if compiled or wrapped:
            raise LoraLiteError(
                f"{path or 'The model'} is {'compiled' if compiled else f'wrapped in {type(module).__name__}'}.",
                expected="Adapters join a plain model: hooks that arrive later are not seen.",
                fix=order,
            )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for path, parameter in model.named_parameters():
            if hasattr(parameter, "full_tensor"):
                raise LoraLiteError(f"{path} is sharded (DTensor).", expected="Adapters join a plain model.", fix=order)
        warn_replicated(model)


def warn_replicated(model: nn.Module) -> None:
    """Warn where a DistributedDataParallel around this model is alive: parameters that join now are unknown to it."""
    wrapper = nn.parallel.DistributedDataParallel
    replicas = [found for found in gc.get_objects() if type(found) is wrapper]
    if any(module is model for replica in replicas for module in replica.modules()):
        warnings.warn(
            "A DistributedDataParallel holds this model and does not average gradients of what is attached now. "
            "Wrap it again: replica = DistributedDataParallel(model)",
            LoraLiteWarning,
            stacklevel=5,
        )


def linears(model: nn.Module) -> dict[str, Layer]:
    return {path: cast(Layer, layer) for path, layer in model.named_modules() if is_linear(layer)}


def inventory(paths: list[str]) -> str:
    """'Linears in this model: q_proj x6, v_proj x6'."""
    counts = Counter(path.rpartition(".")[2] for path in paths)
    return "Linears in this model: " + some([f"{leaf} x{n}" for leaf, n in counts.items()], most=12) + "."
