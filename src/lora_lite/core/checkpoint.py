"""Checkpoints: one safetensors file with a JSON header, written atomically, read strictly, never pickled.

Format 4. Tensors are called `<adapter>/<layer path>.<tensor name>`; one that all layers share is `<adapter>/*.<tensor name>`.
The header holds

    format, version   "lora_lite", "4"                 versions   of the libraries that wrote it
    adapters          {name: {variant, config, layers: {path: {rank, experts, transposed}}, groups, lineage, drawn}}
    base              {path: fingerprint of the layer's weight and bias}
    rest              one hash of samples of the base model's other parameters
    checksum          of the tensors

rank is the layer's own, experts the number of a fused site's or null, transposed whether its weight is stored (d_in, d_out);
`options` beside them holds options of that layer that differ from the config's; groups: of shared tensors; drawn: {name: hash}
of shared tensors that load draws again from the seed. Patterns in a config tell how it was chosen and are never searched.

Formats 1 to 3 hold one adapter, tensors called `<layer path>.<tensor name>`, and patterns that are regular expressions.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from ..contract.pattern import REGULAR
from ..errors import LoraLiteError, some

FORMAT = "lora_lite"
HEADER = {
    4: ("version", "adapters", "base", "rest", "versions", "checksum"),
    3: ("version", "variant", "config", "name", "layers", "base", "versions"),
}
VERSION = 4
OF_ADAPTER = {"variant": str, "config": dict, "layers": dict, "groups": dict, "lineage": dict, "drawn": dict}


@dataclass(frozen=True)
class Stored:
    """One adapter of a file.

    config   JSON text; prefix stands before each of its patterns, which are of an older grammar
    layers   {path: its place}, or None where the file is older than places
    tensors  {"<layer path>.<name>": tensor}
    """

    variant: str
    config: str
    layers: dict[str, dict[str, Any] | None]
    tensors: dict[str, Tensor]
    lineage: dict[str, Any] = field(default_factory=dict)
    drawn: dict[str, str] = field(default_factory=dict)
    prefix: str = ""


@dataclass(frozen=True)
class Contents:
    """A file: adapters by name, fingerprints {path: fingerprint}, the hash of the rest of the base ("": none)."""

    version: int
    adapters: dict[str, Stored]
    base: dict[str, dict[str, Any]]
    rest: str
    versions: dict[str, str]


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Hash of names, shapes, dtypes and numbers of the tensors."""
    total = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].detach().contiguous().cpu()
        total.update(f"{key} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        total.update(memory(tensor))
    return total.hexdigest()[:32]


def memory(tensor: Tensor) -> bytes:
    """The numbers of a contiguous tensor as they are stored."""
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)


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
    return header, tensors


def contents(path: str | Path) -> Contents:
    """What a file holds, of any version. Raises LoraLiteError for a damaged or newer one."""
    header, tensors = read(path)
    try:
        version = int(header.get("version", ""))
    except ValueError as error:
        raise damaged(path, f"version is {header.get('version')!r}") from error
    if version > VERSION:
        raise LoraLiteError(
            f"{path} has format version {version}.",
            expected=f"This lora_lite reads up to version {VERSION}.",
            fix="pip install --upgrade lora_lite",
        )
    if lacking := [entry for entry in HEADER[4 if version > 3 else 3] if entry not in header]:
        raise LoraLiteError(
            f"{path} has an incomplete header.", expected=f"It lacks {some(lacking)}.", fix="ll.save(model, path)"
        )
    try:
        return (format4 if version > 3 else earlier)(path, version, header, tensors)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise error if isinstance(error, LoraLiteError) else damaged(path, str(error)) from error


def damaged(path: str | Path, why: str) -> LoraLiteError:
    return LoraLiteError(f"{path} has a damaged header: {why}.", fix="ll.save(model, path)")


def format4(path: str | Path, version: int, header: dict[str, str], tensors: dict[str, Tensor]) -> Contents:
    found = table(header["adapters"], "adapters")
    base, versions = table(header["base"], "base"), table(header["versions"], "versions")
    if checksum(tensors) != header["checksum"]:
        raise LoraLiteError(
            f"{path} is damaged: its tensors are not those that were written.",
            expected="Tensors with the checksum in the header.",
            fix="ll.save(model, path)",
        )
    if not found:
        raise ValueError("it holds no adapter")
    adapters = {}
    for name, one in found.items():
        for entry, kind in OF_ADAPTER.items():
            if not isinstance(one, dict) or not isinstance(one.get(entry), kind):
                raise ValueError(f"{entry} of adapter {name!r} is no {kind.__name__}")
        if not one["layers"]:
            raise ValueError(f"adapter {name!r} has no layers")
        refuse_lineage(one["lineage"])
        for place, said in one["layers"].items():
            if place not in base or not isinstance(said, dict) or not isinstance(said.get("rank"), (int, type(None))):
                raise ValueError(f"{place} of adapter {name!r} has no fingerprint or no rank")
        own = {key.removeprefix(f"{name}/"): tensor for key, tensor in tensors.items() if key.startswith(f"{name}/")}
        config = json.dumps(one["config"])
        adapters[name] = Stored(one["variant"], config, one["layers"], own, one["lineage"], one["drawn"])
    if stray := [key for key in tensors if not key.startswith(tuple(f"{name}/" for name in adapters))]:
        raise LoraLiteError(
            f"{path} holds {some(stray)} of no adapter.", expected=f"Tensors of {some(adapters)}.", fix="ll.save(model, path)"
        )
    return Contents(version, adapters, base, header["rest"], versions)


def earlier(path: str | Path, version: int, header: dict[str, str], tensors: dict[str, Tensor]) -> Contents:
    layers, base = json.loads(header["layers"]), table(header["base"], "base")
    config, versions = table(header["config"], "config"), table(header["versions"], "versions")
    lineage, drawn = table(header.get("lineage", "{}"), "lineage"), table(header.get("drawn", "{}"), "drawn")
    refuse_lineage(lineage)
    if not layers or not isinstance(layers, list) or set(layers) != set(base):
        raise LoraLiteError(
            f"{path} has an incomplete header.", expected="It lacks a fingerprint for each layer.", fix="ll.save(model, path)"
        )
    places: dict[str, dict[str, Any] | None] = dict.fromkeys(layers)
    one = Stored(header["variant"], json.dumps(config), places, tensors, lineage, drawn, REGULAR)
    return Contents(version, {header["name"]: one}, base, "", versions)


def table(text: str, entry: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"{entry} is no table")
    return found


def refuse_lineage(lineage: dict[str, Any]) -> None:
    if lineage.keys() - {"id", "step"}:
        raise ValueError("lineage has more than id and step")
