"""Starts from data: refused without it, the same for any batching, blind to padding."""

import copy
from typing import cast

import torch

from ...calibration.measure import measure
from ...contract.config import AdapterConfig
from ...core.attach import attach
from ...errors import LoraLiteError
from ...sites.layer import Layer
from .. import toy
from .judging import Variant, demand, demand_same, error, photograph


def check_needs_data(cls: Variant, cfg: AdapterConfig) -> None:
    """Where data is needed: refused without it, sums independent of the batching, padding without influence, modes restored."""
    if not cls.needs(cfg):
        return
    model = toy.toy()
    before = photograph(model)
    try:
        attach(model, cfg)
    except LoraLiteError as refusal:
        demand("calibration_data" in str(refusal), "the error does not name calibration_data")
    else:
        raise AssertionError("attach went on without the data that the variant needs")
    demand_same(model, before, "after a refused attach")
    model.train()
    model.blocks[0].eval()
    modes = [m.training for m in model.modules()]
    states = []
    for filler in (0.0, 1e3):
        fresh = copy.deepcopy(model)
        data = toy.batches()
        for batch in data:
            batch["x"][batch["attention_mask"] == 0] = filler
        wanted = [name for name in (*cls.needs(cfg), *cls.wants(cfg)) if ":" not in name]
        split = [{k: v[i : i + 1] for k, v in batch.items()} for batch in data for i in range(4)]
        layers = {p: cast(Layer, fresh.get_submodule(p)) for p in ("blocks.0.q_proj", "blocks.1.down_proj")}
        whole, parts = measure(fresh, layers, wanted, data), measure(fresh, layers, wanted, split)
        for name in wanted:
            for path in layers:
                demand(error(parts[name][path], whole[name][path]) < 1e-6, f"{name} depends on the batch size")
        demand([m.training for m in fresh.modules()] == modes, "calibration changes training modes")
        if toy.calibration(cls, cfg) is not None and not isinstance(toy.calibration(cls, cfg), dict):
            attach(fresh, cfg, data)
            states.append(fresh.state_dict())
    if states:
        demand(all(torch.equal(states[0][k], states[1][k]) for k in states[0]), "padding has an influence")
