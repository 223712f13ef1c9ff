"""attach: select, build, measure, fill, install. Whatever can fail does so before the model is changed."""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..calibration.enough import TooLittleData, left_out
from ..calibration.measure import LACKING
from ..calibration.passes import collect
from ..calibration.statistics import LABELS, Stats, Weights
from ..contract import shared
from ..contract.adapter import Adapter
from ..contract.config import AdapterConfig
from ..contract.pattern import exactly
from ..contract.registry import variant_of
from ..contract.spec import seeded
from ..errors import LoraLiteError, LoraLiteWarning, some
from ..sites.layer import Layer, dense_weight
from ..sites.model import block_index, block_lists, unwrapped
from ..sites.obstacles import expert_parameters
from ..sites.quantised import refuse_without_gradient
from . import finding
from .atomic import atomic
from .coefficients import disabled
from .coverage import coverage
from .handle import Attached
from .install import build_all, install, planned, refuse_aliased, refuse_name, refuse_non_finite, refuse_unready
from .repairs import reasons
from .selection import select


@atomic
def attach(model: nn.Module, cfg: AdapterConfig, calibration_data: Any = None, *, name: str = "default") -> Attached:
    """Hang the variant that `cfg` belongs to under every layer it selects; freeze the base; train nothing yet.

    calibration_data  batches for variants that start from data: an iterable of mappings, tuples or tensors that the model
                      is called with, or {"positive": batches, "negative": batches}; read once for each group of layers
                      (calibration/passes.py) where sums of all layers together are large; an iterator is read once
    name              keys the adapter; several may share a model, applied in the order attached

    Raises LoraLiteError before anything is changed: unknown targets, a rank or block size that a layer does not allow,
    missing, unused or unfit data, a name in use, a compiled, sharded or wrapped model, a base that passes no gradient.
    """
    if not isinstance(cfg, AdapterConfig):
        raise LoraLiteError(
            f"attach(model, {cfg!r}) needs a config.",
            expected="An AdapterConfig.",
            fix=f"ll.attach(model, ll.config({cfg!r}))" if isinstance(cfg, str) else finding.ATTACH,
        )
    cls = variant_of(cfg)
    loss_fn, cfg = getattr(cfg, "loss_fn", None), cfg.lasting()
    earlier = refuse_unready(model)
    refuse_without_gradient(model)
    wanted = wanted_statistics(cls, cfg, calibration_data)
    selection = select(model, cfg)
    refuse_name(earlier, selection.chosen, name)
    plan = planned(cls, selection.chosen, cfg)
    targets = {path: selection.chosen[path] for path in plan.configs}
    adapters = build_all(cls, targets, plan.configs)
    with disabled(model):
        stats: Stats = {"weight": Weights(targets)}
        if wanted:
            stats = collect(model, targets, wanted, calibration_data, loss_fn, partly=True)
        lacking: dict[str, TooLittleData] = dict(stats.get(LACKING, {}))  # type: ignore[arg-type]
        given, measured = cfg, targets
        while True:
            spared = left_out(lacking, measured, given.targets == "all-linear")
            try:
                if spared:
                    targets, adapters = rest(cls, targets, plan.configs, spared)
                ranked = with_ranks(cls, given, adapters, stats)
                if ranked is not given:
                    cfg, selection = ranked, select(model, ranked)
                    plan = planned(cls, selection.chosen, cfg)
                    targets, adapters = rest(cls, selection.chosen, plan.configs, spared)
                fill(cls, cfg, targets, adapters, stats, name)
                break
            except TooLittleData as error:  # of some layers; the others start without them
                lacking |= dict.fromkeys(error.lacking, error)
    if spared:
        warnings.warn(
            f"{len(spared)} layers are left out, the calibration data says too little of them: "
            f"{some(f'{path} ({reason})' for path, reason in spared.items())}. More batches reach more of them.",
            LoraLiteWarning,
            stacklevel=2,
        )
    refuse_non_finite(adapters)
    refuse_aliased(adapters)
    skipped = selection.skipped | plan.unlawful | spared
    install(model, targets, adapters, name, cfg, skipped=skipped)
    warn_unreached(model, targets)
    return Attached(model, name, cfg, adapters, skipped, plan.lowered)


def warn_unreached(model: nn.Module, targets: dict[str, Layer]) -> None:
    """Warn where a block with adapted layers holds parameters of experts, which no adapter reaches."""
    experts = expert_parameters(model)
    lists = block_lists(unwrapped(model)) if experts else {}
    blocks = {block_index(path, lists) for path in targets}
    if unreached := [path for path in experts if block_index(path, lists) in blocks]:
        covered = coverage(model, targets)
        n = covered.outside.get("experts", (0, []))[0]
        total = sum(numbers for numbers, _ in covered.outside.values()) / (1 - covered.share)
        warnings.warn(
            f"{reasons(dict.fromkeys(unreached, 'parameters of experts, which no adapter reaches'))} They are "
            f"{n / total:.0%} of the model; adapted layers {covered.share:.0%}.",
            LoraLiteWarning,
            stacklevel=3,
        )


def rest(
    cls: type[Adapter], layers: dict[str, Layer], configs: dict[str, AdapterConfig], spared: dict[str, str]
) -> tuple[dict[str, Layer], dict[str, Adapter]]:
    """The layers that have a config and are not spared, and unfilled adapters for them."""
    kept = {path: config for path, config in configs.items() if path in layers and path not in spared}
    return {path: layers[path] for path in kept}, build_all(cls, layers, kept)


@torch.no_grad()
def with_ranks(cls: type[Adapter], cfg: AdapterConfig, adapters: dict[str, Adapter], stats: Stats) -> AdapterConfig:
    """The config with the ranks that the variant takes from the data in rank_pattern, where they differ from its r."""
    if cfg.rank_pattern:
        return cfg
    found = cls.ranks(adapters, stats, cfg)
    pattern = {exactly(path): rank for path, rank in found.items() if rank != cfg.r}
    return dataclasses.replace(cfg, rank_pattern=pattern) if pattern else cfg


@torch.no_grad()
def fill(
    cls: type[Adapter], cfg: AdapterConfig, targets: dict[str, Layer], adapters: dict[str, Adapter], stats: Stats, name: str
) -> None:
    """Declared starts, then `init` layer by layer, then `group_init`; in full precision also under the caller's autocast."""
    device = next(iter(targets.values())).weight.device.type
    with torch.autocast(device, enabled=False):
        shared.fill(adapters, shared.draws(adapters, cfg.seed))
        for path, adapter in adapters.items():
            key = path if name == "default" else f"{name}:{path}"  # adapters of one config under several names start apart
            adapter.start(key)
            if cls.init is not Adapter.init:
                known = cls.claims.reads_weight
                W = dense_weight(targets[path]) if known else torch.empty(adapter.d_out, adapter.d_in, device="meta")
                with solvable(path), seeded(cfg.seed, key, "init"):
                    adapter.init(W)
        if cls.group_init is not Adapter.group_init:
            with (
                solvable(f"{cls.variant} on {some(adapters)}"),
                seeded(cfg.seed, *([name] if name != "default" else []), "group_init"),
            ):
                cls.group_init(adapters, stats, cfg)


@contextlib.contextmanager
def solvable(what: str) -> Iterator[None]:
    """Where a factorisation of torch's does not converge, as of numbers that are not finite, an error that says of what."""
    try:
        yield
    except torch.linalg.LinAlgError as error:
        raise LoraLiteError(
            f"{what}: the start cannot be computed, {str(error).splitlines()[0]}.",
            expected="Weights and data whose factorisation converges.",
            fix="ll.attach(model.float(), cfg, calibration_data)  # or other data",
        ) from error


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
