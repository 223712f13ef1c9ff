"""The configs of a file's layers: as it says them, or, where it is older than that, as its tensors have their shapes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..contract.adapter import Adapter
from ..contract.config import AdapterConfig
from ..contract.matching import Budget, search
from ..contract.pattern import REGULAR
from ..errors import LoraLiteError, some
from ..sites.layer import Layer, sizes
from .entries import Stored
from .install import configs_of
from .restore import declared

MOST_RANKS = 256  # that an old file's rank_pattern tells apart
Shapes = dict[str, tuple[int, ...]]
REPAIR = "ll.save(model, path)  # with the version that trained it, after a rank_pattern without them"


def configs_in(
    path: str | Path,
    cls: type[Adapter],
    cfg: AdapterConfig,
    stored: Stored,
    moved: Mapping[str, str],
    targets: Mapping[str, Layer],
) -> dict[str, AdapterConfig]:
    """{path on the model: config}; moved: {path in the file: path on the model}."""
    places = {moved[old]: said for old, said in stored.layers.items() if said is not None}
    if len(places) == len(stored.layers):
        return configs_of(cfg, places, places)
    if len(ranks := set(cfg.rank_pattern.values())) > MOST_RANKS:
        raise LoraLiteError(f"{path}: rank_pattern has {len(ranks)} ranks, at most {MOST_RANKS} are told apart.", fix=REPAIR)
    of: dict[str, dict[str, Tensor]] = {}
    for key, tensor in stored.tensors.items():
        place, _, leaf = key.rpartition(".")
        of.setdefault(place, {})[leaf] = tensor
    alike = type(cfg).possible_at is AdapterConfig.possible_at  # the same for every path
    known: dict[Any, list[tuple[AdapterConfig, Shapes | None]]] = {}
    found, budget = {}, Budget()
    for old, place in moved.items():
        layer = targets[place]
        if (kind := (None if alike else old, *sizes(layer))) not in known:
            known[kind] = [(config, shapes_of(path, cls, config, place, layer)) for config in cfg.possible_at(old)]
        shapes = {key: tuple(tensor.shape) for key, tensor in cls.upgraded(of.get(old, {})).items()}
        fitting = [config for config, own in known[kind] if own == shapes] or [known[kind][0][0]]
        if len({config.s for config in fitting}) > 1:  # layers so narrow that several ranks have the same tensors
            rank = told_rank(cfg, old, budget)
            fitting = [config for config in fitting if config.r == rank] or fitting
        found[place] = fitting[0]
    return found


def told_rank(cfg: AdapterConfig, place: str, budget: Budget) -> int:
    """The rank that an old file's patterns give a layer. Raises LoraLiteError for one that is not matched in a few steps."""
    found: dict[int, set[Any]] = {0: {cfg.r}}
    for pattern, rank in cfg.rank_pattern.items():
        try:
            if search(pattern.removeprefix(REGULAR), place, budget):
                found.setdefault(len(pattern), set()).add(rank)
        except LoraLiteError as error:
            raise LoraLiteError(
                f"{place}: its rank cannot be told from its tensors, and {pattern!r} of rank_pattern is not searched.",
                expected="In files of formats 1 to 3: expressions without flags and references.",
                fix=REPAIR,
            ) from error
    if len(told := found[max(found)]) > 1:
        raise LoraLiteError(
            f"{place} fits patterns of rank_pattern that are equally long and give it ranks {some(map(str, sorted(told)))}.",
            expected="One longest pattern for a layer.",
            fix=REPAIR,
        )
    return told.pop()


def shapes_of(path: str | Path, cls: type[Adapter], cfg: AdapterConfig, place: str, layer: Layer) -> Shapes | None:
    """{name: shape} of a layer's own tensors; None for a config that it cannot have."""
    try:
        specs = declared(path, cls, place, layer, cfg)
    except LoraLiteError:
        return None
    return {name: tuple(spec.shape) for name, spec in specs.items() if not spec.shared}
