"""What a Linear-like layer computes, measured on a few vectors as it is called: its own forward and the hooks of others.

The mode that the model is in decides nothing: layers are measured in eval mode, and all they keep comes back.
"""

import contextlib
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layer import Layer, oriented_weight, sizes
from .quantised import is_packed, library

KNOWN = ("torch.nn", "bitsandbytes", "torchao", "transformers.pytorch_utils", "accelerate")
"""Packages whose Linear-like layers compute W x + b, as their tests say here; others are measured."""
QUIET = (__name__.partition(".")[0], "torch", "accelerate")
"""Packages whose hooks leave the product of weight and input as it is."""
PROBES = 3


def odd_forward(layer: Layer) -> str:
    """What a call of a Linear-like layer does instead of W x + b; "" where it is that, or nobody can tell."""
    if is_packed(layer) or layer.weight.is_meta or library(layer.weight) != "torch" or hasattr(layer.weight, "full_tensor"):
        return ""
    hooked = bool(foreign(layer._forward_pre_hooks) or foreign(layer._forward_hooks))
    if not (hooked or is_own(layer)):
        return ""
    with kept(layer), torch.no_grad():
        odd = wrong(layer, layer.forward) if is_own(layer) else ""
        if odd or not hooked:
            return odd
        odd = wrong(layer, lambda x: called(layer, x))
    return "" if odd.startswith(RAISES) else odd and "a hook that stands on it changes what it returns"


RAISES = "its forward raises"


def is_own(layer: Layer) -> bool:
    """Whether the forward is neither torch's nor that of a library which is known, on the class or put on the layer."""
    put = vars(layer).get("forward")
    if "_hf_hook" in vars(layer):  # accelerate moves tensors around the forward that stood before
        put = vars(layer).get("_old_forward")
    if isinstance(put, types.MethodType) and put.__func__ is type(layer).forward:
        put = None
    if put is not None:
        return True
    return type(layer).forward is not nn.Linear.forward and not type(layer).__module__.startswith(KNOWN)


def foreign(hooks: dict[int, Callable[..., Any]]) -> dict[int, Callable[..., Any]]:
    return {
        key: hook for key, hook in hooks.items() if (getattr(hook, "__module__", None) or "").partition(".")[0] not in QUIET
    }


def wrong(layer: Layer, call: Callable[[Tensor], Any]) -> str:
    """How `call` differs from W x + b on vectors alone and in sequences; what it takes in one form only is judged by that."""
    weight, raised = oriented_weight(layer).detach(), []
    generator = torch.Generator().manual_seed(0)
    for shape in ((PROBES,), (2, PROBES)):
        x = torch.randn(*shape, sizes(layer)[0], generator=generator).to(weight.device, weight.dtype)
        try:
            y = call(x.clone())
        except Exception as error:  # whatever a stranger's layer raises
            raised.append(f"{RAISES} {type(error).__name__} on vectors of {sizes(layer)[0]}")
            continue
        if not isinstance(y, Tensor):
            return f"its forward returns {type(y).__name__}"
        want = F.linear(x, weight, layer.bias)
        if y.shape != want.shape:
            return f"its forward returns shape {tuple(y.shape)} for {tuple(x.shape)}"
        allowed = 64 * torch.finfo(weight.dtype).eps * want.abs().max().clamp(min=torch.finfo(weight.dtype).tiny)
        if not (y - want).abs().max() <= allowed:
            return "its forward is not W x + b"
    return raised[0] if len(raised) == 2 else ""


def called(layer: Layer, x: Tensor) -> Any:
    """layer(x) with the hooks of strangers alone."""
    args, kwargs = (x,), {}
    for key, hook in foreign(layer._forward_pre_hooks).items():
        if key in layer._forward_pre_hooks_with_kwargs:
            args, kwargs = hook(layer, args, kwargs) or (args, kwargs)
        elif (given := hook(layer, args)) is not None:
            args = given if isinstance(given, tuple) else (given,)
    y = layer.forward(*args, **kwargs)
    for key, hook in foreign(layer._forward_hooks).items():
        given = hook(layer, args, kwargs, y) if key in layer._forward_hooks_with_kwargs else hook(layer, args, y)
        y = y if given is None else given
    return y


@contextlib.contextmanager
def kept(layer: nn.Module) -> Iterator[None]:
    """Inside, the layer is in eval mode and may draw and write: its mode, its buffers, torch's generators and what hooks note
    come back.
    """
    modes = [(module, module.training) for module in layer.modules()]
    hooks = [*foreign(layer._forward_pre_hooks).values(), *foreign(layer._forward_hooks).values()]
    cells = [cell for hook in hooks for cell in getattr(hook, "__closure__", None) or ()]
    values = [(cell, cell.cell_contents) for cell in cells]
    containers, tensors = notes(hooks)
    before = [(one, one.copy()) for one in containers]
    numbers = [(tensor, tensor.detach().clone()) for tensor in (*layer.buffers(), *tensors)]
    try:
        for module, _ in modes:
            module.training = False
        with torch.random.fork_rng(devices=[tensor.device for tensor in layer.parameters() if tensor.is_cuda][:1]):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for cell, value in values:
            cell.cell_contents = value
        for now, then in before:
            put_back(now, then)
        with torch.no_grad():
            for tensor, then in numbers:
                if not torch.equal(tensor, then):
                    tensor.copy_(then)


DEPTH = 4  # of tables in lists in objects


def notes(hooks: list[Any]) -> tuple[list[Any], list[Tensor]]:
    """(lists, tables, sets, tensors) that hooks may write into: in what they close over, were given, or name in their file."""
    todo: list[tuple[Any, int]] = []
    for hook in hooks:
        given = hook, getattr(hook, "__self__", None), *getattr(hook, "args", ()), getattr(hook, "keywords", None)
        todo += [(one, DEPTH) for one in given]
        with contextlib.suppress(TypeError):  # no function of Python's
            known = inspect.getclosurevars(getattr(hook, "func", hook))
            todo += [(one, DEPTH) for one in (*known.nonlocals.values(), *known.globals.values())]
    seen: dict[int, Any] = {}
    while todo:
        one, depth = todo.pop()
        if id(one) in seen or not depth or isinstance(one, (type, types.ModuleType, nn.Parameter)):
            continue
        table = vars(one) if hasattr(one, "__dict__") and not isinstance(one, Tensor) else one
        seen[id(one)] = table
        inner = table.items() if isinstance(table, dict) else enumerate(table) if isinstance(table, (list, set, tuple)) else ()
        todo += [(value, depth - 1) for name, value in inner if not (isinstance(one, nn.Module) and str(name).startswith("_"))]
    found = seen.values()
    return [t for t in found if isinstance(t, (dict, list, set))], [t for t in found if isinstance(t, Tensor)]


def put_back(now: Any, then: Any) -> None:
    if isinstance(now, dict):
        for key in [key for key in now if key not in then]:
            del now[key]
        now.update({key: value for key, value in then.items() if now.get(key, now) is not value})
    elif isinstance(now, list):
        now[:] = then
    else:
        now.clear()
        now.update(then)
