"""A file's or a snapshot's tensors into built adapters: by name, strictly, nothing drawn but what the file says to draw."""

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ..contract import shared
from ..contract.adapter import Adapter
from ..errors import LoraLiteError, some
from ..mathematics.maps import is_finite
from ..sites.layer import Layer, is_linear
from .fingerprint import digest


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


def upgraded(adapters: dict[str, Adapter], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names that the variant gives them, where an earlier version had others."""
    of: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, _, leaf = key.rpartition(".")
        of.setdefault(path, {})[leaf] = tensor
    own = {path: adapters[path].upgraded(found) if path in adapters else found for path, found in of.items()}
    return {f"{path}.{leaf}": tensor for path, found in own.items() for leaf, tensor in found.items()}


def restore(path: str | Path, adapters: dict[str, Adapter], tensors: dict[str, Tensor], known: dict[str, Tensor]) -> None:
    """Copy the file's tensors into the built adapters, `known` shared ones beside them.

    Raises LoraLiteError naming missing, unexpected and misshaped ones.
    """
    tensors = upgraded(adapters, tensors)
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
    problems += [f"{key} is not finite" for key in places if key in tensors and not is_finite(tensors[key])]
    if problems:
        raise LoraLiteError(
            f"{path} does not fit its own config: {some(sorted(problems))}.",
            expected="Exactly the tensors that the variant declares, in finite floating-point numbers.",
            fix="ll.save(model, path)  # with the version that trained it",
        )
    with torch.no_grad():
        for key, place in places.items():
            place.copy_(tensors[key])
        shared.fill(adapters, {**{name: tensors[f"*.{name}"] for name in common if name not in known}, **known})
    if worse := [key for key, place in places.items() if not is_finite(place)]:
        raise LoraLiteError(
            f"{path}: {some(worse)} overflows the dtype that its config asks for.",
            expected="A dtype that holds the file's numbers.",
            fix="ll.save(model, path)  # with the version that trained it",
        )
