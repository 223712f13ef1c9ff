"""load_peft: a PEFT folder as adapters with the outputs it has in PEFT, or an error that names what has no counterpart."""

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from ..contract import registry, shared
from ..contract.adapter import Adapter
from ..contract.config import AdapterConfig
from ..core import runtime
from ..core.handle import Attached, handle
from ..core.install import build_all, install, refuse_name, refuse_unready
from ..core.selection import find_targets
from ..errors import LoraLiteError, LoraLiteWarning, closest, some
from ..mathematics.maps import is_finite
from ..sites.layer import Layer, dense_weight, sizes
from ..sites.model import linears, unwrapped
from .export import CONFIG, PREFIX, TENSORS
from .layout import INERT, Key, Layout, Options, Stored, layouts, pattern_value, targeted

ABOUT = (
    "auto_mapping base_model_name_or_path fan_in_fan_out inference_mode layers_pattern layers_to_transform exclude_modules "
    "peft_type peft_version revision runtime_config target_modules task_type"
).split()
"""Options of every PEFT type that say where the folder comes from and which layers it is about."""


@dataclass
class Part:
    """What one variant reads from a folder: layout, config, the layers in the model's order, their tensors by PEFT's names."""

    layout: Layout
    cls: type[Adapter]
    cfg: AdapterConfig
    targets: dict[str, Layer]
    stored: Stored


class AttachedParts(Attached):
    """Handle of a folder that two variants read, each under a name of its own; `parts` are their handles.

    `layers`, `parameters`, `scale` and `detach` reach both. A checkpoint of ours holds one: save each part, or export both.
    """

    parts: tuple[Attached, ...]

    def save(self, path: str | Path) -> None:
        first, *rest = (part.name for part in self.parts)
        raise LoraLiteError(
            f"This folder became {len(self.parts)} adapters, {some(part.name for part in self.parts)}.",
            expected="One file for each.",
            fix=f'll.save(model, "{first}.safetensors", name="{first}")  # likewise {some(rest)}; or ll.export_peft',
        )

    def scale(self, coeff: float | Tensor | Mapping[str, float]) -> runtime.GroupScaling:
        settings: list[runtime.Scaling | runtime.GroupScaling] = []
        try:
            for part in self.parts:
                settings.append(part.scale(coeff))
        except BaseException:
            runtime.GroupScaling(settings).__exit__()
            raise
        return runtime.GroupScaling(settings)

    def detach(self) -> None:
        for part in self.parts:
            if part.is_attached():
                part.detach()


def load_peft(model: nn.Module, folder: str | Path, *, name: str = "default") -> Attached:
    """Attach what PEFT's `save_pretrained` wrote to `folder`, under `name`; outputs equal PEFT's in eval mode.

    A folder whose layers belong to two variants becomes two adapters, `name` and `name_2`, and one handle (AttachedParts).
    Raises LoraLiteError before anything is changed: a folder without config or tensors, a type or an option without a
    counterpart, layers that the model does not have, missing, unexpected or misshaped tensors, a name in use, a compiled,
    sharded or wrapped model.
    """
    folder = Path(folder)
    options, tensors = read_folder(folder)
    earlier = refuse_unready(model)
    parts = plan(model, folder, options, tensors)
    names = [name, *(f"{name}_{k}" for k in range(2, len(parts) + 1))]
    for part, part_name in zip(parts, names):
        refuse_name(earlier, part.targets, part_name)
    built = [filled(folder, part, options) for part in parts]
    handles: list[Attached] = []
    try:
        for part, part_name, adapters in zip(parts, names, built):
            install(unwrapped(model), part.targets, adapters, part_name, part.cfg)
            handles.append(handle(model, part_name, part.cfg, adapters))
    except BaseException:
        for done in handles:
            done.detach()
        raise
    if len(handles) == 1:
        return handles[0]
    layers = {path: adapter for part in handles for path, adapter in part.layers.items()}
    whole = AttachedParts(model, name, handles[0].config, layers, {})
    whole.parts = tuple(handles)
    return whole


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(options, tensors) of a PEFT folder. Raises LoraLiteError for one that is missing, half-written or not PEFT's."""
    fix = "peft_model.save_pretrained(folder)"
    if not folder.is_dir():
        raise LoraLiteError(f"{folder} is no folder.", expected="A local folder that PEFT wrote.", fix=fix)
    here = f"It holds {some(sorted(p.name for p in folder.iterdir())) or 'nothing'}."
    for file in (CONFIG, TENSORS):
        if not (folder / file).is_file():
            pickled = file == TENSORS and (folder / "adapter_model.bin").is_file()
            why = "adapter_model.bin is a pickle, which is not read." if pickled else ""
            raise LoraLiteError(f"{folder} has no {file}.", expected=why, found=here, fix=fix)
    try:
        options = json.loads((folder / CONFIG).read_text())
        with safetensors.safe_open(str(folder / TENSORS), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise LoraLiteError(f"{folder} cannot be read: {error}.", expected="A folder written to its end.", fix=fix) from error
    if not isinstance(options, dict) or not isinstance(options.get("peft_type"), str):
        raise LoraLiteError(f"{folder / CONFIG} has no peft_type.", expected="The config of a PEFT adapter.", fix=fix)
    for option, value in options.items():
        if not readable(option, value):
            raise LoraLiteError(f"{folder / CONFIG}: {option}={value!r} cannot be read.", fix=fix)
    return options, tensors


def readable(option: str, value: Any) -> bool:
    """Whether an option that selects layers has the form that PEFT gives it; its regular expressions must compile."""
    if value is None or not option.endswith(("_modules", "_pattern", "_to_transform")):
        return True
    if option == "layers_to_transform":
        return isinstance(value, int) or (isinstance(value, list) and all(isinstance(k, int) for k in value))
    if option in ("rank_pattern", "alpha_pattern"):
        if not isinstance(value, dict) or not all(isinstance(v, (int, float)) for v in value.values()):
            return False
    try:
        return all(re.compile(part) for part in ([value] if isinstance(value, str) else value))
    except (TypeError, re.error):
        return False


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
    stored = by_layer(folder, list(fitting.values()), tensors)
    present = linears(unwrapped(model))
    paths = [path for path in stored if path]
    if missing := [path for path in paths if path not in present]:
        raise LoraLiteError(
            f"{folder} belongs to another model: it has no Linear {some(missing)}.",
            found=f"Linears here: {some(present)}.",
            fix="ll.load_peft(the_model_it_was_trained_on, folder)",
        )
    refuse_other_targets(model, folder, options, paths)
    widths = {path: sizes(present[path]) for path in present if path in stored}
    parts = []
    for variant, layout in fitting.items():
        mine = [path for path in widths if layout.covers(options, path)]
        if not mine:
            continue
        chosen = {path: stored[path] for path in mine} | ({"": stored[""]} if "" in stored else {})
        cls = registry.get(variant)
        cfg = config(cls, layout, options, chosen, mine)
        targets = find_targets(model, cfg)
        parts.append(Part(layout, cls, cfg, targets, layout.prepare(options, chosen, widths)))
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
            f"{option}={value!r} has no counterpart here.",
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


def refuse_other_targets(model: nn.Module, folder: Path, options: Options, paths: list[str]) -> None:
    """Raise where the layers that the config selects are not those that have tensors: a half-written or edited folder."""
    names = options.get("target_modules")
    if names is None:
        return
    if isinstance(names, str) and names.lower() == "all-linear":
        head = getattr(unwrapped(model), "get_output_embeddings", lambda: None)()
        wanted = {path for path, layer in linears(unwrapped(model)).items() if layer is not head}
    else:
        wanted = {path for path in linears(unwrapped(model)) if targeted(options, path)}
    if wanted != set(paths):
        lacking, surplus = sorted(wanted - set(paths)), sorted(set(paths) - wanted)
        raise LoraLiteError(
            f"{folder}: the config and the tensors are about different layers.",
            expected="Tensors for exactly the layers that target_modules selects.",
            found=f"Without tensors: {some(lacking) or 'none'}; tensors beyond: {some(surplus) or 'none'}.",
            fix="peft_model.save_pretrained(folder)",
        )


def config(cls: type[Adapter], layout: Layout, options: Options, stored: Stored, paths: list[str]) -> AdapterConfig:
    """Our config of these layers, which are named one by one."""
    fields = {ours: options[theirs] for ours, theirs in layout.options.items() if options.get(theirs) is not None}
    if absent := [layout.options[ours] for ours in ("r", "alpha") if ours in layout.options and ours not in fields]:
        raise LoraLiteError(f"{CONFIG} leaves out {some(absent)}.", fix="peft_model.save_pretrained(folder)")
    fields |= layout.only | layout.deduced(options, stored)
    if layout.patterns:
        ranks = {path: pattern_value(options.get("rank_pattern"), path, fields["r"]) for path in paths}
        fields["rank_pattern"] = {f"^{re.escape(path)}$": r for path, r in ranks.items() if r != fields["r"]}
    everywhere = tuple(f"^{re.escape(path)}$" for path in paths)
    return cls.Config(**fields, targets=everywhere, exclude=(), buffer_dtype=torch.float32)


@torch.no_grad()
def filled(folder: Path, part: Part, options: Options) -> dict[str, Adapter]:
    """The adapters with the folder's numbers. Raises LoraLiteError naming missing, unexpected and misshaped tensors."""
    adapters = build_all(part.cls, part.targets, part.cfg)
    common = {name: shape for name, (_, shape) in shared.declared(adapters).items()}
    problems: list[str] = []
    values: dict[str, dict[str, Tensor]] = {"": {}}
    for name, key in part.layout.shared.items():
        values[""][name] = taken(key, part.stored.get("", {}), torch.zeros(common[name]), PREFIX, problems)
    for path, adapter in adapters.items():
        held = part.stored[path]
        keys = {name: key for name, key in part.layout.tensors.items() if name in adapter.specs()}
        problems += [f"unexpected {path}.{name}" for name in held.keys() - {key.name for key in keys.values()}]
        values[path] = {n: taken(key, held, getattr(adapter, n), f"{path}.", problems) for n, key in keys.items()}
    if problems:
        raise LoraLiteError(
            f"{folder} does not fit its own config: {some(sorted(problems))}.",
            expected="Exactly the tensors that PEFT stores for it, in finite floating-point numbers.",
            fix="peft_model.save_pretrained(folder)",
        )
    shared.fill(adapters, values[""])
    for path, adapter in adapters.items():
        if adapter.specs().keys() - values[path].keys() - common.keys():
            adapter.start(path)
            adapter.init(dense_weight(part.targets[path]))
        for name, value in values[path].items():
            getattr(adapter, name).copy_(value)
        rescale(part.layout, adapter, options, path)
    return adapters


def taken(key: Key, held: dict[str, Tensor], place: Tensor, where: str, problems: list[str]) -> Tensor:
    """The tensor `key` in our form; what is wrong with it goes into `problems`."""
    tensor, shape = held.get(key.name), tuple(key.write(place.detach()).shape)
    if tensor is None:
        problems.append(f"missing {where}{key.name}")
    elif tuple(tensor.shape) != shape:
        problems.append(f"{where}{key.name} has shape {tuple(tensor.shape)}, the config and the layer say {shape}")
    elif not (tensor.is_floating_point() and is_finite(tensor)):
        problems.append(f"{where}{key.name} is {'not finite' if tensor.is_floating_point() else tensor.dtype}")
    else:
        return key.read(tensor.to(torch.promote_types(tensor.dtype, torch.float32))).reshape(place.shape)
    return place


def rescale(layout: Layout, adapter: Adapter, options: Options, path: str) -> None:
    """PEFT's scale where alpha_pattern makes it another than our config's: the rest goes into one tensor."""
    if "alpha" not in layout.options:
        return
    alpha = pattern_value(options.get("alpha_pattern"), path, options[layout.options["alpha"]])
    root = "rslora" in layout.options and adapter.cfg.rslora
    ratio = alpha / (adapter.cfg.r**0.5 if root else adapter.cfg.r) / adapter.s
    if ratio != 1.0:
        name = next(name for name in layout.scaled.split() if hasattr(adapter, name))
        getattr(adapter, name).mul_(ratio)
