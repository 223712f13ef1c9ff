"""save: one adapter to one file, all of it or nothing."""

import dataclasses
import json
import warnings
from pathlib import Path

import safetensors
import torch
from torch import Tensor, nn

from ..contract import shared
from ..contract.adapter import Adapter
from ..errors import LoraLiteError, LoraLiteWarning, some
from ..sites.model import unwrapped
from ..sites.sharded import is_sharded, on_first_process, whole
from . import finding
from .checkpoint import FORMAT, VERSION, serialized, write_atomically
from .fingerprint import digest, fingerprint


def save(model: nn.Module, path: str | Path, *, name: str | None = None) -> None:
    """Write adapter `name` (None: the only one) to one safetensors file; all of it or nothing appears at `path`.

    On a model that is sharded over processes every process calls this: tensors are gathered one at a time, rank 0 writes, and
    all return when the file is there.
    Raises LoraLiteError while the adapter is merged, where its hooks were removed or a layer replaced by somebody else. Warns
    of layers that never ran although others did.
    """
    model = unwrapped(model)
    name = finding.the_name(model, name)
    found = finding.adapters(model, name)
    finding.refuse_other_root(found)
    if any(f.adapter.original is not None for f in found):
        raise LoraLiteError(
            f"Adapter {name!r} is merged: the base weights are not those it belongs to.",
            fix="ll.unmerge(model); ll.save(model, path)",
        )
    finding.refuse_lost(found)
    if dead := [f.path for f in found if not f.adapter.fired and any(g.adapter.fired for g in found)]:
        warnings.warn(
            f"{some(dead)} never ran, so their adapters are at their start. Leave them out: exclude=({dead[0]!r},)",
            LoraLiteWarning,
            stacklevel=2,
        )
    stored, drawn = shared_content({f.path: f.adapter for f in found})
    own = {f"{f.path}.{key}": tensor for f in found for key, tensor in f.adapter.state_dict().items()}
    tensors = {key: whole(tensor.detach()).contiguous().cpu() for key, tensor in {**stored, **own}.items()}
    header = {
        "format": FORMAT,
        "version": str(VERSION),
        "variant": found[0].adapter.variant,
        "config": found[0].adapter.group.cfg.to_json(),
        "name": name,
        "layers": json.dumps([f.path for f in found]),
        "base": json.dumps({f.path: fingerprint(f.layer) for f in found}),
        "versions": json.dumps({"torch": torch.__version__, "safetensors": safetensors.__version__}),
        "lineage": json.dumps(dataclasses.asdict(found[0].adapter.group.lineage)),
        **({"drawn": json.dumps(drawn)} if drawn else {}),
    }
    content = serialized(tensors, header)
    if any(is_sharded(f.layer) for f in found):
        on_first_process(lambda: write_atomically(Path(path), content))
    else:
        write_atomically(Path(path), content)


def shared_content(adapters: dict[str, Adapter]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors to store under `*.name`, {name: hash of the float32 draw} of those that load can draw again).

    Stored is one tensor that gives every layer its numbers; also where the variant leaves it out and it is not the draw any
    more, because the model was cast to fewer bits and back. Raises LoraLiteError where there is no such tensor.
    """
    stored, drawn = {}, {}
    seed = next(iter(adapters.values())).cfg.seed
    for name, (spec, shape) in shared.declared(adapters).items():
        used = shared.held(adapters, name)
        if not spec.saved and shared.agrees(draw := shared.draw(name, spec, shape, seed), used):
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
