"""Checkpoints: one safetensors file with a JSON header, written atomically, read strictly, never pickled.

Tensors are called `<layer path>.<tensor name>`. The header holds format and version, variant, config, adapter name, layer
paths, a fingerprint of every base weight, and the versions of the libraries that wrote it. A tensor that all layers share is
called `*.<tensor name>`; where the variant leaves it out, the header has the hash of what load has to draw from the seed.
"""

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any, cast

import safetensors
import torch
from torch import Tensor, nn

from . import registry, runtime, shared
from .adapter import Adapter, Lineage
from .attach import Attached, build_all, handle, install, refuse_name, refuse_unready
from .errors import LoraLiteError, LoraLiteWarning, some
from .linalg import is_finite
from .quantised import is_packed, parts
from .sharded import is_sharded, on_first_process, whole
from .targets import Layer, is_linear, sizes, unwrapped

FORMAT = "lora_lite"
HEADER = ("version", "variant", "config", "name", "layers", "base", "versions")
VERSION = 3
WHOLE_BELOW = 2**18  # numbers of a weight that are hashed entirely
RUNS, RUN = 2**9, 4  # of a larger one: evenly spaced runs of neighbours, since every place is a miss of the cache


def fingerprint(layer: Layer, version: int = VERSION) -> dict[str, Any]:
    """Shape, dtype and a hash of the stored weight: of all of it up to 2^18 numbers, of 2^9 evenly spaced runs of 4 above.

    A training step moves them all, and with up to 2^9 rows every row has one. Files of version 1 hold the hash of 2^14
    evenly spaced numbers, those of version 2 of up to 2^12.
    Of a packed weight the dense shape, the format in the place of the dtype, and a hash of every tensor it consists of.
    """
    if is_packed(layer):
        stored, tensors = parts(layer)
        hashes = "".join(digest(sampled(tensor, version)) for tensor in tensors)
        sha256 = hashlib.sha256(hashes.encode()).hexdigest()[:32]
        return {"shape": list(reversed(sizes(layer))), "dtype": stored, "sha256": sha256}
    weight = whole(layer.weight.detach())
    return {
        "shape": list(weight.shape),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "sha256": digest(sampled(weight, version)),
    }


def sampled(weight: Tensor, version: int) -> Tensor:
    """The numbers that are hashed."""
    flat = weight.reshape(-1)
    if flat.numel() <= WHOLE_BELOW:
        return flat
    if version == 1:
        return flat[torch.linspace(0, flat.numel() - 1, 2**14, dtype=torch.float64).long().to(flat.device)]
    if version == 2:
        return flat[:: -(-flat.numel() // 2**12)]
    every = flat.numel() // RUNS
    return flat.as_strided((RUNS, RUN), (every, 1))


def digest(tensor: Tensor) -> str:
    """Hash of the numbers as they are stored."""
    flat = tensor.detach().contiguous().cpu()
    return hashlib.sha256(ctypes.string_at(flat.data_ptr(), flat.nbytes)).hexdigest()[:32]


def save(model: nn.Module, path: str | Path, *, name: str | None = None) -> None:
    """Write adapter `name` (None: the only one) to one safetensors file; all of it or nothing appears at `path`.

    On a model that is sharded over processes every process calls this: tensors are gathered one at a time, rank 0 writes, and
    all return when the file is there.
    Raises LoraLiteError while the adapter is merged, where its hooks were removed or a layer replaced by somebody else. Warns
    of layers that never ran although others did.
    """
    model = unwrapped(model)
    name = runtime.the_name(model, name)
    found = runtime.adapters(model, name)
    runtime.refuse_other_root(found)
    if any(f.adapter.original is not None for f in found):
        raise LoraLiteError(
            f"Adapter {name!r} is merged: the base weights are not those it belongs to.",
            fix="ll.unmerge(model); ll.save(model, path)",
        )
    runtime.refuse_lost(found)
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


def serialized(tensors: dict[str, Tensor], header: dict[str, str]) -> bytes:
    """The file's content. safetensors.torch.save would do, but needs numpy, which is no dependency of ours or of torch."""
    specs = {
        key: safetensors.TensorSpec(
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=list(tensor.shape),
            data_ptr=tensor.data_ptr(),
            data_len=tensor.nbytes,
        )
        for key, tensor in tensors.items()
    }
    return bytes(safetensors.serialize(specs, metadata=header))


def write_atomically(path: Path, content: bytes) -> None:
    """Temporary file in the same folder, fsync, rename: `path` holds the old content or the new, never a part."""
    if path.is_dir():
        raise LoraLiteError(f"{path} is a folder.", expected="A file name.", fix=f'"{path / "adapter.safetensors"}"')
    if not path.parent.is_dir():
        raise LoraLiteError(f"{path}: the folder does not exist.", fix=f'Path("{path.parent}").mkdir(parents=True)')
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def read(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(header, tensors) of a checkpoint. Raises LoraLiteError for a file that is missing, cut short or not ours."""
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, safetensors.SafetensorError) as error:
        raise LoraLiteError(
            f"{path} cannot be read: {error}.",
            expected="A whole safetensors file that ll.save wrote.",
            fix="ll.save(model, path)",
        ) from error
    if header.get("format") != FORMAT:
        raise LoraLiteError(
            f"{path} is no lora_lite checkpoint.",
            found=f"Its header has {some(header) or 'no entries'}.",
            fix="ll.save(model, path)",
        )
    check_header(path, header)
    if int(header["version"]) > VERSION:
        raise LoraLiteError(
            f"{path} has format version {header['version']}.",
            expected=f"This lora_lite reads up to version {VERSION}.",
            fix="pip install --upgrade lora_lite",
        )
    return header, tensors


def check_header(path: str | Path, header: dict[str, str]) -> None:
    """Raise where an entry is missing, unreadable, or does not go with the others."""
    try:
        lacking = [field for field in HEADER if field not in header]
        if not lacking:
            int(header["version"])
            layers, base = json.loads(header["layers"]), json.loads(header["base"])
            for field in ("config", "versions", "drawn", "lineage"):
                if not isinstance(json.loads(header.get(field, "{}")), dict):
                    raise ValueError(f"{field} is no table")
            if json.loads(header.get("lineage", "{}")).keys() - {"id", "step"}:
                raise ValueError("lineage has more than id and step")
            lacking = [] if layers and set(layers) == set(base) else ["a fingerprint for each layer"]
    except ValueError as error:
        raise LoraLiteError(f"{path} has a damaged header: {error}.", fix="ll.save(model, path)") from error
    if lacking:
        raise LoraLiteError(
            f"{path} has an incomplete header.", expected=f"It lacks {some(lacking)}.", fix="ll.save(model, path)"
        )


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


def refuse_other_base(path: str | Path, targets: dict[str, Layer], saved: dict[str, Any], version: int) -> None:
    if different := changes_of_base(targets, saved, version):
        raise LoraLiteError(
            f"{path} was trained on another base.",
            expected="Base weights equal to those at save.",
            found=f"Different: {some(different)}.",
            fix="ll.load(model, path, strict_base=False)  # if the other base is meant",
        )


def changes_of_base(targets: dict[str, Layer], saved: dict[str, Any], version: int = VERSION) -> list[str]:
    """'path (what differs)' of every layer whose weight has another fingerprint than the saved one."""
    different = []
    for layer_path, layer in targets.items():
        here = fingerprint(layer, version)
        for field in ("shape", "dtype", "sha256"):
            if here[field] != saved[layer_path][field]:
                what = "content" if field == "sha256" else f"{field} {here[field]}, saved {saved[layer_path][field]}"
                different.append(f"{layer_path} ({what})")
                break
    return different


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
