"""Building the unfilled adapters of one attach or load, and hanging them; what can fail does so before the model is changed."""

import torch
from torch import nn

from ..contract import shared
from ..contract.adapter import Adapter
from ..contract.attachment import Group, Lineage
from ..contract.config import AdapterConfig
from ..errors import LoraLiteError, some
from ..mathematics.maps import is_finite
from ..sites.layer import Layer, sizes
from ..sites.model import refuse_wrapped
from ..sites.quantised import is_packed, keep_trainable
from . import finding


def refuse_unready(model: nn.Module) -> list[finding.Found]:
    """Raise where an adapter would go unseen, could not be trained, or belong to weights that are not the base; else the
    adapters that are there already.
    """
    refuse_wrapped(model)
    found = finding.adapters(model)
    finding.refuse_other_root(found)
    finding.refuse_merged(found)
    if torch.is_inference_mode_enabled():
        raise LoraLiteError(
            "Tensors made in inference mode can never be trained.", expected="A call outside it.", fix="ll.attach(model, cfg)"
        )
    return found


def build_all(cls: type[Adapter], targets: dict[str, Layer], cfg: AdapterConfig) -> dict[str, Adapter]:
    """The unfilled adapters, with the tensors that they share."""
    adapters = {path: build(cls, path, layer, cfg) for path, layer in targets.items()}
    shared.allocate(adapters)
    return adapters


def build(cls: type[Adapter], path: str, layer: Layer, cfg: AdapterConfig) -> Adapter:
    """The unfilled adapter of one layer. Errors of `param_specs` are given the layer's path and sizes."""
    d_in, d_out = sizes(layer)
    weight = layer.weight
    if weight.is_meta:
        raise LoraLiteError(f"{path} has no weights yet.", expected="A loaded model.", found="They are on the meta device.")
    dtype = cfg.buffer_dtype or (None if is_packed(layer) else weight.dtype)
    try:
        return cls(d_in, d_out, cfg.for_layer(path), device=weight.device, matrix_dtype=dtype)
    except LoraLiteError as error:
        raise LoraLiteError(f"{path} (d_in={d_in}, d_out={d_out}): {error}") from error


def refuse_name(earlier: list[finding.Found], targets: dict[str, Layer], name: str) -> None:
    """Raise for a name that one of the earlier adapters has, or that is no name of a submodule."""
    taken = dict.fromkeys(found.name for found in earlier)
    if name in taken:
        raise LoraLiteError(
            f"There is an adapter {name!r} already.",
            found=f"Adapters of this model: {some(taken)}.",
            fix=f'name="{name}_2"',
        )
    for path, layer in targets.items():
        if not isinstance(name, str) or not name.isidentifier() or hasattr(layer, name):
            raise LoraLiteError(
                f"An adapter cannot be called {name!r}: {path} has such an attribute or it is no identifier.",
                fix='name="style"',
            )


def refuse_non_finite(adapters: dict[str, Adapter]) -> None:
    for path, adapter in adapters.items():
        for key, tensor in adapter.tensors().items():
            if not is_finite(tensor):
                raise LoraLiteError(f"{path}.{key} is not finite after init.", expected="A finite base weight and finite data.")


def install(
    model: nn.Module,
    targets: dict[str, Layer],
    adapters: dict[str, Adapter],
    name: str,
    cfg: AdapterConfig,
    lineage: Lineage | None = None,
) -> None:
    """Hang the filled adapters and freeze the base; undone whole when it is interrupted. lineage None: a new one."""
    earlier = finding.adapters(model)
    base = {} if earlier else dict(model.named_parameters())
    flags = earlier[0].adapter.group.base_flags if earlier else {key: p.requires_grad for key, p in base.items()}
    group = Group(name, cfg, flags, lineage or Lineage())
    trainable = [p for p in base.values() if p.requires_grad]
    try:
        for path, adapter in adapters.items():
            adapter.install(targets[path], path, group)
        group.handles += keep_trainable(model)  # after the adapters: they may give the input its gradient
        for parameter in trainable:
            parameter.requires_grad_(False)
    except BaseException:
        for path, adapter in adapters.items():
            adapter.remove(targets[path])
        for handle in group.handles:
            handle.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)
        raise
