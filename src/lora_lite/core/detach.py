"""detach: the base as it was before the first attach, bit for bit."""

from torch import nn

from ..contract import rows
from ..sites.model import plain, unwrapped
from . import finding
from .merge import put_back
from .untouched import put_back_buffers


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take off the adapter `name`, or all of them; with the last one the base is as it was before the first attach.

    A merged layer gets its own bits back; other adapters that were merged into it act beside it again.
    Raises LoraLiteError for a name that is not there.
    """
    model = unwrapped(model)
    leaving = finding.adapters(model, name)
    finding.refuse_other_root(leaving)
    layers = {found.path for found in leaving if found.adapter.original is not None}
    put_back([found for found in finding.adapters(model) if found.path in layers])
    base = leaving[0].adapter.group.base if leaving else None
    for found in leaving:
        found.adapter.remove(found.layer)
        for handle in found.adapter.group.handles:
            handle.remove()
    rows.tidy(model.modules())
    if base is not None and not finding.adapters(model):
        for key, parameter in model.named_parameters():
            if plain(key) in base.flags:
                parameter.requires_grad_(base.flags[plain(key)])
        put_back_buffers(model, base)
