"""Real architectures with weights of zeros, of rank 1, tiny and large: every variant is lawful, or says why not."""

import dataclasses
import warnings

import pytest
import torch

import lora_lite as ll
from lora_lite.calibration.statistics import parse
from lora_lite.sites.model import linears
from lora_lite.testing import toy

from .models import forward
from .running import demand_equal, frozen, loss, state

SAMPLE = ["qwen3", "gpt2", "bert", "bart", "vit", "switch_transformers"]


@torch.no_grad()
def harden(model):
    """Every kind of weight in turn."""
    for number, layer in enumerate(linears(model).values()):
        W = layer.weight
        if number % 4 == 0:
            W.zero_()
        elif number % 4 == 1:
            W.copy_(torch.outer(*(torch.linspace(-0.3, 0.3, n) for n in W.shape)))
        else:
            W.mul_(1e-30 if number % 4 == 2 else 1e3)


def attached(model, name, batch):
    cls = ll.get(name)
    cfg = toy.small(cls)
    sizes = {field: 4 for field in ("r", "k") if getattr(cfg, field, None) == 8}
    cfg = dataclasses.replace(cfg, **sizes)
    needs = cls.needs(cfg)
    data = {"positive": [batch], "negative": [batch]} if any(parse(need).label for need in needs) else [batch]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ll.LoraLiteWarning)
        return ll.attach(model, cfg, data if needs else None)


@pytest.mark.long
@pytest.mark.parametrize("variant", ll.names())
@pytest.mark.parametrize("name", SAMPLE)
def test_hard_weights_in_real_architectures(name, variant):
    _, model, batch = frozen(name)
    harden(model)
    before, base = state(model), forward(model, batch)
    try:
        handle = attached(model, variant, batch)
    except ll.LoraLiteError:
        if not ll.get(variant).needs(toy.small(ll.get(variant))):
            raise
        demand_equal(state(model), before)  # the data says too little of dead layers
        return
    demand_equal(forward(model, batch), base)
    toy.perturb(handle)
    loss(model, batch).backward()
    if all(z.isfinite().all() for z in forward(model, batch).values()):
        assert all(p.grad is None or p.grad.isfinite().all() for p in handle.parameters())
    with ll.disabled(model):
        demand_equal(forward(model, batch), base)
    handle.detach()
    demand_equal(state(model), before)
