"""load: attach what a file holds; no SVD, no data, no randomness."""

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import nn

from ..contract import registry
from ..contract.attachment import Lineage
from ..errors import LoraLiteError, LoraLiteWarning, closest, some
from ..sites.model import linears, unwrapped
from .atomic import atomic
from .checkpoint import Contents, Stored, contents
from .fingerprint import refuse_other_base
from .fitness import refuse_absent, refuse_places
from .handle import Attached, AttachedSet
from .install import build_all, install, refuse_name, refuse_unready
from .quiet import quiet
from .ranks import configs_in
from .restore import layers_of, of_file, redrawn, refuse_misfit, restore
from .untouched import combined, samples


@atomic
def load(
    model: nn.Module,
    path: str | Path,
    *,
    name: str | None = None,
    names: Mapping[str, str] | None = None,
    paths: Mapping[str, str] | None = None,
    trainable: bool = True,
    strict_base: bool = True,
) -> Attached | AttachedSet:
    """Attach the adapters in the file to a model with the same base; no SVD, no data, no randomness.

    name         the adapter to take from a file of several; of a file of one, what to call it
    names        {name in the file: name on this model}
    paths        {start of a layer's path in the file: start of its path here}, for modules that were renamed since
    trainable    False: its tensors ask for no gradient
    strict_base  False loads on a base whose weights differ from those it was trained on
    Returns a handle, or of several adapters an AttachedSet {name: handle}.
    Raises LoraLiteError before anything is changed: unreadable, damaged or newer file, unknown variant, missing layers, another
    base, missing, unexpected or misshaped tensors, a name in use, a compiled, sharded or wrapped model. Warns where weights of
    the base model that no adapter stands on differ from those of the training.
    """
    file = contents(path)
    chosen = renamed(path, file, name, dict(names or {}))
    earlier = refuse_unready(model)
    prepared = []
    for called, stored in chosen.items():
        moved = {place: renamed_path(place, dict(paths or {})) for place in stored.layers}
        refuse_unused_paths(path, dict(paths or {}), moved)
        with of_file(path):
            cls = registry.get(stored.variant)
            cfg = cls.Config.from_file(stored.config, stored.prefix)
        if absent := cls.Config.__dataclass_fields__.keys() - cls.Config.before().keys() - json.loads(stored.config).keys():
            raise LoraLiteError(
                f"{path} leaves out {some(sorted(absent))} of {cls.Config.__name__}.",
                expected="The full config: a default of today need not be that of the training.",
                fix="ll.save(model, path)",
            )
        refuse_absent(model, path, moved)
        targets = layers_of(model, path, list(moved.values()))
        refuse_name(earlier, targets, called)
        if strict_base:
            refuse_other_base(path, targets, {moved[place]: file.base[place] for place in moved}, file.version)
        tensors = {renamed_key(key, moved): tensor for key, tensor in stored.tensors.items()}
        with of_file(path):
            configs = configs_in(path, cls, cfg, stored, moved, targets)
        refuse_misfit(path, cls, targets, configs, tensors, stored.drawn)
        adapters = build_all(cls, targets, configs)
        restore(path, adapters, tensors, redrawn(path, adapters, cfg.seed, stored.drawn))
        refuse_places(model, path, targets)
        prepared.append((called, cfg, targets, adapters, Lineage(**stored.lineage)))
    if strict_base:
        warn_other_rest(model, path, file, dict(paths or {}))
    handles: dict[str, Attached] = {}
    with quiet(unwrapped(model)):
        for called, cfg, targets, adapters, lineage in prepared:
            skipped = {place: "not in the file" for place in linears(unwrapped(model)) if place not in adapters}
            for adapter in adapters.values():
                adapter.requires_grad_(trainable)
            install(model, targets, adapters, called, cfg, lineage, skipped)
            handles[called] = Attached(model, called, cfg, adapters, skipped)
    return next(iter(handles.values())) if len(handles) == 1 else AttachedSet(handles)


def renamed(path: str | Path, file: Contents, name: str | None, names: dict[str, str]) -> dict[str, Stored]:
    """{name on the model: adapter of the file} of those that are asked for."""
    for asked in [*names, *([name] if name is not None and len(file.adapters) > 1 else [])]:
        if asked not in file.adapters:
            raise LoraLiteError(
                f"{path} has no adapter {asked!r}.", found=closest(str(asked), file.adapters), fix="ll.load(model, path)"
            )
    if name is not None and len(file.adapters) > 1:
        return {names.get(name, name): file.adapters[name]}
    found = {names.get(old, name if name is not None else old): stored for old, stored in file.adapters.items()}
    if len(found) < len(file.adapters):
        raise LoraLiteError(
            f"names={names} gives two adapters one name.", expected="A name for each.", fix="ll.load(model, path)"
        )
    return found


def renamed_path(place: str, paths: dict[str, str]) -> str:
    """The path with the longest start that `paths` knows exchanged."""
    known = [old for old in paths if place == old or place.startswith(f"{old}.") or old == ""]
    if not known:
        return place
    old = max(known, key=len)
    rest = place.removeprefix(old).lstrip(".")
    return f"{paths[old]}.{rest}".strip(".")


def renamed_key(key: str, moved: dict[str, str]) -> str:
    place, _, tensor = key.rpartition(".")
    return f"{moved.get(place, place)}.{tensor}" if place or not moved else f"{moved.get('', '')}.{tensor}".lstrip(".")


def refuse_unused_paths(path: str | Path, paths: dict[str, str], places: Iterable[str]) -> None:
    if unused := [old for old in paths if not any(renamed_path(place, {old: ""}) != place or not old for place in places)]:
        starts = dict.fromkeys(place.partition(".")[0] for place in places)
        raise LoraLiteError(
            f"paths={paths}: no layer in {path} begins with {some(unused)}.",
            found=f"They begin with {some(starts)}.",
            fix=f"paths={{{next(iter(starts))!r}: {paths[unused[0]]!r}}}",
        )


def warn_other_rest(model: nn.Module, path: str | Path, file: Contents, paths: dict[str, str]) -> None:
    """Names of the model are put back to those of the file before they are compared."""
    back = {new: old for old, new in paths.items()}
    here = {renamed_path(name, back).lstrip("."): said for name, said in samples(unwrapped(model)).items()}
    if file.rest and combined(here, file.base) != file.rest:
        warnings.warn(
            f"{path}: weights of the base model outside the adapted layers (embeddings, norms, others) differ "
            "from those of the training. Load the base that the adapter was trained on, or go on if that is meant.",
            LoraLiteWarning,
            stacklevel=3,
        )
