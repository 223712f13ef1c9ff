"""A model seen from outside: its Linear-like layers by path, and the wrappers of other programs around it."""

import contextlib
import gc
import re
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from ..errors import LoraLiteError, LoraLiteWarning
from .layer import Layer, is_linear


def block_lists(model: nn.Module) -> dict[str, list[str]]:
    """{path of a list of blocks: paths of its blocks}: the outermost lists of modules that hold Linear-like layers.

    A list is an nn.ModuleList, or where the model has none of those a module with two or more numbered children of one class.
    """
    with_linears = {
        ".".join(parts[:k]) for path in linears(model) for parts in [path.split(".")] for k in range(1, len(parts) + 1)
    }
    modules = dict(model.named_modules())

    def outermost(is_list: Callable[[nn.Module], bool]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for path, module in modules.items():
            if is_list(module) and not any(path == b or path.startswith(f"{b}.") for blocks in found.values() for b in blocks):
                blocks = [f"{path}.{name}".lstrip(".") for name, _ in module.named_children()]
                if blocks and any(block in with_linears for block in blocks):
                    found[path] = blocks
        return found

    def numbered(module: nn.Module) -> bool:
        children = dict(module.named_children())
        return len(children) > 1 and all(map(str.isdecimal, children)) and len(set(map(type, children.values()))) == 1

    return outermost(lambda m: isinstance(m, nn.ModuleList)) or outermost(numbered)


def block_index(path: str, lists: dict[str, list[str]]) -> tuple[str, int] | None:
    """(path of the list, index) of the block that holds this place."""
    for name, blocks in lists.items():
        for index, block in enumerate(blocks):
            if path == block or path.startswith(f"{block}."):
                return name, index
    return None


def base_model(model: nn.Module) -> nn.Module:
    """transformers' `base_model`, the model less its task heads; the model itself where it has none."""
    base = getattr(model, "base_model", model)
    return base if isinstance(base, nn.Module) else model


def embeddings(model: nn.Module) -> dict[int, str]:
    """{id of a weight: path} of the embeddings."""
    kinds = (nn.Embedding, nn.EmbeddingBag)
    return {id(m.weight): path for path, m in model.named_modules() if isinstance(m, kinds)}


def output_embeddings(model: nn.Module) -> set[int]:
    """ids of the modules that this model and the models inside it call their output embeddings."""
    found = set()
    for module in model.modules():
        asked = getattr(module, "get_output_embeddings", None)
        if callable(asked):
            with contextlib.suppress(Exception):  # a model of another library may not answer
                found.add(id(asked()))
    return found - {id(None)}


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


def refuse_no_module(model: Any) -> None:
    """Raise for what is no module of Python's: None, a list, a pipeline that holds models, what torch.jit made."""
    if isinstance(model, torch.jit.ScriptModule):
        raise LoraLiteError(
            f"The model is a {type(model).__name__} of torch.jit, which runs no hooks that come later.",
            expected="The module that torch.jit was given.",
            fix="ll.attach(model, cfg)  # before torch.jit.trace(model, x)",
        )
    if isinstance(model, nn.Module):
        return
    parts = [name for name, part in vars(model).items() if isinstance(part, nn.Module)] if hasattr(model, "__dict__") else []
    parts.sort(key=lambda name: name not in ("unet", "transformer", "model"))
    named = [f"pipe.{name}" for name in parts]
    raise LoraLiteError(
        f"A {type(model).__name__} is no model.",
        expected="A torch.nn.Module.",
        found=f"It holds {', '.join(named)}." if named else "",
        fix=f"ll.attach({named[0]}, cfg)"
        if named
        else "ll.attach(model, cfg)  # one module; of a pipeline pipe.unet or pipe.transformer",
    )


def refuse_wrapped(model: nn.Module) -> None:
    """Raise where hooks would go unseen or processes drift apart: compiled, sharded or replicated models."""
    refuse_no_module(model)
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
