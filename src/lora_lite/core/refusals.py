"""What selection refuses: patterns that fit nothing, layers that take no adapter, each with a repair that ends in an attach."""

import re
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from torch import nn

from ..contract.config import AdapterConfig
from ..contract.pattern import any_fits, fits, settled
from ..errors import LoraLiteError, closest
from ..sites.layer import Layer, is_linear
from .repairs import inventory, nearest, options, patterns_for, reasons, repair

EVERYTHING, ABLE = "all-linear", "Layers that can be adapted"


def mended(cfg: AdapterConfig, present: Collection[str], cannot: Mapping[str, str], names: Mapping[str, str]) -> dict[str, Any]:
    """{field: what is left of it}: patterns of nothing at their nearest name or gone, layers that take no adapter left out.

    names  {second path of a shared module: the first}
    """
    able = [path for path in present if path not in cannot]
    leaves = dict.fromkeys(path.rpartition(".")[2] for path in able)
    targets: list[str] = []
    for pattern in cfg.patterns()["targets"]:
        hits = [path for path in present if fits(pattern, path)]
        first = [path for second, path in names.items() if fits(pattern, second) and path in able]
        if any(path in able for path in hits):
            targets.append(pattern)
        elif not hits and first:
            targets += patterns_for(first, present)
        elif not hits and not any(fits(pattern, path) for path in cannot):
            targets += [near] if (near := nearest(pattern, leaves)) else []
    offenders = [path for path in present if path in cannot and any_fits(targets, path) and not any_fits(cfg.exclude, path)]
    return {
        "targets": tuple(dict.fromkeys(targets)),
        "exclude": (*cfg.exclude, *patterns_for(offenders, present)),
    }


def refuse_impossible(
    cfg: AdapterConfig, present: Collection[str], cannot: Mapping[str, str], hit: Mapping[str, str], more: tuple[str, ...] = ()
) -> NoReturn:
    """Raise for layers which cannot be adapted that the config hits.

    more  targets with which they could be
    """
    changes = {"targets": (*cfg.targets, *more)} if more else mended(cfg, present, cannot, {})
    able = [path for path in present if path not in cannot]
    asked = bool(changes["targets"])
    raise LoraLiteError(
        f"{reasons(hit)} Such layers cannot be adapted{' alone' * bool(more)}."
        + ("" if asked else " Nothing that targets names can be."),
        expected="An adapter acts where a layer is called as W x + b and its weight has one use.",
        found="" if asked else inventory(able, ABLE),
        fix=repair(cfg, **changes) if asked else "",
    )


def refuse_unmatched(model: nn.Module, cfg: AdapterConfig, present: dict[str, Layer], cannot: dict[str, str]) -> None:
    """Raise for targets and ranks that fit no Linear, and for exclusions of nothing."""
    every = dict(model.named_modules(remove_duplicate=False))
    first = {id(module): path for path, module in model.named_modules()}
    names = {path: first[id(module)] for path, module in every.items() if first[id(module)] != path}
    paths = [path for path in every if path and path not in names] + list(cannot)
    layers = [path for path in present if path not in cannot]
    changes = mended(cfg, present, cannot, names)
    for field, patterns in cfg.patterns().items():
        known = paths if field == "exclude" else list(present)
        lost = [pattern for pattern in patterns if not any(fits(pattern, path) for path in known)]
        if not lost:
            continue
        leaves = dict.fromkeys(path.rpartition(".")[2] for path in (paths if field == "exclude" else layers))
        if field == "targets" and re.sub(r"[\W_]", "", lost[0]).lower() == "alllinear":
            raise LoraLiteError(
                f"targets={cfg.targets!r} are names of layers, and none is called so.",
                expected='"all-linear", alone and not in a tuple, is every layer that can be adapted.',
                fix=repair(cfg, targets=EVERYTHING),
            )
        seconds = {b: a for b, a in names.items() if fits(lost[0], b)}
        near = {p: next((a for b, a in names.items() if fits(p, b)), nearest(p, leaves)) for p in lost}
        if field == "rank_pattern":
            ranks = {near[p] if p in lost else p: rank for p, rank in cfg.rank_pattern.items()}
            changes = {field: {pattern: rank for pattern, rank in ranks.items() if pattern}}
        elif field == "exclude":
            firsts = patterns_for([a for b, a in names.items() if any_fits(lost, b)], paths)
            changes = {field: tuple(dict.fromkeys([*(p for p in patterns if p not in lost), *firsts]))}
        nothing = field == "targets" and not changes["targets"]
        known_as = {p: {path: why for path, why in cannot.items() if fits(p, path)} | bare(every, p, present) for p in patterns}
        others = known_as[lost[0]] if field != "exclude" else {}
        hopeless = nothing and all(known_as.values())
        raise LoraLiteError(
            f"{field}: {lost[0]!r} " + ("selects no Linear." if field != "exclude" else "matches no module."),
            expected="Every pattern must fit at least one." if not hopeless else "Nothing that targets names can be adapted.",
            found=" ".join(
                [
                    *[f"{b!r} is {a!r}, one module of two names." for b, a in list(seconds.items())[:1]],
                    *filter(None, [reasons(others)]),
                    inventory(layers, ABLE) if hopeless else inventory(present),
                    "" if seconds or others else closest(lost[0].removeprefix("re:").strip("^$"), leaves),
                ]
            ).strip(),
            fix="" if hopeless else repair(cfg, targets=EVERYTHING) if nothing else repair(cfg, **changes),
        )


def bare(every: Mapping[str, nn.Module], pattern: str, present: Collection[str]) -> dict[str, str]:
    """{path of a parameter: what it is} of modules that a pattern means and that are no Linear, such as routers."""
    found: dict[str, str] = {}
    for path, module in every.items():
        leaf = fits(pattern, path) and not fits(pattern, path.rpartition(".")[0])
        if not leaf or is_linear(module) or any(p.startswith(f"{path}.") for p in present):
            continue
        own = {name: p for name, p in module.named_parameters(recurse=False) if not nn.parameter.is_lazy(p) and p.ndim > 1}
        parent, _, last = path.rpartition(".")
        beside = [name for name, _ in every[parent].named_children() if name != last]
        kind = "router: a parameter" if any("experts" in name.lower() for name in beside) else "a parameter"
        found |= {f"{path}.{name}": f"{kind} of shape {tuple(p.shape)}, no Linear" for name, p in own.items()}
    return found


def refuse_conflicts(cfg: AdapterConfig, paths: Collection[str]) -> None:
    """Raise where the longest patterns of ranks disagree, with ranks for each such layer alone."""
    apart = settled(cfg.rank_pattern, paths)
    if apart == cfg.rank_pattern:
        return
    try:
        for path in paths:
            cfg.rank_at(path)
    except LoraLiteError as error:
        raise LoraLiteError(str(error).split("\n")[0], fix=repair(cfg, rank_pattern=apart)) from error


def refuse_unused(cfg: AdapterConfig, named: dict[str, Layer], chosen: dict[str, Layer], skipped: dict[str, str]) -> None:
    """Raise for patterns whose layers other options leave out; `roles` and ranks of 0 only report."""
    before = [p for p in named if p in chosen or skipped.get(p, "").startswith(("a ", "rank 0"))]
    zero = [path for path, why in skipped.items() if why == "rank 0"]
    for field, patterns in (("targets", cfg.patterns()["targets"]), ("rank_pattern", cfg.rank_pattern)):
        for pattern in patterns:
            if not any(fits(pattern, path) for path in (before if field == "targets" else [*chosen, *zero])):
                kept = {k: v for k, v in cfg.rank_pattern.items() if k != pattern}
                rest = tuple(p for p in patterns if p != pattern)
                raise LoraLiteError(
                    f"{field}: {pattern!r} selects only layers that other options leave out.",
                    found=f"{options(cfg)}.",
                    fix=repair(cfg, rank_pattern=kept)
                    if field == "rank_pattern"
                    else repair(cfg, targets=rest)
                    if rest
                    else repair(cfg, exclude=(), layers=None, roles=None),
                )
