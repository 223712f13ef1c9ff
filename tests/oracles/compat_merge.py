"""Columns of the compatibility table: merging and algebra of one variant, from its name alone."""

import dataclasses

import torch

import lora_lite as ll
from lora_lite.core.delta import effective
from lora_lite.testing import toy
from lora_lite.testing.checks import demand, demand_same, photograph


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


def check_merge(name: str) -> str:
    """'yes', or why this variant is not merged. Raises AssertionError where a merged model differs from the unmerged one."""
    cls = ll.get(name)
    if not cls.claims.affine:
        return "refused: not linear"
    for dtype in (torch.float32, torch.bfloat16):
        model = toy.toy().to(dtype)
        handle = toy.perturb(toy.attached(model, cls, toy.small(cls)))
        before, x = photograph(model), toy.inputs(4, 7, toy.WIDTH, dtype=dtype)
        want = model(x)
        exact = {path: effective(model.get_submodule(path), [adapter])[:2] for path, adapter in handle.layers.items()}
        ll.merge(model)
        if dtype == torch.float32:
            demand(relative(model(x), want) <= 1e-5, "the merged model differs")
        for path, (weight, bias) in exact.items():
            layer = model.get_submodule(path)
            demand(torch.equal(layer.weight, weight.to(dtype)), f"{path}: the weight is rounded more than once")
            demand(layer.bias is None or torch.equal(layer.bias, bias.to(dtype)), f"{path}: so is the bias")
        ll.unmerge(model)
        demand(torch.equal(model(x), want), "unmerge does not restore the output")
        demand_same(model, before, "after unmerge")
    return "yes"


def check_algebra(name: str) -> str:
    """'yes', or why this variant does not compose. Raises AssertionError where a sum of snapshots is not the sum of changes."""
    cls = ll.get(name)
    if not cls.claims.affine:
        return "refused: not linear"
    model = toy.toy()
    handle = toy.perturb(toy.attached(model, cls, toy.small(cls)))
    shots, changes = [], []
    for seed in (3, 4):
        toy.perturb(handle, seed=seed)
        shots.append(ll.snapshot(model))
        changes.append({p: (ll.delta_weight(model, p).double(), ll.delta_bias(model, p).double()) for p in handle.layers})
    handle.detach()
    ll.apply(model, ll.compose({shots[0]: 0.7, shots[1]: -0.4}), name="mix")
    for path in changes[0]:
        for got, first, second in zip((ll.delta_weight(model, path), ll.delta_bias(model, path)), *(c[path] for c in changes)):
            want = 0.7 * first - 0.4 * second
            demand((got - want).norm() <= 1e-6 * want.norm(), f"{path}: the sum of changes is another")
    again = dataclasses.replace(shots[0])
    ll.detach(model)
    ll.apply(model, ll.compose({again: 1.0}), name="copy")
    demand(all(torch.equal(t, shots[0].tensors[k.replace(".copy.", ".")]) for k, t in own(model).items()), "the copy differs")
    return "yes"


def own(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    shared = {f"{path}.{key}" for path, m in model.named_modules() if isinstance(m, ll.Adapter) for key in m.shared}
    return {key: tensor for key, tensor in model.state_dict().items() if ".copy." in key and key not in shared}
