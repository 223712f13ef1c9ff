"""Attach and detach leave no trace; copies and stacked adapters are independent."""

import copy
from typing import Any
from unittest import mock

import torch

from ...contract.adapter import Adapter
from ...contract.config import AdapterConfig
from ...core.coefficients import disabled, scale
from ...core.detach import detach
from ...core.finding import adapters
from .. import toy
from .judging import Variant, demand, demand_same, error, perturbed, photograph


def check_detach_is_exact(cls: Variant, cfg: AdapterConfig) -> None:
    """Values, key order, flags, hooks and classes are as before attach, also on a deep copy."""
    model = toy.toy()
    model.get_parameter("blocks.0.q_proj.weight").requires_grad_(False)
    before = photograph(model)
    handle = toy.perturb(toy.attached(model, cls, cfg))
    twin = copy.deepcopy(model)
    detach(twin)
    demand_same(twin, before, "after detach of a deep copy")
    demand(adapters(model), "detaching a copy detached the original")
    handle.detach()
    demand_same(model, before, "after detach")


def check_failed_attach_leaves_no_trace(cls: Variant, cfg: AdapterConfig) -> None:
    """A failure at the last layer, while filling or while installing, leaves the model untouched."""
    for method in ("start", "install"):
        model = toy.toy()
        before = photograph(model)
        original, calls, last = getattr(Adapter, method), [0], len(toy.attached(toy.toy(), cls, cfg).layers)

        def failing(self: Adapter, *args: Any, original: Any = original, calls: Any = calls, last: int = last) -> Any:
            calls[0] += 1
            if calls[0] == last:
                raise KeyboardInterrupt
            return original(self, *args)

        with mock.patch.object(Adapter, method, failing):
            try:
                toy.attached(model, cls, cfg)
            except KeyboardInterrupt:
                demand_same(model, before, f"after an interruption in {method}")
            else:
                raise AssertionError("the interruption was swallowed")


def check_deepcopy_is_independent(cls: Variant, cfg: AdapterConfig) -> None:
    """A deep copy gives the same output and ignores later changes of the original."""
    model, handle = perturbed(cls, cfg)
    x = toy.inputs(3, 5, toy.WIDTH)
    wanted = model(x)
    twin = copy.deepcopy(model)
    demand(torch.equal(twin(x), wanted), "a deep copy gives another output")
    toy.perturb(handle, 1.0, seed=7)
    scale(model, 0.0)
    demand(torch.equal(twin(x), wanted), "the copy follows the original")


def check_stacks(cls: Variant, cfg: AdapterConfig) -> None:
    """Two adapters of one model both act, each answers to its name, and both orders of detaching end at the base."""
    x = toy.inputs(3, 5, toy.WIDTH)
    for leaving in (("first", "second"), ("second", "first")):
        model = toy.toy()
        before, base = photograph(model), model(x)
        toy.perturb(toy.attached(model, cls, cfg, name="first"), seed=2)
        alone = model(x)
        toy.perturb(toy.attached(model, cls, cfg, name="second"), seed=3)
        both = model(x)
        demand(error(both, alone) > 1e-5, "the second adapter changes nothing")
        with disabled(model, "second"):
            demand(torch.equal(model(x), alone), "disabling the second does not leave the first")
        with disabled(model, "first"):
            demand(error(model(x), both) > 1e-5, "the first fell silent when the second came")
        with disabled(model):
            demand(torch.equal(model(x), base), "disabling both is not the base")
        detach(model, leaving[0])
        if leaving[0] == "second":
            demand(torch.equal(model(x), alone), "detaching the second does not leave the first")
        detach(model, leaving[1])
        demand_same(model, before, f"after detaching {leaving}")
