"""Why a place of a model cannot be adapted: its weight is read and not called, tied, or of an unknown kind.

Structure decides: who calls a layer, who shares its weight. measuring.py says what a call of it computes.
"""

import re
from typing import cast

import torch
from torch import nn

from .layer import Layer, is_linear, sizes, unfit
from .model import linears
from .reading import readings

LINEAR = re.compile(r"Linear(?:\d.*|_.*|Lt)?$")


OTHERS = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.RNNBase, nn.MultiheadAttention, nn.Embedding)


def expert_counts(module: nn.Module) -> set[int]:
    """What a module's own numbers say of how many experts it holds."""
    return {
        n for name, n in vars(module).items() if "expert" in name and isinstance(n, int) and not isinstance(n, bool) and n > 1
    }


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """{path: parameter} of what a module holds for all its experts at once: (experts, ., .), or the rows of all of them."""
    found = {}
    on_layers = {id(part) for layer in model.modules() if is_linear(layer) for part in layer.modules()}
    for path, module in model.named_modules():
        if isinstance(module, OTHERS) or id(module) in on_layers:
            continue
        counts, inside = expert_counts(module), any("experts" in name.lower() for name in path.split("."))
        for name, parameter in module.named_parameters(recurse=False):
            if nn.parameter.is_lazy(parameter) or not parameter.is_floating_point() or name.endswith("bias"):
                continue
            if (parameter.ndim == 3 and (parameter.shape[0] in counts or inside)) or (parameter.ndim == 2 and inside):
                found[f"{path}.{name}".lstrip(".")] = parameter
    return found


def attention_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """{path: projection} that nn.MultiheadAttention holds as bare parameters."""
    names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    return {
        f"{path}.{name}".lstrip("."): getattr(module, name)
        for path, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
        for name in names
        if getattr(module, name) is not None
    }


def unknown_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that look like a linear layer of a kind that nobody here knows, such as quantised ones of other libraries."""
    known = linears(model)
    found = {}
    for path, module in model.named_modules():
        named = path not in known and LINEAR.search(type(module).__name__) and not isinstance(module, nn.Bilinear)
        if named and not any(map(is_linear, module.modules())) and all(p.ndim < 3 for p in module.parameters()):
            found[path] = module
    return found


def read(model: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """({path: reader} of Linear-like layers whose weight a module around them reads without ever calling them,
    {path: how} of those that it reads and calls), by its source.
    """
    never, at_times, layers = {}, {}, linears(model)
    for path, owner in model.named_modules():
        if path in layers or not isinstance(owner._modules, dict) or not owner._modules:
            continue
        found, name = readings(owner), type(owner).__name__
        inside = isinstance(owner, nn.MultiheadAttention)
        places = {kind: {".".join(filter(None, (path, *place))) for place in getattr(found, kind)} for kind in found._fields}
        never |= {p: name for p in layers if p in places["never"] or (inside and p.rpartition(".")[0] == path)}
        at_times |= {p: f"read: {name} uses its weight beside the call" for p in places["beside"] if p in layers}
        branch = "read in a branch: {} calls it, or uses its weight without a call"
        at_times |= {p: branch.format(name) for p in places["branch"] if p in layers}
    return never, {path: how for path, how in at_times.items() if path not in never}


def tied(model: nn.Module) -> dict[str, list[str]]:
    """{path: paths of other modules with the same weight} of Linear-like layers."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(path)
    shared = {path: paths for paths in owners.values() if len(paths) > 1 for path in paths}
    return {path: [p for p in shared[path] if p != path] for path in linears(model) if path in shared}


def routers(model: nn.Module) -> dict[str, str]:
    """{path: the experts that it chooses} of Linear-like layers with one output for each expert of their block.

    A block holds experts, as parameters or as a list of modules, and beside them a module whose only layer is the router.
    """
    modules = dict(model.named_modules())
    holders: dict[str, set[int]] = {}
    for path, parameter in expert_parameters(model).items():
        owner = path.rpartition(".")[0]
        counts = expert_counts(modules[owner]) | ({parameter.shape[0]} if parameter.ndim == 3 else set())
        names = owner.split(".")
        top = next((k for k, name in enumerate(names) if "experts" in name.lower()), len(names) - 1)
        holders.setdefault(".".join(names[: top + 1]), set()).update(counts)
    for path, module in modules.items():
        many = isinstance(module, (nn.ModuleList, nn.ModuleDict)) and len(module) > 1 and any(map(is_linear, module.modules()))
        if many and "expert" in path.rpartition(".")[2].lower():
            holders.setdefault(path, set()).add(len(module))  # type: ignore[arg-type]
    found = {}
    for holder, counts in holders.items():
        start = holder.rpartition(".")[0]
        for name, child in modules[start].named_children():
            place = f"{start}.{name}".lstrip(".")
            inside = [(f"{place}.{p}".rstrip("."), m) for p, m in child.named_modules() if is_linear(m) and not unfit(m)]
            if place not in holders and len(inside) == 1 and sizes(cast(Layer, inside[0][1]))[1] in counts:
                found[inside[0][0]] = holder
    return found


def scripted(model: nn.Module) -> list[str]:
    """Paths of the outermost modules that torch.jit made: no hook of theirs is Python's to call."""
    found: list[str] = []
    for path, module in model.named_modules():
        inside = any(not top or path.startswith(f"{top}.") for top in found)
        if isinstance(module, torch.jit.ScriptModule) and not inside and any(True for _ in module.parameters()):
            found.append(path)
    return found


def computing(layer: nn.Module, path: str) -> str:
    """Code that makes the computed weight of a layer a frozen parameter."""
    own = layer._parameters.keys() | layer._buffers.keys()
    remove = 'layer.parametrizations.requires_grad_(); torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")'
    if "weight_g" in own:
        remove = "torch.nn.utils.remove_weight_norm(layer)"
    elif "weight_mask" in own:
        remove = 'torch.nn.utils.prune.remove(layer, "weight")'
    elif "weight_u" in own:
        remove = "torch.nn.utils.remove_spectral_norm(layer)"
    return f"layer = model.get_submodule({path!r}); {remove}; layer.weight.requires_grad_(False)"


def foreign_adapters(model: nn.Module) -> str:
    """The path of a layer that PEFT has wrapped; "" where there is none."""
    for path, module in model.named_modules():
        if type(module).__module__.startswith("peft.") and hasattr(module, "base_layer"):
            return path
    return ""
