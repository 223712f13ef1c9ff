"""A folder as PEFT lays it out on disk: read whole or refused, written whole or not at all."""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from ..core.checkpoint import serialized, write_atomically
from ..errors import LoraLiteError, some
from ..mathematics.maps import is_finite

CONFIG, TENSORS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model."


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(options, tensors) of a PEFT folder. Raises LoraLiteError for one that is missing, half-written or not PEFT's."""
    fix = "peft_model.save_pretrained(folder)"
    if not folder.is_dir():
        raise LoraLiteError(f"{folder} is no folder.", expected="A local folder that PEFT wrote.", fix=fix)
    here = f"It holds {some(sorted(p.name for p in folder.iterdir())) or 'nothing'}."
    for file in (CONFIG, TENSORS):
        if not (folder / file).is_file():
            pickled = file == TENSORS and (folder / "adapter_model.bin").is_file()
            why = "adapter_model.bin is a pickle, which is not read." if pickled else ""
            raise LoraLiteError(f"{folder} has no {file}.", expected=why, found=here, fix=fix)
    try:
        options = json.loads((folder / CONFIG).read_text())
        with safetensors.safe_open(str(folder / TENSORS), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise LoraLiteError(f"{folder} cannot be read: {error}.", expected="A folder written to its end.", fix=fix) from error
    if not isinstance(options, dict) or not isinstance(options.get("peft_type"), str):
        raise LoraLiteError(f"{folder / CONFIG} has no peft_type.", expected="The config of a PEFT adapter.", fix=fix)
    for option, value in options.items():
        if not readable(option, value):
            raise LoraLiteError(f"{folder / CONFIG}: {option}={value!r} cannot be read.", fix=fix)
    return options, tensors


def readable(option: str, value: Any) -> bool:
    """Whether an option that selects layers has the form that PEFT gives it; its regular expressions must compile."""
    if value is None or not option.endswith(("_modules", "_pattern", "_to_transform")):
        return True
    if option == "layers_to_transform":
        return isinstance(value, int) or (isinstance(value, list) and all(isinstance(k, int) for k in value))
    if option in ("rank_pattern", "alpha_pattern"):
        if not isinstance(value, dict) or not all(isinstance(v, (int, float)) for v in value.values()):
            return False
    try:
        return all(re.compile(part) for part in ([value] if isinstance(value, str) else value))
    except (TypeError, re.error):
        return False


def refuse_folder(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LoraLiteError(f"{folder} exists.", expected="Nothing is written over.", fix=f'shutil.rmtree("{folder}")')
    if not folder.absolute().parent.is_dir():
        raise LoraLiteError(
            f"{folder}: the folder around it does not exist.", fix=f'Path("{folder.parent}").mkdir(parents=True)'
        )


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, which takes its name where the block succeeds and is removed where it fails."""
    refuse_folder(folder)
    temporary = Path(tempfile.mkdtemp(dir=folder.absolute().parent, prefix=f".{folder.name}."))
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o777 & ~mask)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_folder(folder: Path, options: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    content = {
        k: (t.detach().float() if t.dtype == torch.float64 else t.detach()).cpu().contiguous() for k, t in tensors.items()
    }
    if bad := [key for key, tensor in content.items() if not is_finite(tensor)]:
        raise LoraLiteError(f"{some(bad)} is not finite.", expected="Finite numbers.", fix="ll.status(model)")
    with new_folder(folder) as place:
        write_atomically(place / TENSORS, serialized(content, {"format": "pt"}))
        write_atomically(place / CONFIG, (json.dumps(options, indent=2, sort_keys=True) + "\n").encode())
