"""Whether the tensors of a PEFT folder are those of its config, before anything is allocated."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..contract.config import AdapterConfig
from ..core.reading import MOST_NUMBERS
from ..core.restore import declared
from ..errors import LoraLiteError, some
from ..mathematics.maps import is_finite
from .folder import PREFIX
from .layout import Key
from .plan import Part


def refuse_misfit(folder: Path, part: Part, configs: Mapping[str, AdapterConfig]) -> None:
    """Raise LoraLiteError naming missing, unexpected and misshaped tensors, and those that are no finite numbers."""
    problems: list[str] = []
    common: dict[str, tuple[int, ...]] = {}
    for path, cfg in configs.items():
        specs, held = declared(folder, part.cls, path, part.targets[path], cfg), part.stored[path]
        for name in specs.keys() & part.layout.shared.keys():
            common[name] = tuple(map(max, common.get(name, specs[name].shape), specs[name].shape))
        keys = {name: key for name, key in part.layout.tensors.items() if name in specs}
        problems += [f"unexpected {path}.{name}" for name in held.keys() - {key.name for key in keys.values()}]
        problems += [misfit(key, held, specs[name].shape, f"{path}.") for name, key in keys.items()]
    problems += [misfit(key, part.stored.get("", {}), common[name], PREFIX) for name, key in part.layout.shared.items()]
    if problems := sorted(filter(None, problems)):
        raise LoraLiteError(
            f"{folder} does not fit its own config: {some(problems)}.",
            expected="Exactly the tensors that PEFT stores for it, in finite floating-point numbers.",
            fix="peft_model.save_pretrained(folder)",
        )


def misfit(key: Key, held: Mapping[str, Tensor], shape: tuple[int, ...], where: str) -> str:
    """What is wrong with the tensor `key`, which is of this shape in our form; "" where nothing is."""
    tensor, where = held.get(key.name), f"{where}{key.name}"
    if tensor is None:
        return f"missing {where}"
    wanted = tuple(key.write(torch.empty(shape, device="meta")).shape) if math.prod(shape) <= MOST_NUMBERS else shape
    if tuple(tensor.shape) != wanted:
        return f"{where} has shape {tuple(tensor.shape)}, the config and the layer say {wanted}"
    if not tensor.is_floating_point():
        return f"{where} is {tensor.dtype}"
    return "" if is_finite(tensor) else f"{where} is not finite"
