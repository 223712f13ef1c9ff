"""Building the unfilled adapters of one attach or load, and hanging them; what can fail does so before the model is changed."""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from ..contract import shared
from ..contract.adapter import Adapter
from ..contract.attachment import Group, Lineage
from ..contract.config import PATTERNS, AdapterConfig
from ..errors import LoraLiteError, some
from ..mathematics.maps import is_finite
from ..sites.layer import Layer, is_conv1d, sizes
from ..sites.model import refuse_wrapped, unwrapped
from ..sites.quantised import is_packed, keep_trainable
from . import finding
from .quiet import quiet
from .untouched import photographed, refuse_moving_statistics


def refuse_unready(model: nn.Module) -> list[finding.Found]:
    """Raise where an adapter would go unseen, could not be trained, or belong to weights that are not the base; else the
    adapters that are there already.
    """
    refuse_wrapped(model)
    if lazy := [name for name, parameter in model.named_parameters() if nn.parameter.is_lazy(parameter)]:
        raise LoraLiteError(
            f"{some(lazy)}: no shape before its first call, and nothing to freeze.",
            expected="A model whose parameters are there.",
            fix="model(batch)  # once",
        )
    found = finding.adapters(model)
    finding.refuse_other_root(found)
    finding.refuse_merged(found)
    refuse_moving_statistics(model)
    if torch.is_inference_mode_enabled():
        raise LoraLiteError(
            "Tensors made in inference mode can never be trained.", expected="A call outside it.", fix="ll.attach(model, cfg)"
        )
    return found


FILL = 'model = model.to_empty(device="cpu")  # and model.load_state_dict of its weights'


class Plan(NamedTuple):
    """The config of each layer; lowered {path: "r=1"} where that is less than asked; unlawful {path: why} where none is."""

    configs: dict[str, AdapterConfig]
    lowered: dict[str, str]
    unlawful: dict[str, str]


LOWERINGS = 8  # of one layer's config


def planned(cls: type[Adapter], targets: dict[str, Layer], cfg: AdapterConfig) -> Plan:
    """Which config each layer gets: under "all-linear" a layer too narrow for it takes the largest lawful rank or block.

    Raises LoraLiteError, with the layer's path and sizes, for a config that no layer allows, or one that was named does not.
    """
    plan = Plan({}, {}, {})
    plain = cfg.without_patterns()
    first: LoraLiteError | None = None
    for path, layer in targets.items():
        rank = cfg.rank_at(path)
        lowered: dict[str, Any] = {}
        for attempt in range(LOWERINGS):
            try:
                own = plain if rank == plain.r else cfg.for_layer(path).without_patterns()
                own = dataclasses.replace(own, **lowered) if lowered else own
                cls.param_specs(*sizes(layer), own)
                plan.configs[path] = own
                break
            except LoraLiteError as error:
                told = LoraLiteError(f"{path} ({shape(layer)}): {error}")
                if cfg.targets != "all-linear" or rank != cfg.r:
                    raise told from error
                first = first or told
                if not error.lawful or attempt == LOWERINGS - 1:
                    plan.unlawful[path] = str(error).split("\n")[0]
                    break
                lowered |= error.lawful
        if lowered and path in plan.configs:
            plan.lowered[path] = ", ".join(f"{name}={value}" for name, value in lowered.items())
    if first is not None and len(plan.lowered) == len(plan.configs):  # no layer takes it as it is: the config is at fault
        raise first
    return plan


def shape(layer: Layer) -> str:
    return "d_in={}, d_out={}".format(*sizes(layer))


def configs_of(cfg: AdapterConfig, places: dict[str, dict[str, Any]] | None, paths: Iterable[str]) -> dict[str, AdapterConfig]:
    """The layers' configs, from places {path: {rank, options}} where these are known; no pattern is searched then."""
    if places is None:
        return {path: cfg.for_layer(path) for path in paths}
    plain = cfg.without_patterns()
    changes = {path: {"r": places[path]["rank"], **places[path].get("options", {})} for path in paths}
    return {
        path: plain if change == {"r": plain.r} else dataclasses.replace(plain, **change) for path, change in changes.items()
    }


def place_of(adapter: Adapter, layer: Layer) -> dict[str, Any]:
    """What a file says of one layer: its rank, and options that differ from those of the attach."""
    whole, own = adapter.group.cfg, adapter.cfg
    names = [f.name for f in dataclasses.fields(own) if f.name not in ("r", "coeff", *PATTERNS)]
    differing = {name: getattr(own, name) for name in names if getattr(own, name) != getattr(whole, name)}
    found = {"rank": own.r, "experts": None, "transposed": is_conv1d(layer)}
    return found | ({"options": differing} if differing else {})


def build_all(cls: type[Adapter], targets: dict[str, Layer], configs: dict[str, AdapterConfig]) -> dict[str, Adapter]:
    """The unfilled adapters of the layers that have a config, with the tensors that they share."""
    adapters = {path: build(cls, path, targets[path], cfg) for path, cfg in configs.items()}
    shared.allocate(adapters)
    return adapters


def build(cls: type[Adapter], path: str, layer: Layer, cfg: AdapterConfig) -> Adapter:
    """The unfilled adapter of one layer. Errors of `param_specs` are given the layer's path and sizes."""
    weight = layer.weight
    if weight.is_meta:
        raise LoraLiteError(
            f"{path} has no weights yet.", expected="A loaded model.", found="They are on the meta device.", fix=FILL
        )
    dtype = cfg.buffer_dtype or (None if is_packed(layer) else weight.dtype)
    try:
        return cls(*sizes(layer), cfg, device=weight.device, matrix_dtype=dtype)
    except LoraLiteError as error:
        raise LoraLiteError(f"{path} ({shape(layer)}): {error}") from error


def refuse_name(earlier: list[finding.Found], targets: dict[str, Layer], name: str) -> None:
    """Raise for a name that one of the earlier adapters has, or that is no name of a submodule."""
    taken = dict.fromkeys(found.name for found in earlier)
    if name in taken:
        raise LoraLiteError(
            f"There is an adapter {name!r} already.",
            found=f"Adapters of this model: {some(taken)}.",
            fix=f'name="{name}_2"',
        )
    if not isinstance(name, str) or not name.strip():
        raise LoraLiteError(f"An adapter cannot be called {name!r}.", expected="A text.", fix='name="style"')
    child = Group(name, AdapterConfig()).child
    for path, layer in targets.items():
        if hasattr(layer, child):
            raise LoraLiteError(f"An adapter cannot be called {name!r}: {path} has such an attribute.", fix='name="style"')


def refuse_non_finite(adapters: dict[str, Adapter]) -> None:
    for path, adapter in adapters.items():
        for key, tensor in adapter.tensors().items():
            if not is_finite(tensor):
                raise LoraLiteError(f"{path}.{key} is not finite after init.", expected="A finite base weight and finite data.")


def refuse_aliased(adapters: dict[str, Adapter]) -> None:
    """Raise where several layers hold one trained tensor: it would be stepped once for each of them."""
    first: dict[int, str] = {}
    for path, adapter in adapters.items():
        for key, parameter in adapter.named_parameters():
            if (other := first.setdefault(id(parameter), f"{path}.{key}")) != f"{path}.{key}":
                raise LoraLiteError(
                    f"{path}.{key} is the same parameter as {other}.",
                    expected="A trained tensor of its own for each layer, which is stepped, counted and stored once.",
                    fix="self.t.copy_(first.t)  # in group_init, in the place of self.t = first.t",
                )


def install(
    model: nn.Module,
    targets: dict[str, Layer],
    adapters: dict[str, Adapter],
    name: str,
    cfg: AdapterConfig,
    lineage: Lineage | None = None,
    skipped: dict[str, str] | None = None,
) -> Group:
    """Hang the filled adapters and freeze the base, at a moment when no other thread runs it. lineage None: a new one."""
    model = unwrapped(model)
    earlier = finding.adapters(model)
    base = {} if earlier else dict(model.named_parameters())
    untouched = earlier[0].adapter.group.base if earlier else photographed(model)
    group = Group(name, cfg, untouched, lineage or Lineage(), skipped=skipped or {})
    trainable = [p for p in base.values() if p.requires_grad]
    with quiet(model):
        for path, adapter in adapters.items():
            adapter.install(targets[path], path, group)
        group.handles += keep_trainable(model)  # after the adapters: they may give the input its gradient
        group.handles.append(model.register_forward_hook(group.note))
        for parameter in trainable:
            parameter.requires_grad_(False)
    return group
