"""detach: the base as it was before the first attach, bit for bit."""

import warnings

import torch
from torch import Tensor, nn

from ..contract import rows
from ..errors import LoraLiteWarning, some
from ..sites.model import plain, unwrapped
from . import finding
from .atomic import changing
from .merge import put_back
from .quiet import quiet
from .untouched import moved_buffers, written


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take off the adapter `name`, or all of them; with the last one the base is as it was before the first attach.

    A merged layer gets its own bits back; other adapters that were merged into it act beside it again.
    Raises LoraLiteError for a name that is not there.
    """
    model = unwrapped(model)
    leaving = finding.adapters(model, name)
    finding.refuse_other_root(leaving)
    layers = {found.path for found in leaving if found.adapter.original is not None}
    warn_unmerged([found for found in finding.adapters(model) if found.path in layers], leaving)
    last = len(leaving) == len(finding.adapters(model)) > 0
    moved = moved_buffers(model, leaving[0].adapter.group.base) if last else []
    if last and (names := written(model, leaving[0].adapter.group.base)):
        warnings.warn(
            f"{some(names)} of the base were trained or written to beside the adapter, and stay so: detach takes back what the "
            "adapter changed.",
            LoraLiteWarning,
            stacklevel=2,
        )
    changing(model, [buffer for buffer, _ in moved], lambda: take_off(model, leaving, layers, moved if last else None))


def take_off(
    model: nn.Module, leaving: list[finding.Found], layers: set[str], moved: list[tuple[Tensor, Tensor]] | None
) -> None:
    """moved: buffers and what they held, where the base comes back whole; None while adapters stay."""
    with quiet(model), torch.no_grad():
        put_back([found for found in finding.adapters(model) if found.path in layers])
        for found in leaving:
            found.adapter.remove(found.layer)
            for handle in found.adapter.group.handles:
                handle.remove()
        rows.tidy(model.modules())
        if moved is not None:
            flags = leaving[0].adapter.group.base.flags
            for key, parameter in model.named_parameters():
                if plain(key) in flags:
                    parameter.requires_grad_(flags[plain(key)])
            for buffer, before in moved:
                buffer.copy_(before)


def warn_unmerged(merged: list[finding.Found], leaving: list[finding.Found]) -> None:
    """Warn where adapters that stay come out of the weights with one that goes."""
    gone = {id(found.adapter) for found in leaving}
    if staying := [found for found in merged if id(found.adapter) not in gone]:
        warnings.warn(
            f"{some(dict.fromkeys(f.name for f in staying))} was merged into the same weights and acts beside them again at "
            f"{some(dict.fromkeys(f.path for f in staying))}. ll.merge(model) merges it anew.",
            LoraLiteWarning,
            stacklevel=3,
        )
