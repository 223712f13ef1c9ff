"""Checkpoints: one safetensors file with a JSON header, written atomically, read strictly, never pickled.

Format 4. Tensors are called `<adapter>/<layer path>.<tensor name>`; one that all layers share is `<adapter>/*.<tensor name>`.
The header holds

    format, version   "lora_lite", "4"                 versions   of the libraries that wrote it
    adapters          {name: {variant, config, layers: {path: {rank, experts, transposed}}, groups, lineage, drawn}}
    base              {path: fingerprint of the layer's weight and bias}
    rest              one hash of samples of the base model's other parameters
    checksum          of the tensors
    seal              of all other entries

rank is the layer's own, experts the number of a fused site's or null, transposed whether its weight is stored (d_in, d_out);
`options` beside them holds options of that layer that differ from the config's; groups: of shared tensors; drawn: {name: hash}
of shared tensors that load draws again from the seed. Patterns in a config tell how it was chosen and are never searched.

Formats 1 to 3 hold one adapter, tensors called `<layer path>.<tensor name>`, and patterns that are regular expressions.
"""

import ctypes
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..contract.pattern import REGULAR
from ..contract.strict import is_name, parsed, shown
from ..errors import LoraLiteError, some
from .entries import Stored, adapter_of, base_of, refuse_no_name, stored, table, versions_of
from .reading import DTYPES, METADATA, content_of, tensors_of
from .writing import write_atomically as write_atomically

FORMAT = "lora_lite"
HEADER = {
    4: ("version", "adapters", "base", "rest", "versions", "checksum"),
    3: ("version", "variant", "config", "name", "layers", "base", "versions"),
}
VERSION = 4


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


def seal(header: Mapping[str, str]) -> str:
    """Hash of a header's entries but itself: damage to a config can leave a lawful config."""
    told = json.dumps({entry: text for entry, text in header.items() if entry != "seal"}, sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:32]


def serialized(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bytes:
    """The file's content, the same bytes for the same content. safetensors.torch.save needs numpy, and shuffles entries."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    if odd := [f"{key} ({tensor.dtype})" for key, tensor in tensors.items() if tensor.dtype not in names]:
        raise LoraLiteError(f"{some(odd)} has no place in a file.", expected=f"One of {some(map(str, names), 10)}.")
    metadata = {**header, "seal": seal(header)} if "checksum" in header else header
    described: dict[str, Any] = {METADATA: dict(sorted(metadata.items()))}
    order, end = sorted(tensors, key=lambda key: (-tensors[key].itemsize, key)), 0  # the widest first: all are aligned
    for key in order:
        tensor, start = tensors[key], end
        end += tensor.nbytes
        described[key] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, *(memory(tensors[key].contiguous()) for key in order)))


def read(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(header, tensors) of a checkpoint. Raises LoraLiteError for a file that is missing, cut short, damaged or not ours."""
    try:
        header, tensors = tensors_of(content_of(path))
    except (OSError, ValueError) as error:
        raise LoraLiteError(
            f"{path} cannot be read: {error}.",
            expected="A whole safetensors file that ll.save wrote.",
            fix="ll.save(model, path)",
        ) from error
    if header.get("format") != FORMAT:
        raise LoraLiteError(
            f"{path} is no lora_lite checkpoint.",
            found=f"Its header has {some(map(shown, header)) or 'no entries'}.",
            fix="ll.save(model, path)",
        )
    return header, tensors


def contents(path: str | Path) -> Contents:
    """What a file holds, of any version. Raises LoraLiteError for a damaged or newer one."""
    header, tensors = read(path)
    told = header.get("version", "")
    if not re.fullmatch("[0-9]{1,9}", told) or int(told) < 1:
        raise damaged(path, f"version is {shown(told)}")
    if (version := int(told)) > VERSION:
        raise LoraLiteError(
            f"{path} has format version {version}.",
            expected=f"This lora_lite reads up to version {VERSION}.",
            fix="pip install --upgrade lora_lite",
        )
    if lacking := [entry for entry in HEADER[4 if version > 3 else 3] if entry not in header]:
        raise LoraLiteError(
            f"{path} has an incomplete header.", expected=f"It lacks {some(lacking)}.", fix="ll.save(model, path)"
        )
    if header.get("seal", seal(header)) != seal(header):
        raise LoraLiteError(
            f"{path} is damaged: its header is not the one that was written.",
            expected="A header with the seal in it.",
            fix="ll.save(model, path)",
        )
    try:
        return (format4 if version > 3 else earlier)(path, version, header, tensors)
    except ValueError as error:
        named = isinstance(error, LoraLiteError) and str(error).startswith(str(path))
        raise error if named else damaged(path, str(error).rstrip(".")) from error


def damaged(path: str | Path, why: str) -> LoraLiteError:
    return LoraLiteError(f"{path} has a damaged header: {why}.", fix="ll.save(model, path)")


def format4(path: str | Path, version: int, header: dict[str, str], tensors: dict[str, Tensor]) -> Contents:
    found = table(header, "adapters")
    base, versions = base_of(table(header, "base"), version), versions_of(table(header, "versions"))
    if checksum(tensors) != header["checksum"]:
        raise LoraLiteError(
            f"{path} is damaged: its tensors are not those that were written.",
            expected="Tensors with the checksum in the header.",
            fix="ll.save(model, path)",
        )
    if not found:
        raise ValueError("it holds no adapter")
    adapters = {name: adapter_of(name, one, base) for name, one in found.items()}
    owners = {f"{name}/{place}": name for name, one in adapters.items() for place in (*one.layers, "*")}
    if stray := [key for key in tensors if key.rpartition(".")[0] not in owners]:
        raise LoraLiteError(
            f"{path} holds {some(stray)} of no adapter.", expected=f"Tensors of {some(adapters)}.", fix="ll.save(model, path)"
        )
    for key, tensor in tensors.items():
        name = owners[key.rpartition(".")[0]]
        adapters[name].tensors[key.removeprefix(f"{name}/")] = tensor
    return Contents(version, adapters, base, header["rest"], versions)


def earlier(path: str | Path, version: int, header: dict[str, str], tensors: dict[str, Tensor]) -> Contents:
    base, versions = base_of(table(header, "base"), version), versions_of(table(header, "versions"))
    layers = parsed(header["layers"], "layers")
    lineage, drawn = (table(header, entry) if entry in header else {} for entry in ("lineage", "drawn"))
    if not layers or not isinstance(layers, list) or not all(map(is_name, layers)) or set(layers) != set(base):
        raise LoraLiteError(
            f"{path} has an incomplete header.", expected="It lacks a fingerprint for each layer.", fix="ll.save(model, path)"
        )
    refuse_no_name(header["name"], "name")
    places: dict[str, dict[str, Any] | None] = dict.fromkeys(layers)
    one = stored(header["variant"], table(header, "config"), places, tensors, lineage, drawn, "", REGULAR)
    return Contents(version, {header["name"]: one}, base, "", versions)
