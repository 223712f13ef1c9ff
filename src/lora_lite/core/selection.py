"""Which layers a config hits, what it leaves out, and why.

Structure decides: what computes W x + b and is called, what shares a weight, what stands outside the base model, what chooses
experts. "all-linear" leaves out what cannot or should not be adapted and says so; what is asked for by name and cannot be
adapted is refused. Every repair in an error is the whole config, with the user's own options.
"""

import warnings
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..contract.config import AdapterConfig
from ..contract.pattern import any_fits, fits
from ..errors import LoraLiteError, LoraLiteWarning, some
from ..sites import obstacles
from ..sites.layer import Layer, unfit
from ..sites.model import block_index, block_lists, linears, refuse_no_module, unwrapped
from .fitness import impossible, read_at_times, unwanted
from .refusals import refuse_conflicts, refuse_impossible, refuse_unmatched, refuse_unused
from .repairs import TIED, inventory, options, order, patterns_for, reasons, repair
from .roles import roles


@dataclass(frozen=True)
class Selection:
    """chosen {path: layer} in the model's order; skipped {path: reason} of what "all-linear", or a named target, leaves out."""

    chosen: dict[str, Layer]
    skipped: dict[str, str]


def find_targets(model: nn.Module, cfg: AdapterConfig) -> dict[str, Layer]:
    """{path: layer} of what `attach` would hit, in the model's order; touches nothing.

    Targets are Linear-like modules: nn.Linear, bitsandbytes 4-bit and 8-bit, torchao-quantised Linears, and Conv1D.

    Raises LoraLiteError for a model without a layer that can be adapted, patterns or block indices that fit nothing, and layers
    that are asked for by name and cannot be adapted: read and never called, tied to another, with a forward that is not
    W x + b, of unknown kind, parameters of experts. What a layer computes is measured in eval mode: whether `model.eval()` was
    called decides nothing. Warns once where `roles` is set and the role of a layer cannot be told.
    """
    return select(model, cfg).chosen


def select(model: nn.Module, cfg: AdapterConfig) -> Selection:
    """What `find_targets` says, with the reasons for what is left out."""
    refuse_no_module(model)
    model = unwrapped(model)
    refuse_peft(model)
    present, cannot = linears(model), impossible(model)
    if not present.keys() - cannot.keys():
        raise LoraLiteError(
            f"{type(model).__name__} has no Linear layers that can be adapted.",
            expected="An adapter needs nn.Linear, Conv1D or a quantised Linear that is called.",
            found=reasons(cannot) or f"Modules: {some({type(m).__name__ for m in model.modules()})}.",
            fix="ll.attach(model, cfg)  # model: one with Linears that it calls",
        )
    refuse_unmatched(model, cfg, present, cannot)
    lists = block_lists(model)
    everything = cfg.targets == "all-linear"
    left_out = (unwanted(model, present) if everything else {}) | cannot
    named = {path: layer for path, layer in present.items() if everything or any_fits(cfg.targets, path)}
    skipped = {path: why for path, why in left_out.items() if everything}
    chosen = {path: layer for path, layer in named.items() if not (everything and path in left_out)}
    for path in list(chosen):
        if fit := [pattern for pattern in cfg.exclude if fits(pattern, path)]:
            skipped[path] = f"exclude={fit[0]!r}"
            del chosen[path]
    chosen = in_blocks(cfg, chosen, lists, skipped)
    chosen = with_roles(model, cfg, chosen, present, lists, skipped)
    refuse_conflicts(cfg, chosen)
    for path in [p for p in chosen if cfg.rank_at(p) == 0]:
        skipped[path] = "rank 0"
        del chosen[path]
    if offenders := {path: cannot[path] for path in chosen if path in cannot}:
        refuse_impossible(cfg, present, cannot, offenders)
    refuse_half_of_tied(model, cfg, chosen, [path for path in present if path not in cannot], skipped)
    if not chosen:
        guilty = culprits(cfg, [skipped[path] for path in named if path in skipped])
        able = [path for path in present if path not in cannot]
        raise LoraLiteError(
            f"{options(cfg)} together select no Linear that can be adapted.",
            found=reasons(skipped) or inventory(present),
            fix=repair(cfg, **(guilty or {"targets": patterns_for(able, [*present, *cannot])})),
        )
    refuse_unused(cfg, named, chosen, skipped)
    if half := {path: how for path, how in read_at_times(model).items() if path in chosen}:
        warnings.warn(
            f"{reasons(half)} The adapter has a part in the call alone: compare outputs before and after ll.merge(model), in "
            "train and in eval mode.",
            LoraLiteWarning,
            stacklevel=4,
        )
    return Selection(chosen, dict(sorted(skipped.items(), key=lambda item: order(item[0]))))


def refuse_half_of_tied(
    model: nn.Module, cfg: AdapterConfig, chosen: dict[str, Layer], present: Collection[str], skipped: dict[str, str]
) -> None:
    """Layers that share a weight are adapted together or not at all: of a half, merging would change the other."""
    shared = obstacles.tied(model)
    halves = {p: TIED + next(o for o in shared[p] if o not in chosen) for p in chosen if set(shared.get(p, ())) - chosen.keys()}
    if halves and cfg.targets != "all-linear":
        lacking = [o for p in halves for o in shared[p] if o not in chosen]
        together = all(o in present and not any_fits((*cfg.targets, *cfg.exclude), o) for o in lacking)
        refuse_impossible(cfg, present, halves, halves, patterns_for(lacking, present) if together else ())
    for path in halves:
        skipped[path] = halves[path]
        del chosen[path]


def culprits(cfg: AdapterConfig, whys: Collection[str]) -> dict[str, Any]:
    """{option without what left layers out} for those of the reasons that an option gave."""
    said = {"exclude=": {"exclude": ()}, "block ": {"layers": None}, "in no block": {"layers": None}, "a ": {"roles": None}}
    said["rank 0"] = {"rank_pattern": {pattern: rank for pattern, rank in cfg.rank_pattern.items() if rank}}
    return {k: v for start, change in said.items() if any(why.startswith(start) for why in whys) for k, v in change.items()}


def in_blocks(
    cfg: AdapterConfig, chosen: dict[str, Layer], lists: dict[str, list[str]], skipped: dict[str, str]
) -> dict[str, Layer]:
    """Those of the blocks that `layers` names. Raises where there is no such block, or several lists of blocks."""
    if cfg.layers is None:
        return chosen
    places = {path: block_index(path, lists) for path in chosen}
    used = list(dict.fromkeys(place[0] for place in places.values() if place))
    if len(used) > 1:
        raise LoraLiteError(
            f"layers={cfg.layers} could mean blocks of {' or of '.join(used)}.",
            expected="Indices of one list of blocks.",
            found=f"Lists: {some(f'{name} ({len(lists[name])} blocks)' for name in used)}.",
            fix=repair(cfg, exclude=(*cfg.exclude, *(exclusion(name) for name in used[1:]))) + f"  # for those of {used[0]}",
        )
    known = range(len(lists[used[0]])) if used else range(0)
    if missing := sorted(set(cfg.layers) - set(known)):
        raise LoraLiteError(
            f"layers={cfg.layers}: there is no block {missing[0]}.",
            expected=f"Block indices of this model: 0 to {len(known) - 1}." if known else "A model with a list of blocks.",
            fix=repair(cfg, layers=tuple(i for i in cfg.layers if i in known) or None),
        )
    kept = {}
    for path, layer in chosen.items():
        place = places[path]
        if place and place[1] in cfg.layers:
            kept[path] = layer
        else:
            skipped[path] = f"block {place[1]}; layers={cfg.layers}" if place else f"in no block; layers={cfg.layers}"
    return kept


def exclusion(path: str) -> str:
    """A pattern for everything under this path, of whatever grammar its names need."""
    return path if path else "re:."


def with_roles(
    model: nn.Module,
    cfg: AdapterConfig,
    chosen: dict[str, Layer],
    present: dict[str, Layer],
    lists: dict[str, list[str]],
    skipped: dict[str, str],
) -> dict[str, Layer]:
    """Those with the roles that are wanted; a layer whose role cannot be told stays, with a warning."""
    if cfg.roles is None:
        return chosen
    of = dict.fromkeys(present) | roles(model, {path: layer for path, layer in present.items() if not unfit(layer)}, lists)
    if unknown := [path for path in chosen if of[path] is None]:
        warnings.warn(
            f"roles={cfg.roles}: cannot tell whether {some(unknown)} read or write the residual stream; they stay. "
            f"Name the layers with targets=... to choose yourself.",
            LoraLiteWarning,
            stacklevel=4,
        )
    for path in chosen:
        if of[path] not in (*cfg.roles, None):
            skipped[path] = f"a {of[path]}; roles={cfg.roles}"
    return {path: layer for path, layer in chosen.items() if of[path] in (*cfg.roles, None)}


def refuse_peft(model: nn.Module) -> None:
    if path := obstacles.foreign_adapters(model):
        raise LoraLiteError(
            f"{path} carries an adapter of PEFT.",
            expected="A plain model: PEFT's adapters would be frozen, and adapted themselves.",
            fix="model = model.merge_and_unload()  # or, to go on training it here: peft_model.save_pretrained(folder); "
            "model = peft_model.unload(); ll.load_peft(model, folder)",
        )
