"""What can be done to attached adapters while they run: put hooks back, group for the optimizer."""

import warnings
from typing import Any

from torch import nn

from ..errors import LoraLiteWarning, some
from ..sites.model import unwrapped
from ..sites.quantised import keep_trainable
from .atomic import atomic
from .finding import Found, present
from .untouched import base_tensors


@atomic
def repair(model: nn.Module) -> list[str]:
    """Put back hooks that another program removed, in the order of attach; the paths of the layers that needed it.

    Every tensor of the adapters that are declared trainable requires a gradient again, also those that you froze yourself.
    Nothing of the base is touched. Raises LoraLiteError for a model without an adapter.
    """
    by_layer: dict[str, list[Found]] = {}
    for f in present(model, None):
        by_layer.setdefault(f.path, []).append(f)
    broken = [path for path, found in by_layer.items() if not all(f.adapter.hooked(f.layer) for f in found)]
    for path in broken:
        for f in by_layer[path]:
            f.adapter.unhook()
        for f in by_layer[path]:
            f.adapter.hook(f.layer)
    for found in by_layer.values():
        for f in found:
            f.adapter.requires_grad_(True)
    for group in {id(f.adapter.group): f.adapter.group for found in by_layer.values() for f in found}.values():
        for handle in group.handles:
            handle.remove()
        group.handles[:] = keep_trainable(unwrapped(model))
    return broken


def param_groups(model: nn.Module, lr: float | None = None, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Optimizer groups of all adapters: the variant's own learning rate, decay only where a tensor's identity is 0.

    lr            for every adapter; None takes each config's recommended one. A tensor that declares its own keeps it
    weight_decay  for the tensors that declare `decay`; all others get 0
    Warns of parameters of the base that ask for a gradient: they stand in no group.
    """
    if trained := [name for name, p in base_tensors(unwrapped(model)).items() if p.requires_grad]:
        warnings.warn(
            f"{some(trained)} of the base ask for a gradient and stand in no group of param_groups. To train them: "
            f'[*ll.param_groups(model), {{"params": [model.get_parameter(name) for name in {trained[:12]}]}}]',
            LoraLiteWarning,
            stacklevel=2,
        )
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for found in present(model, None):
        specs = found.adapter.specs()
        for key, parameter in found.adapter.named_parameters():
            rate = specs[key].lr or (found.adapter.cfg.lr if lr is None else lr)
            decay = weight_decay if specs[key].decay else 0.0
            group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "weight_decay": decay})
            group["params"].append(parameter)
    return list(groups.values())
