"""load: attach what a file holds; no SVD, no data, no randomness."""

import json
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ..contract import registry, shared
from ..contract.adapter import Adapter
from ..contract.attachment import Lineage
from ..errors import LoraLiteError, some
from ..mathematics.maps import is_finite
from ..sites.layer import Layer, is_linear
from ..sites.model import unwrapped
from .checkpoint import read
from .fingerprint import digest, refuse_other_base
from .handle import Attached, handle
from .install import build_all, install, refuse_name, refuse_unready


def load(model: nn.Module, path: str | Path, *, name: str | None = None, strict_base: bool = True) -> Attached:
    """Attach the adapter in the file to a model with the same base; no SVD, no data, no randomness.

    name         of the adapter; None: the one it was saved under
    strict_base  False loads on a base whose weights differ from those it was trained on
    Raises LoraLiteError before anything is changed: unreadable or newer file, unknown variant, missing layers, another base,
    missing, unexpected or misshaped tensors, a name in use, a compiled, sharded or wrapped model.
    """
    header, tensors = read(path)
    cls = registry.get(header["variant"])
    cfg = cls.Config.from_json(header["config"])
    if absent := cls.Config.__dataclass_fields__.keys() - json.loads(header["config"]).keys():
        raise LoraLiteError(
            f"{path} leaves out {some(sorted(absent))} of {cls.Config.__name__}.",
            expected="The full config: a default of today need not be that of the training.",
            fix="ll.save(model, path)",
        )
    name = header["name"] if name is None else name
    earlier = refuse_unready(model)
    targets = layers_of(model, path, json.loads(header["layers"]))
    refuse_name(earlier, targets, name)
    if strict_base:
        refuse_other_base(path, targets, json.loads(header["base"]), int(header["version"]))
    adapters = build_all(cls, targets, cfg)
    restore(path, adapters, tensors, redrawn(path, adapters, cfg.seed, json.loads(header.get("drawn", "{}"))))
    install(unwrapped(model), targets, adapters, name, cfg, Lineage(**json.loads(header.get("lineage", "{}"))))
    return handle(model, name, cfg, adapters)


def layers_of(model: nn.Module, path: str | Path, wanted: list[str]) -> dict[str, Layer]:
    modules = dict(model.named_modules())
    if missing := [p for p in wanted if p not in modules or not is_linear(modules[p])]:
        present = [p for p, m in modules.items() if is_linear(m)]
        raise LoraLiteError(
            f"{path} belongs to another model: it has no Linear {some(missing)}.",
            found=f"Linears here: {some(present)}.",
            fix="ll.load(the_model_it_was_saved_from, path)",
        )
    return {p: cast(Layer, modules[p]) for p in wanted}


def redrawn(path: str | Path, adapters: dict[str, Adapter], seed: int, hashes: dict[str, str]) -> dict[str, Tensor]:
    """The shared tensors that the file leaves out, drawn from the seed. Raises LoraLiteError where a hash differs."""
    values = shared.draws(adapters, seed) if hashes else {}
    if wrong := [name for name, hash_ in hashes.items() if name not in values or digest(values[name].float()) != hash_]:
        raise LoraLiteError(
            f"{path}: {some(wrong)} cannot be drawn again from seed={seed}.",
            expected="The numbers that the training drew; generators differ between versions of torch.",
            fix="ll.attach(model, dataclasses.replace(cfg, save_shared=True))  # trains an adapter that stores them",
        )
    return {name: values[name] for name in hashes}


def restore(path: str | Path, adapters: dict[str, Adapter], tensors: dict[str, Tensor], known: dict[str, Tensor]) -> None:
    """Copy the file's tensors into the built adapters, `known` shared ones beside them.

    Raises LoraLiteError naming missing, unexpected and misshaped ones.
    """
    places = {f"{p}.{key}": tensor for p, adapter in adapters.items() for key, tensor in adapter.own().items()}
    common = {name: shared.holders(adapters, name) for name in shared.declared(adapters)}
    places |= {f"*.{name}": found[0].tensor for name, found in common.items() if name not in known}
    problems = [f"missing {key}" for key in places.keys() - tensors.keys()]
    problems += [f"unexpected {key}" for key in tensors.keys() - places.keys()]
    problems += [
        f"{key} has shape {tuple(tensors[key].shape)}, the config says {tuple(place.shape)}"
        for key, place in places.items()
        if key in tensors and tensors[key].shape != place.shape
    ]
    problems += [
        f"{key} is {str(tensor.dtype).removeprefix('torch.')}"
        for key, tensor in tensors.items()
        if key in places and not tensor.is_floating_point()
    ]
    with torch.no_grad():
        for key, place in () if problems else places.items():
            if not is_finite(place.copy_(tensors[key])):
                problems.append(f"{key} is not finite")
    if problems:
        raise LoraLiteError(
            f"{path} does not fit its own config: {some(sorted(problems))}.",
            expected="Exactly the tensors that the variant declares, in finite floating-point numbers.",
            fix="ll.save(model, path)  # with the version that trained it",
        )
    with torch.no_grad():
        shared.fill(adapters, {**{name: tensors[f"*.{name}"] for name in common if name not in known}, **known})
