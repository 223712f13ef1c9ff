"""Who reads what of a PEFT folder: which variant takes which layers, with which config; what is left over is refused."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..contract import registry
from ..contract.adapter import Adapter
from ..contract.config import AdapterConfig
from ..contract.matching import Budget
from ..contract.pattern import exactly
from ..contract.strict import shown
from ..core.restore import of_file
from ..core.selection import find_targets
from ..errors import LoraLiteError, LoraLiteWarning, closest, some
from ..sites.layer import Layer, sizes
from ..sites.model import linears, unwrapped
from .folder import CONFIG, PREFIX
from .layout import INERT, Layout, Options, Stored, layouts
from .selecting import by_path, targeted

ABOUT = (
    "auto_mapping base_model_name_or_path fan_in_fan_out inference_mode layers_pattern layers_to_transform exclude_modules "
    "peft_type peft_version revision runtime_config target_modules task_type"
).split()
"""Options of every PEFT type that say where the folder comes from and which layers it is about."""


@dataclass
class Part:
    """What one variant reads from a folder: layout, config, the layers in the model's order, their tensors by PEFT's names, and
    the alphas of layers that have one of their own.
    """

    layout: Layout
    cls: type[Adapter]
    cfg: AdapterConfig
    targets: dict[str, Layer]
    stored: Stored
    alphas: dict[str, float]


def plan(model: nn.Module, folder: Path, options: Options, tensors: dict[str, Tensor]) -> list[Part]:
    """Who reads what. Raises LoraLiteError where something is left over, missing, or has no counterpart."""
    known = layouts()
    fitting = {v: l for v, l in known.items() if l.peft_type == options["peft_type"].upper() and applies(l, options)}
    if not fitting:
        types = sorted({layout.peft_type for layout in known.values()})
        raise LoraLiteError(
            f"{folder}: there is no counterpart of PEFT's {options['peft_type']}.",
            expected=f"One of {', '.join(types)}.",
            found=closest(options["peft_type"], types),
        )
    for layout in fitting.values():
        refuse_options(layout, options)
    budget = Budget()
    stored = by_layer(folder, list(fitting.values()), tensors)
    present = linears(unwrapped(model))
    paths = [path for path in stored if path]
    if missing := [path for path in paths if path not in present]:
        raise LoraLiteError(
            f"{folder} belongs to another model: it has no Linear {some(missing)}.",
            found=f"Linears here: {some(present)}.",
            fix="ll.load_peft(the_model_it_was_trained_on, folder)",
        )
    refuse_other_targets(model, folder, options, paths, budget)
    ranks, alphas = (by_path(options.get(patterns), paths, budget) for patterns in ("rank_pattern", "alpha_pattern"))
    widths = {path: sizes(present[path]) for path in present if path in stored}
    parts = []
    for variant, layout in fitting.items():
        mine = [path for path in widths if layout.covers(options, path)]
        if not mine:
            continue
        chosen = {path: stored[path] for path in mine} | ({"": stored[""]} if "" in stored else {})
        cls = registry.get(variant)
        with of_file(folder):
            cfg = config(cls, layout, options, chosen, mine, ranks)
        targets = find_targets(model, cfg)
        parts.append(Part(layout, cls, cfg, targets, layout.prepare(options, chosen, widths), alphas))
    return parts


def applies(layout: Layout, options: Options) -> bool:
    return all(options.get(option, False) == value for option, value in layout.when.items())


def refuse_options(layout: Layout, options: Options) -> None:
    """Raise for an option that changes outputs and has no counterpart; warn of what acts in PEFT's training alone."""
    patterns = ("rank_pattern", "alpha_pattern") if layout.patterns else ()
    read = {*ABOUT, *layout.unread, *layout.when, *layout.options.values(), *patterns}
    for option, value in options.items():
        if option in read or value in INERT or value in layout.allowed.get(option, ()):
            continue
        if option.endswith("dropout"):
            warnings.warn(f"{option}={value} is left out: there is no dropout here", LoraLiteWarning, stacklevel=4)
            continue
        starts = layout.allowed.get(option)
        raise LoraLiteError(
            f"{option}={shown(value)} has no counterpart here.",
            expected=f"{option}: one of {some(map(repr, (*starts, False)))}; others rewrite the base weight."
            if starts
            else f"{option} left at its default. Without it the outputs would be others.",
            fix="peft_model.save_pretrained(folder, path_initial_model_for_weight_conversion=start)" if starts else "",
        )


def by_layer(folder: Path, fitting: list[Layout], tensors: dict[str, Tensor]) -> Stored:
    """The folder's tensors by layer. Raises LoraLiteError for a name that the layout does not know."""
    own = {key.name for layout in fitting for key in layout.tensors.values()}
    common = {key.name for layout in fitting for key in layout.shared.values()}
    stored: Stored = {}
    unknown = []
    for key, tensor in tensors.items():
        rest = key.removeprefix(f"{PREFIX}model.")
        name = next((name for name in own if rest.endswith(f".{name}")), None)
        if key.removeprefix(PREFIX) in common:
            stored.setdefault("", {})[key.removeprefix(PREFIX)] = tensor
        elif rest != key and name:
            stored.setdefault(rest.removesuffix(f".{name}"), {})[name] = tensor
        else:
            unknown.append(key)
    if unknown or not any(stored):
        raise LoraLiteError(
            f"{folder}: {some(unknown)} has no place in PEFT's {fitting[0].peft_type}."
            if unknown
            else f"{folder} holds no adapter tensors.",
            expected=f"{PREFIX}model.<layer path>.<name>, name one of {some(sorted(own), 8)}.",
        )
    return stored


def refuse_other_targets(model: nn.Module, folder: Path, options: Options, paths: list[str], budget: Budget) -> None:
    """Raise where the layers that the config selects are not those that have tensors: a half-written or edited folder."""
    names = options.get("target_modules")
    if names is None:
        return
    if isinstance(names, str) and names.lower() == "all-linear":
        head = getattr(unwrapped(model), "get_output_embeddings", lambda: None)()
        wanted = {path for path, layer in linears(unwrapped(model)).items() if layer is not head}
    else:
        wanted = {path for path in linears(unwrapped(model)) if targeted(options, path, budget)}
    if wanted != set(paths):
        lacking, surplus = sorted(wanted - set(paths)), sorted(set(paths) - wanted)
        raise LoraLiteError(
            f"{folder}: the config and the tensors are about different layers.",
            expected="Tensors for exactly the layers that target_modules selects.",
            found=f"Without tensors: {some(lacking) or 'none'}; tensors beyond: {some(surplus) or 'none'}.",
            fix="peft_model.save_pretrained(folder)",
        )


def config(
    cls: type[Adapter], layout: Layout, options: Options, stored: Stored, paths: list[str], ranks: dict[str, int]
) -> AdapterConfig:
    """Our config of these layers, which are named one by one."""
    fields = {ours: options[theirs] for ours, theirs in layout.options.items() if options.get(theirs) is not None}
    if absent := [layout.options[ours] for ours in ("r", "alpha") if ours in layout.options and ours not in fields]:
        raise LoraLiteError(f"{CONFIG} leaves out {some(absent)}.", fix="peft_model.save_pretrained(folder)")
    fields |= layout.only | layout.deduced(options, stored)
    if layout.patterns:
        fields["rank_pattern"] = {exactly(path): ranks[path] for path in paths if ranks.get(path, fields["r"]) != fields["r"]}
    everywhere = tuple(exactly(path) for path in paths)
    return cls.Config(**fields, targets=everywhere, exclude=(), buffer_dtype=torch.float32)
