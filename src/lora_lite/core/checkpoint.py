"""Checkpoints: one safetensors file with a JSON header, written atomically, read strictly, never pickled.

Tensors are called `<layer path>.<tensor name>`. The header holds format and version, variant, config, adapter name, layer
paths, a fingerprint of every base weight, and the versions of the libraries that wrote it. A tensor that all layers share is
called `*.<tensor name>`; where the variant leaves it out, the header has the hash of what load has to draw from the seed.
"""

import contextlib
import json
import os
import tempfile
from pathlib import Path

import safetensors
from torch import Tensor

from ..errors import LoraLiteError, some

FORMAT = "lora_lite"
HEADER = ("version", "variant", "config", "name", "layers", "base", "versions")
VERSION = 3


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
