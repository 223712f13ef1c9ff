"""load_peft: a PEFT folder as adapters with the outputs it has in PEFT, or an error that names what has no counterpart."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..contract import shared
from ..contract.adapter import Adapter
from ..core import coefficients
from ..core.atomic import atomic
from ..core.fitness import refuse_places
from ..core.handle import Attached
from ..core.install import build_all, configs_of, install, refuse_name, refuse_unready
from ..core.quiet import quiet
from ..errors import LoraLiteError, some
from ..mathematics.maps import is_finite
from ..sites.layer import dense_weight
from ..sites.model import unwrapped
from .fit import refuse_misfit
from .folder import read_folder
from .layout import Key, Options
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

    def scale(self, coeff: float | Tensor | Mapping[str, float]) -> coefficients.Scaling:
        new = [one for part in self.parts for one in coefficients.settings(self.model, coeff, part.name)]
        return coefficients.Scaling(self.model, new)

    def detach(self) -> None:
        for part in self.parts:
            if part.is_attached():
                part.detach()


@atomic
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
        refuse_places(model, folder, part.targets)
    built = [filled(folder, part, options) for part in parts]
    handles: list[Attached] = []
    with quiet(unwrapped(model)):
        for part, part_name, adapters in zip(parts, names, built):
            install(model, part.targets, adapters, part_name, part.cfg)
            handles.append(Attached(model, part_name, part.cfg, adapters, {}))
    if len(handles) == 1:
        return handles[0]
    layers = {path: adapter for part in handles for path, adapter in part.layers.items()}
    whole = AttachedParts(model, name, handles[0].config, layers, {})
    whole.parts = tuple(handles)
    return whole


@torch.no_grad()
def filled(folder: Path, part: Part, options: Options) -> dict[str, Adapter]:
    """The adapters with the folder's numbers. Raises LoraLiteError naming missing, unexpected and misshaped tensors."""
    configs = configs_of(part.cfg, None, part.targets)
    refuse_misfit(folder, part, configs)
    adapters = build_all(part.cls, part.targets, configs)
    common = {name: shape for name, (_, shape) in shared.declared(adapters).items()}
    values: dict[str, dict[str, Tensor]] = {"": {}}
    for name, key in part.layout.shared.items():
        values[""][name] = taken(key, part.stored[""], common[name])
    for path, adapter in adapters.items():
        values[path] = {
            name: taken(key, part.stored[path], tuple(getattr(adapter, name).shape))
            for name, key in part.layout.tensors.items()
            if name in adapter.specs()
        }
    shared.fill(adapters, values[""])
    for path, adapter in adapters.items():
        if adapter.specs().keys() - values[path].keys() - common.keys():
            adapter.start(path)
            adapter.init(dense_weight(part.targets[path]))
        for name, value in values[path].items():
            getattr(adapter, name).copy_(value)
        rescale(folder, part, adapter, options, path)
    return adapters


def taken(key: Key, held: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """The tensor `key` in our form."""
    tensor = held[key.name]
    return key.read(tensor.to(torch.promote_types(tensor.dtype, torch.float32))).reshape(shape)


def rescale(folder: Path, part: Part, adapter: Adapter, options: Options, path: str) -> None:
    """PEFT's scale where alpha_pattern makes it another than our config's: the rest goes into one tensor."""
    layout = part.layout
    if "alpha" not in layout.options:
        return
    alpha = part.alphas.get(path, options[layout.options["alpha"]])
    root = "rslora" in layout.options and adapter.cfg.rslora
    ratio = alpha / (adapter.cfg.r**0.5 if root else adapter.cfg.r) / adapter.s
    if ratio != 1.0:
        name = next(name for name in layout.scaled.split() if hasattr(adapter, name))
        if not is_finite(getattr(adapter, name).mul_(ratio)):
            raise LoraLiteError(f"{folder}: alpha={alpha:g} of {path} makes {name} overflow.", expected="A finite scale.")
