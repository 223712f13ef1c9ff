"""load_peft: a PEFT folder as adapters with the outputs it has in PEFT, or an error that names what has no counterpart."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..contract import shared
from ..contract.adapter import Adapter
from ..core import runtime
from ..core.handle import Attached
from ..core.install import build_all, configs_of, install, refuse_name, refuse_unready
from ..errors import LoraLiteError, some
from ..mathematics.maps import is_finite
from ..sites.layer import dense_weight
from .folder import PREFIX, read_folder
from .layout import Key, Layout, Options, pattern_value
from .plan import Part, plan


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
            install(model, part.targets, adapters, part_name, part.cfg)
            handles.append(Attached(model, part_name, part.cfg, adapters, {}))
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


@torch.no_grad()
def filled(folder: Path, part: Part, options: Options) -> dict[str, Adapter]:
    """The adapters with the folder's numbers. Raises LoraLiteError naming missing, unexpected and misshaped tensors."""
    adapters = build_all(part.cls, part.targets, configs_of(part.cfg, None, part.targets))
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
