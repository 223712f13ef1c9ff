"""All or nothing: what changes a model leaves it as it was when it is interrupted, at any line and by any exception."""

import functools
import gc
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from ..contract.rows import entries
from .finding import adapters

P = ParamSpec("P")
T = TypeVar("T")


class Before:
    """A model at one moment: the attributes of every module, one level deep, flags of parameters, and what belongs to adapters.

    contents  tensors whose numbers are kept as well, where they are about to be written to
    """

    def __init__(self, model: nn.Module, contents: Iterable[Tensor] = ()):
        modules = list(model.modules())
        groups = {id(f.adapter.group): f.adapter.group for f in adapters(model)}.values()
        holders: list[Any] = [*modules, *groups, *(g.base for g in groups), *(g.lineage for g in groups), *entries(modules)]
        self.kinds = [(module, type(module)) for module in modules]
        self.attributes = [(vars(holder), dict(vars(holder))) for holder in holders]
        values = [one for _, attributes in self.attributes for one in attributes.values()]
        self.containers = [(one, copied(one)) for one in values if isinstance(one, (dict, list, set))]
        self.flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self.numbers = [(tensor, tensor.detach().clone()) for tensor in contents]
        self.random, self.gradients, self.collecting = torch.get_rng_state(), torch.is_grad_enabled(), gc.isenabled()

    def restore(self) -> None:
        for module, kind in self.kinds:
            if type(module) is not kind:
                module.__class__ = kind
        for now, then in self.attributes:
            put_back(now, then)
        for now, then in self.containers:
            put_back(now, then)
        for parameter, flag in self.flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
        with torch.no_grad():
            for tensor, numbers in self.numbers:
                tensor.copy_(numbers)
        torch.set_rng_state(self.random)
        torch.set_grad_enabled(self.gradients)
        if self.collecting:
            gc.enable()


def copied(one: Any) -> Any:
    return dict(one) if isinstance(one, dict) else list(one) if isinstance(one, list) else set(one)


def put_back(now: Any, then: Any) -> None:
    """A container's content, in place, since hooks and others refer to it; untouched where nothing differs."""
    if isinstance(now, dict):
        for key in [key for key in now if key not in then]:
            del now[key]
        if list(now) != list(then):  # hooks and children act in their order
            now.clear()
        for key, value in then.items():
            if key not in now or now[key] is not value:
                now[key] = value
    elif isinstance(now, list):
        if len(now) != len(then) or any(a is not b for a, b in zip(now, then)):
            now[:] = then
    elif now != then:
        now.clear()
        now.update(then)


def atomic(change: Callable[P, T]) -> Callable[P, T]:
    """A function of a model that either returns or leaves the model, and torch's generator, as they were."""

    @functools.wraps(change)
    def whole(*args: P.args, **kwargs: P.kwargs) -> T:
        model: Any = args[0] if args else kwargs.get("model")
        before = Before(model) if isinstance(model, nn.Module) else None
        try:
            return change(*args, **kwargs)
        except BaseException:
            if before is not None:
                before.restore()
            raise

    return whole


def changing(model: nn.Module, tensors: Iterable[Tensor], change: Callable[[], T]) -> T:
    """What `change()` returns, which writes into these tensors; where it does not, all is as it was."""
    before = Before(model, tensors)
    try:
        return change()
    except BaseException:
        before.restore()
        raise
