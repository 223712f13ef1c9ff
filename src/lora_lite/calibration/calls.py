"""Calling a model on calibration batches: the device, the mode and the precision."""

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoraLiteError
from ..sites.model import unwrapped


def field(output: Any, name: str) -> Tensor | None:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def on_device(model: nn.Module, batch: Any) -> Any:
    """The batch, a mapping, a tuple or list, or a tensor, with its tensors on the model's device."""
    device = next(model.parameters()).device

    def move(value: Any) -> Any:
        return value.detach().to(device).contiguous() if isinstance(value, Tensor) else value  # models call .view

    if isinstance(batch, Mapping):
        return {name: move(value) for name, value in batch.items()}
    return tuple(map(move, batch)) if isinstance(batch, (tuple, list)) else move(batch)


def parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Of the forward; none where python cannot tell."""
    try:
        return inspect.signature(unwrapped(model).forward).parameters
    except (AttributeError, TypeError, ValueError):
        return {}


def call(model: nn.Module, batch: Any) -> Any:
    """The model's output. An attention_mask stays with us where the model takes none."""
    if isinstance(batch, Mapping):
        known = parameters(model) if "attention_mask" in batch else {}
        if known and "attention_mask" not in known and all(p.kind is not p.VAR_KEYWORD for p in known.values()):
            batch = {name: value for name, value in batch.items() if name != "attention_mask"}
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


class Mine(threading.local):
    """Whether this thread is the one that made it; torch.compile reads this, and not threading.get_ident."""

    def __init__(self) -> None:  # in every thread
        self.here = False


def of_this_thread(hook: Callable[..., Any], also: Callable[[], bool] = lambda: False) -> Callable[..., Any]:
    """The hook for calls in this thread, and in others while `also`: a model may serve while it is measured."""
    mine = Mine()
    mine.here = True

    def only(*args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs) if mine.here or also() else None

    return only


@contextlib.contextmanager
def evaluating(model: nn.Module, gradients: bool = False) -> Iterator[None]:
    """eval mode, every parameter frozen, grad mode as asked; modes and flags come back, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        with torch.set_grad_enabled(gradients):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter in trainable:
            parameter.requires_grad_(True)


def refuse_one_batch(batches: Any) -> None:
    """Raise LoraLiteError for what is no iterable of batches, above all for one batch itself."""
    if isinstance(batches, (Mapping, Tensor)) or not isinstance(batches, Iterable):
        raise LoraLiteError(f"batches is a {type(batches).__name__}.", expected="An iterable of batches.", fix="[batch]")


def ambient(device: str) -> torch.autocast:
    """The autocast of the moment, to enter again."""
    return torch.autocast(device, dtype=torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device))


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """float32 products without autocast and TF32, whose 8 and 10 bits would be the accuracy of the sums."""
    matmul = torch.backends.cuda.matmul
    setting, exact = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    before = getattr(matmul, setting)
    setattr(matmul, setting, exact)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        setattr(matmul, setting, before)
