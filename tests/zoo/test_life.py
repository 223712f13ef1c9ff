"""An adapter from attach to detach: start, training, file, merge, and nothing left of it."""

import torch
from torch import nn

import lora_lite as ll

from .models import ZOO, forward
from .running import attached, demand_close, demand_equal, demand_moved, every, frozen, loss, state, strong, train


@every
def test_the_start_is_the_base_bit_for_bit(name):
    _, model, batch = frozen(name)
    base = forward(model, batch)
    attached(model)
    demand_equal(forward(model, batch), base)


@every
def test_three_steps_move_the_output_and_not_the_base(name):
    _, model, batch = frozen(name)
    before, base = state(model), forward(model, batch)
    handle = attached(model)
    start = {path: [p.detach().clone() for p in adapter.parameters()] for path, adapter in handle.layers.items()}
    train(model)
    optimizer = torch.optim.AdamW(ll.param_groups(model, lr=1e-2))
    for _ in range(3):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    model.eval()
    demand_moved(forward(model, batch), base)
    moved = {
        path for path, a in handle.layers.items() if any(not torch.equal(p, q) for p, q in zip(a.parameters(), start[path]))
    }
    assert moved >= handle.layers.keys() - set(ll.status(model).dead) - WITHOUT_GRADIENT.get(name, set())
    with ll.disabled(model):
        demand_equal(forward(model, batch), base)
    after = state(model)
    demand_equal({key: after[key] for key in before}, before)


POOLER = {"model.vision_tower.head.mlp.fc1", "model.vision_tower.head.mlp.fc2"}
WITHOUT_GRADIENT = {"fnet": {"fnet.pooler.dense"}, "gemma3": POOLER, "paligemma": POOLER}
"""Layers that change nothing of what the model puts out."""


@every
def test_a_file_brings_the_output_back_bit_for_bit(name, tmp_path):
    row, model, batch = frozen(name)
    strong(attached(model)).save(tmp_path / "a.safetensors")
    fresh = row.build().requires_grad_(False)
    base = forward(fresh, batch)
    ll.load(fresh, tmp_path / "a.safetensors")
    wanted = forward(model, batch)
    demand_moved(wanted, base)
    demand_equal(forward(fresh, batch), wanted)


@every
def test_merge_holds_the_change_and_unmerge_every_bit(name):
    _, model, batch = frozen(name)
    strong(attached(model))
    before, wanted = state(model), forward(model, batch)
    ll.merge(model)
    demand_close(forward(model, batch), wanted, 1e-4)
    ll.unmerge(model)
    demand_equal(state(model), before)
    demand_equal(forward(model, batch), wanted)


@every
def test_detach_leaves_nothing(name):
    row = ZOO[name]
    model, batch = row.build(), row.batch()
    next(model.parameters()).requires_grad_(False)
    before, base = state(model), forward(model, batch)
    flags = {key: p.requires_grad for key, p in model.named_parameters()}
    modules, hooks = [key for key, _ in model.named_modules()], hook_counts(model)
    handle = strong(attached(model))
    assert not any(p.requires_grad for key, p in model.named_parameters() if key in flags)
    forward(model, batch)
    handle.detach()
    after = state(model)
    assert [*after] == [*before]
    demand_equal(after, before)
    assert {key: p.requires_grad for key, p in model.named_parameters()} == flags
    assert [key for key, _ in model.named_modules()] == modules
    assert hook_counts(model) == hooks
    assert not any(module.training for module in model.modules())
    demand_equal(forward(model, batch), base)


def hook_counts(model: nn.Module) -> list[tuple[int, int]]:
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
