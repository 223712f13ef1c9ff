"""What a training step may move: every declared tensor, nothing of the base, and decay only what allows it."""

import copy
import functools
import tempfile
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...contract.config import AdapterConfig
from ...core.detach import detach
from ...core.load import load
from ...core.runtime import param_groups
from ...core.save import save
from .. import toy
from .judging import Variant, demand, error, perturbed


def check_every_tensor_matters(cls: Variant, cfg: AdapterConfig) -> None:
    """Moving any one trainable tensor of a perturbed adapter changes the output."""
    model, handle = perturbed(cls, cfg)
    x = toy.inputs(3, 5, toy.WIDTH)
    with torch.no_grad():
        before = model(x)
        for name in {name for adapter in handle.layers.values() for name, _ in adapter.named_parameters()}:
            for sign in (1, -1):
                state = copy.deepcopy(model.state_dict())
                for adapter in handle.layers.values():
                    parameter = dict(adapter.named_parameters()).get(name)
                    if parameter is not None:
                        moved = sign * 0.5 * float(parameter.abs().mean()) * toy.inputs(*parameter.shape, seed=3)
                        parameter.add_(moved.to(parameter.dtype))
                changed = error(model(x), before) > 1e-6
                model.load_state_dict(state)
                if changed:
                    break
            demand(changed, f"moving {name} changes nothing")


def check_gradients_flow(cls: Variant, cfg: AdapterConfig) -> None:
    """Some tensor has a gradient at step one, every one by step two, for a loss or its negative; the base never has."""
    x, probe = toy.inputs(4, 6, toy.WIDTH), toy.inputs(4, 6, toy.WIDTH, seed=5)
    seen: list[set[str]] = [set(), set()]
    for sign in (1.0, -1.0):
        model = toy.toy()
        handle = toy.attached(model, cls, cfg)
        model.train()
        optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2))
        for step in range(2):
            optimizer.zero_grad()
            (sign * (model(x) * probe).sum()).backward()
            for adapter in handle.layers.values():
                for name, parameter in adapter.named_parameters():
                    gradient = cast(Tensor, parameter.grad)
                    demand(gradient is not None, f"{name} takes no part in the output")
                    demand(gradient.isfinite().all(), f"the gradient of {name} is not finite")
                    if gradient.any():
                        seen[step].add(name)
            base = [k for k, p in model.named_parameters() if p.grad is not None and f".{handle.name}." not in k]
            demand(not base, f"the base has gradients: {base}")
            optimizer.step()
    names = {name for adapter in handle.layers.values() for name, _ in adapter.named_parameters()}
    demand(seen[0], "no tensor has a gradient at step one")
    demand(seen[0] | seen[1] == names, f"no gradient by step two: {sorted(names - seen[0] - seen[1])}")


def check_base_is_never_written(cls: Variant, cfg: AdapterConfig) -> None:
    """Values and version counters of the base survive attach, training, save, load and detach."""
    model = toy.toy()
    tensors = dict(model.named_parameters())
    before = {k: (t.detach().clone(), t._version) for k, t in tensors.items()}
    toy.attached(model, cls, cfg)
    model.train()
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2, weight_decay=0.1))
    for _ in range(2):
        optimizer.zero_grad()
        model(toy.inputs(3, 5, toy.WIDTH)).square().mean().backward()
        optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder) / "a.safetensors")
        load(model, Path(folder) / "a.safetensors", name="again")
        model(toy.inputs(3, 5, toy.WIDTH))
    detach(model)
    for key, tensor in tensors.items():
        demand(torch.equal(tensor, before[key][0]), f"{key} was written")
        demand(tensor._version == before[key][1], f"{key} was written in place and put back")


def check_decay_spares_identity(cls: Variant, cfg: AdapterConfig) -> None:
    """Weight decay through param_groups shrinks the tensors that declare it and moves no other."""
    model, handle = perturbed(cls, cfg)
    before = {p: {k: t.detach().clone() for k, t in a.named_parameters()} for p, a in handle.layers.items()}
    optimizer = torch.optim.AdamW(param_groups(model, lr=0.1, weight_decay=1.0))
    for parameter in handle.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for path, adapter in handle.layers.items():
        for name, spec in adapter.specs().items():
            if spec.trainable:
                factor = 1 - (spec.lr or 0.1) * 1.0 if spec.decay else 1.0
                now, then = getattr(adapter, name).detach(), before[path][name]
                demand(
                    error(now, then * factor) < 1e-6,
                    f"decay moved {name} to {float(now.norm() / then.norm()):.2f} of it",
                )


def check_checkpointing_is_exact(cls: Variant, cfg: AdapterConfig) -> None:
    """Non-reentrant gradient checkpointing in train mode, from one seed: same output, same gradients."""
    model, handle = perturbed(cls, cfg)
    model.train()
    x = toy.inputs(3, 5, toy.WIDTH)
    results = []
    for run in (model, lambda z: checkpoint(model, z, use_reentrant=False)):
        model.zero_grad()
        out = toy.seeded(functools.partial(run, x))
        out.square().mean().backward()
        results.append([out.detach(), *(p.grad.clone() for p in handle.parameters() if p.grad is not None)])
    demand(all(map(torch.equal, *results)), "checkpointing changes output or gradients")
