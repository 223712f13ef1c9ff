"""attach and detach, and the handle that attach and load return. Whatever can fail does so before the model is changed."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import runtime, shared
from .adapter import Adapter, Group, Lineage
from .calibrate import LABELS, Stats, Weights
from .config import AdapterConfig
from .errors import LoraLiteError, some
from .linalg import is_finite
from .passes import collect
from .quantised import is_packed, keep_trainable, refuse_without_gradient
from .registry import variant_of
from .spec import seeded
from .targets import Layer, dense_weight, find_targets, linears, plain, refuse_wrapped, role, selected, sizes, unwrapped


@dataclass
class Attached:
    """Handle of one attach; as a context manager it detaches on leaving.

    model    the model that was adapted                  name    of this adapter
    config   its frozen config                           layers  {path: adapter module}
    skipped  {path: reason} for layers that targets matched and roles or a rank of 0 left out
    """

    model: nn.Module
    name: str
    config: AdapterConfig
    layers: dict[str, Adapter]
    skipped: dict[str, str]

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trainable tensors of this adapter, in the model's order."""
        for adapter in self.layers.values():
            yield from adapter.parameters()

    def save(self, path: str | Path) -> None:
        from .io import save

        self.refuse_detached()
        save(self.model, path, name=self.name)

    def scale(self, coeff: float | torch.Tensor | Mapping[str, float]) -> runtime.Scaling | runtime.GroupScaling:
        self.refuse_detached()
        return runtime.scale(self.model, coeff, name=self.name)

    def detach(self) -> None:
        self.refuse_detached()
        detach(self.model, name=self.name)

    def is_attached(self) -> bool:
        """Whether the model still carries these very adapters, not others that took their name."""
        mine = {id(adapter) for adapter in self.layers.values()}
        return any(id(found.adapter) in mine for found in runtime.adapters(self.model))

    def refuse_detached(self) -> None:
        if not self.is_attached():
            raise LoraLiteError(f"This adapter {self.name!r} was detached.", fix="handle = ll.attach(model, handle.config)")

    def __enter__(self) -> "Attached":
        return self

    def __exit__(self, *error: object) -> None:
        if self.is_attached():
            self.detach()


def attach(model: nn.Module, cfg: AdapterConfig, calibration_data: Any = None, *, name: str = "default") -> Attached:
    """Hang the variant that `cfg` belongs to under every layer it selects; freeze the base; train nothing yet.

    calibration_data  batches for variants that start from data: an iterable of mappings, tuples or tensors that the model
                      is called with, or {"positive": batches, "negative": batches}; read once for each group of layers
                      (see passes.py) where sums of all layers together are large; an iterator is read once whatever they take
    name              keys the adapter; several may share a model, applied in the order attached

    Raises LoraLiteError before anything is changed: unknown targets, a rank or block size that a layer does not allow,
    missing, unused or unfit data, a name in use, a compiled, sharded or wrapped model, a base that passes no gradient.
    """
    if not isinstance(cfg, AdapterConfig):
        raise LoraLiteError(
            f"attach(model, {cfg!r}) needs a config.",
            expected="An AdapterConfig.",
            fix=f"ll.attach(model, ll.config({cfg!r}))" if isinstance(cfg, str) else runtime.ATTACH,
        )
    cls = variant_of(cfg)
    loss_fn, cfg = getattr(cfg, "loss_fn", None), cfg.lasting()
    earlier = refuse_unready(model)
    refuse_without_gradient(model)
    wanted = wanted_statistics(cls, cfg, calibration_data)
    targets = find_targets(model, cfg)
    refuse_name(earlier, targets, name)
    adapters = build_all(cls, targets, cfg)
    with runtime.disabled(model):
        stats = collect(model, targets, wanted, calibration_data, loss_fn) if wanted else {"weight": Weights(targets)}
        ranked = with_ranks(cls, cfg, adapters, stats)
        if ranked is not cfg:
            cfg, targets = ranked, find_targets(model, ranked)
            adapters = build_all(cls, targets, cfg)
        fill(cls, cfg, targets, adapters, stats)
    refuse_non_finite(adapters)
    install(model, targets, adapters, name, cfg)
    return handle(model, name, cfg, adapters)


def refuse_unready(model: nn.Module) -> list[runtime.Found]:
    """Raise where an adapter would go unseen, could not be trained, or belong to weights that are not the base; else the
    adapters that are there already.
    """
    refuse_wrapped(model)
    found = runtime.adapters(model)
    runtime.refuse_other_root(found)
    runtime.refuse_merged(found)
    if torch.is_inference_mode_enabled():
        raise LoraLiteError(
            "Tensors made in inference mode can never be trained.", expected="A call outside it.", fix="ll.attach(model, cfg)"
        )
    return found


@torch.no_grad()
def with_ranks(cls: type[Adapter], cfg: AdapterConfig, adapters: dict[str, Adapter], stats: Stats) -> AdapterConfig:
    """The config with the ranks that the variant takes from the data in rank_pattern, where they differ from its r."""
    if cfg.rank_pattern:
        return cfg
    found = cls.ranks(adapters, stats, cfg)
    pattern = {f"^{re.escape(path)}$": rank for path, rank in found.items() if rank != cfg.r}
    return dataclasses.replace(cfg, rank_pattern=pattern) if pattern else cfg


@torch.no_grad()
def fill(cls: type[Adapter], cfg: AdapterConfig, targets: dict[str, Layer], adapters: dict[str, Adapter], stats: Stats) -> None:
    """Declared starts, then `init` layer by layer, then `group_init`; in full precision also under the caller's autocast."""
    device = next(iter(targets.values())).weight.device.type
    with torch.autocast(device, enabled=False):
        shared.fill(adapters, shared.draws(adapters, cfg.seed))
        for path, adapter in adapters.items():
            adapter.start(path)
            if cls.init is not Adapter.init:
                known = cls.claims.reads_weight
                W = dense_weight(targets[path]) if known else torch.empty(adapter.d_out, adapter.d_in, device="meta")
                with seeded(cfg.seed, path, "init"):
                    adapter.init(W)
        if cls.group_init is not Adapter.group_init:
            with seeded(cfg.seed, "group_init"):
                cls.group_init(adapters, stats, cfg)


def handle(model: nn.Module, name: str, cfg: AdapterConfig, adapters: dict[str, Adapter]) -> Attached:
    skipped = {
        path: "rank 0" if cfg.rank_at(path) == 0 else f"a {role(path)}; roles={cfg.roles}"
        for path in linears(model)
        if path not in adapters and selected(path, cfg) and (cfg.roles or cfg.rank_at(path) == 0)
    }
    return Attached(model, name, cfg, adapters, skipped)


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


def wanted_statistics(cls: type[Adapter], cfg: AdapterConfig, data: Any) -> tuple[str, ...]:
    """Names of what to measure; refused where data is missing or would be ignored."""
    needed, wanted = cls.needs(cfg), cls.wants(cfg)
    if data is None and needed:
        raise LoraLiteError(
            f"{cls.variant} starts from data and calibration_data is missing.",
            expected=f"Statistics: {', '.join(needed)}.",
            fix="ll.attach(model, cfg, calibration_data=batches)",
        )
    labelled = isinstance(data, dict) and set(data) == set(LABELS)
    names = () if data is None else (*needed, *(name for name in wanted if labelled or ":" not in name))
    if data is not None and not names:
        raise LoraLiteError(
            f"{cls.variant} with these options takes nothing from such calibration_data; it would be ignored.",
            found=f"With labels it would take {', '.join(wanted)}." if wanted else "",
            fix='calibration_data={"positive": batches, "negative": other_batches}' if wanted else "ll.attach(model, cfg)",
        )
    return tuple(dict.fromkeys(names))


def refuse_name(earlier: list[runtime.Found], targets: dict[str, Layer], name: str) -> None:
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
    earlier = runtime.adapters(model)
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


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take off the adapter `name`, or all of them; with the last one the base is as it was before the first attach.

    A merged layer gets its own bits back; other adapters that were merged into it act beside it again.
    Raises LoraLiteError for a name that is not there.
    """
    from .merge import put_back

    model = unwrapped(model)
    leaving = runtime.adapters(model, name)
    runtime.refuse_other_root(leaving)
    layers = {found.path for found in leaving if found.adapter.original is not None}
    put_back([found for found in runtime.adapters(model) if found.path in layers])
    flags = leaving[0].adapter.group.base_flags if leaving else {}
    for found in leaving:
        found.adapter.remove(found.layer)
        for handle in found.adapter.group.handles:
            handle.remove()
    if not runtime.adapters(model):
        for key, parameter in model.named_parameters():
            if plain(key) in flags:
                parameter.requires_grad_(flags[plain(key)])
