"""save: the adapters of a model to one file, all of it or nothing."""

import dataclasses
import json
import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from ..contract import shared
from ..contract.adapter import Adapter
from ..contract.strict import NAME, is_name, shown
from ..errors import LoraLiteError, LoraLiteWarning, some
from ..mathematics.maps import is_finite
from ..sites.model import unwrapped
from ..sites.sharded import is_sharded, on_first_process, refuse_fsdp1, whole
from . import finding
from .checkpoint import FORMAT, VERSION, checksum, serialized
from .fingerprint import digest, fingerprint
from .install import place_of
from .reading import MOST_KEY
from .restore import MOST_DRAWN
from .untouched import combined, warn_left_out
from .writing import write_atomically


def save(model: nn.Module, path: str | Path, *, name: str | None = None) -> None:
    """Write adapter `name`, or all of them, to one safetensors file; all of it or nothing appears at `path`.

    On a model that is sharded over processes every process calls this: tensors are gathered one at a time, rank 0 writes, and
    all return when the file is there.
    Raises LoraLiteError while an adapter is merged, for numbers that are not finite, where hooks were removed or a layer
    replaced by somebody else. Warns of layers that never ran although the model did, and of what was trained or moved beside
    the adapters: no file of ours holds it.
    """
    model = unwrapped(model)
    refuse_fsdp1(model, "ll.save(model, path)")
    found = finding.present(model, name)
    finding.refuse_other_root(found)
    if merged := [f for f in found if f.adapter.original is not None]:
        raise LoraLiteError(
            f"Adapter {merged[0].name!r} is merged: the base weights are not those it belongs to.",
            fix="ll.unmerge(model); ll.save(model, path)",
        )
    finding.refuse_lost(found)
    if dead := [f.path for f in finding.dead(found)]:
        warnings.warn(
            f"{some(dead)} never ran, so their adapters are at their start. Leave them out: exclude=({dead[0]!r},)",
            LoraLiteWarning,
            stacklevel=2,
        )
    base = found[0].adapter.group.base
    warn_left_out(model, base, f"{path}")
    by_name: dict[str, list[finding.Found]] = {}
    for f in found:
        by_name.setdefault(f.name, []).append(f)
    tensors: dict[str, Tensor] = {}
    adapters: dict[str, Any] = {}
    for own, places in by_name.items():
        stored, entry = content(places)
        tensors |= {f"{own}/{key}": tensor for key, tensor in stored.items()}
        adapters[own] = entry
    refuse_non_finite(path, tensors)
    refuse_unreadable(tensors, adapters)
    layers = {f.path: f.layer for f in found}
    header = {
        "format": FORMAT,
        "version": str(VERSION),
        "adapters": json.dumps(adapters),
        "base": json.dumps({place: fingerprint(layer) for place, layer in layers.items()}),
        "rest": combined(base.samples, layers),
        "versions": json.dumps({"torch": torch.__version__, "safetensors": safetensors.__version__}),
        "checksum": checksum(tensors),
    }
    written = serialized(tensors, header)
    if any(is_sharded(f.layer) for f in found):
        on_first_process(lambda: write_atomically(Path(path), written))
    else:
        write_atomically(Path(path), written)


def content(found: list[finding.Found]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """({"<layer path>.<name>": tensor}, entry of the header) of one adapter."""
    stored, drawn = shared_content({f.path: f.adapter for f in found})
    own = {f"{f.path}.{key}": tensor for f in found for key, tensor in f.adapter.state_dict().items()}
    tensors = {key: whole(tensor.detach()).contiguous().cpu() for key, tensor in {**stored, **own}.items()}
    group = found[0].adapter.group
    return tensors, {
        "variant": found[0].adapter.variant,
        "config": json.loads(group.cfg.to_json()),
        "layers": {f.path: place_of(f.adapter, f.layer) for f in found},
        "groups": {},
        "lineage": dataclasses.asdict(group.lineage),
        "drawn": drawn,
    }


def refuse_non_finite(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Raise before a good file is written over by one that load would refuse."""
    if broken := [key for key, tensor in tensors.items() if not is_finite(tensor)]:
        raise LoraLiteError(
            f"{some(broken)} is not finite.",
            expected=f"Finite numbers. {path} was not touched.",
            found="The training diverged.",
            fix="handle.restore(path)  # the numbers that were saved last; then a smaller lr",
        )


def refuse_unreadable(tensors: Iterable[str], adapters: Iterable[str]) -> None:
    """Raise for names that load refuses, whoever wrote them: they would be printed."""
    for name, most in (*((name, NAME) for name in adapters), *((key, MOST_KEY) for key in tensors)):
        if not is_name(name, most):
            raise LoraLiteError(
                f"{shown(name)} is no name that a file may hold.",
                expected=f"At most {most} letters, all of which are printed.",
                fix='ll.attach(model, cfg, name="style")  # and the same of the modules of the model',
            )


def shared_content(adapters: dict[str, Adapter]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors to store under `*.name`, {name: hash of the float32 draw} of those that load can draw again).

    Stored is one tensor that gives every layer its numbers; also where the variant leaves it out and it is not the draw any
    more, because the model was cast to fewer bits and back. Raises LoraLiteError where there is no such tensor.
    """
    stored, drawn = {}, {}
    seed = next(iter(adapters.values())).cfg.seed
    for name, (spec, shape) in shared.declared(adapters).items():
        used = shared.held(adapters, name)
        if (
            not spec.saved
            and math.prod(shape) <= MOST_DRAWN
            and shared.agrees(draw := shared.draw(name, spec, shape, seed), used)
        ):
            drawn[name] = digest(draw.float())
        elif shared.agrees(used[0], used):
            stored[f"*.{name}"] = used[0]
        elif shared.agrees(draw := shared.draw(name, spec, shape, seed), used):  # of float16 and bfloat16 none is the wider
            stored[f"*.{name}"] = draw
        else:
            group = next(iter(adapters.values())).group.name
            raise LoraLiteError(
                f"{name} of adapter {group!r} differs between layers that share it.",
                expected="One tensor for all: a part of the model was cast to fewer bits and back, or written to.",
                fix=f'state = {{f: t for f, t in model.state_dict().items() if ".{group}." in f}}  # keeps the tensors',
            )
    return stored, drawn
