"""A file's or a snapshot's tensors into built adapters: by name, strictly, nothing drawn but what the file says to draw."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ..contract import shared
from ..contract.adapter import Adapter
from ..contract.config import AdapterConfig
from ..contract.spec import ParamSpec
from ..errors import LoraLiteError, some
from ..mathematics.maps import is_finite
from ..sites.layer import Layer, is_linear, sizes
from .fingerprint import digest

MOST_DRAWN = 2**27  # numbers of a shared tensor that a file may leave out


@contextlib.contextmanager
def of_file(path: str | Path) -> Iterator[None]:
    """LoraLiteErrors of the block begin with the file whose content they are about."""
    try:
        yield
    except LoraLiteError as error:
        raise error if str(error).startswith(str(path)) else LoraLiteError(f"{path}: {error}") from error


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


def upgraded(cls: type[Adapter], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names that the variant gives them, where an earlier version had others."""
    of: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, _, leaf = key.rpartition(".")
        of.setdefault(path, {})[leaf] = tensor
    own = {path: found if path == "*" else cls.upgraded(found) for path, found in of.items()}
    return {f"{path}.{leaf}": tensor for path, found in own.items() for leaf, tensor in found.items()}


def misfits(expected: dict[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with a file's tensors beside the shapes that its config declares, in words."""
    problems = [f"missing {key}" for key in expected.keys() - tensors.keys()]
    problems += [f"unexpected {key}" for key in tensors.keys() - expected.keys()]
    for key in expected.keys() & tensors.keys():
        tensor, shape = tensors[key], expected[key]
        if tuple(tensor.shape) != shape:
            problems.append(f"{key} has shape {tuple(tensor.shape)}, the config says {shape}")
        elif not tensor.is_floating_point():
            problems.append(f"{key} is {str(tensor.dtype).removeprefix('torch.')}")
        elif not is_finite(tensor):
            problems.append(f"{key} is not finite")
    return problems


def refuse_misfit(
    path: str | Path,
    cls: type[Adapter],
    targets: Mapping[str, Layer],
    configs: Mapping[str, AdapterConfig],
    tensors: dict[str, Tensor],
    drawn: Mapping[str, str],
) -> None:
    """Raise LoraLiteError, before anything is allocated or drawn, where the file's tensors are not those of its config."""
    expected: dict[str, tuple[int, ...]] = {}
    common: dict[str, tuple[int, ...]] = {}
    for place, cfg in configs.items():
        for name, spec in declared(path, cls, place, targets[place], cfg).items():
            if spec.shared:
                common[name] = tuple(map(max, zip(common.get(name, spec.shape), spec.shape)))
            else:
                expected[f"{place}.{name}"] = spec.shape
    if alien := [name for name in drawn if math.prod(common.get(name, (2 * MOST_DRAWN,))) > MOST_DRAWN]:
        raise LoraLiteError(
            f"{path}: {some(alien)} cannot be drawn again.",
            expected=f"What layers share, of at most {MOST_DRAWN} numbers: {some(common) or 'nothing'}.",
        )
    expected |= {f"*.{name}": shape for name, shape in common.items() if name not in drawn}
    refuse(path, misfits(expected, upgraded(cls, tensors)))


def declared(path: str | Path, cls: type[Adapter], place: str, layer: Layer, cfg: AdapterConfig) -> dict[str, ParamSpec]:
    """The specs of one layer. Raises LoraLiteError also where options of a file lead a variant's own code astray."""
    try:
        return cls.param_specs(*sizes(layer), cfg)
    except LoraLiteError as error:
        raise LoraLiteError(f"{path}: {place} (d_in={sizes(layer)[0]}, d_out={sizes(layer)[1]}): {error}") from error
    except (ArithmeticError, ValueError, TypeError, LookupError, MemoryError, RuntimeError) as error:
        raise LoraLiteError(
            f"{path}: the config of {place} is none of {cls.variant}: {type(error).__name__} {error}.",
            fix="ll.save(model, path)  # with the version that trained it",
        ) from error


def refuse(path: str | Path, problems: list[str]) -> None:
    if problems:
        raise LoraLiteError(
            f"{path} does not fit its own config: {some(sorted(problems))}.",
            expected="Exactly the tensors that the variant declares, in finite floating-point numbers.",
            fix="ll.save(model, path)  # with the version that trained it",
        )


def restore(path: str | Path, adapters: dict[str, Adapter], tensors: dict[str, Tensor], known: dict[str, Tensor]) -> None:
    """Copy the file's tensors into the built adapters, `known` shared ones beside them.

    Raises LoraLiteError naming missing, unexpected and misshaped ones.
    """
    tensors = upgraded(type(next(iter(adapters.values()))), tensors)
    places = {f"{p}.{key}": tensor for p, adapter in adapters.items() for key, tensor in adapter.own().items()}
    common = {name: shared.holders(adapters, name) for name in shared.declared(adapters)}
    places |= {f"*.{name}": found[0].tensor for name, found in common.items() if name not in known}
    refuse(path, misfits({key: tuple(place.shape) for key, place in places.items()}, tensors))
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
