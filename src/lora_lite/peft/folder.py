"""A folder as PEFT lays it out on disk: read whole or refused, written whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..contract.strict import is_name, parsed, printable, refuse_boundless, shown
from ..core.checkpoint import checksum, serialized
from ..core.reading import content_of, tensors_of
from ..core.writing import named_errors, new_folder, write_atomically
from ..errors import LoraLiteError, some
from ..mathematics.maps import is_finite
from .selecting import readable

CONFIG, TENSORS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model."
CHECKSUM = "lora_lite_checksum"  # in the metadata of what this library wrote; PEFT passes over it


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(options, tensors) of a PEFT folder. Raises LoraLiteError for one that is missing, half-written or not PEFT's."""
    fix = "peft_model.save_pretrained(folder)"
    if not os.path.isdir(folder):
        raise LoraLiteError(f"{folder} is no folder.", expected="A local folder that PEFT wrote.", fix=fix)
    with named_errors(folder, "A folder that can be read.", "read"):
        here = f"It holds {some(sorted(map(printable, os.listdir(folder)))) or 'nothing'}."
    for file in (CONFIG, TENSORS):
        if not os.path.isfile(folder / file):
            pickled = file == TENSORS and os.path.isfile(folder / "adapter_model.bin")
            why = "adapter_model.bin is a pickle, which is not read." if pickled else ""
            raise LoraLiteError(f"{folder} has no {file}.", expected=why, found=here, fix=fix)
    try:
        options = parsed(content_of(folder / CONFIG), CONFIG)
        metadata, tensors = tensors_of(content_of(folder / TENSORS))
    except (OSError, ValueError) as error:
        raise LoraLiteError(f"{folder} cannot be read: {error}", expected="A folder written to its end.", fix=fix) from error
    if not isinstance(options, dict) or not is_name(options.get("peft_type")):
        raise LoraLiteError(f"{folder / CONFIG} has no peft_type.", expected="The config of a PEFT adapter.", fix=fix)
    refuse_boundless(options, str(folder / CONFIG))
    for option, value in options.items():
        if not is_name(option) or not readable(option, value):
            raise LoraLiteError(f"{folder / CONFIG}: {shown(option)[1:-1]}={shown(value)} cannot be read.", fix=fix)
    if metadata.get(CHECKSUM, whole := checksum(tensors)) != whole:
        raise LoraLiteError(f"{folder / TENSORS} is damaged: its tensors are not those that were written.", fix=fix)
    return options, tensors


def refuse_folder(folder: Path) -> None:
    with named_errors(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise LoraLiteError(f"{folder} exists.", expected="Nothing is written over.", fix=f'shutil.rmtree("{folder}")')
        if not folder.absolute().parent.is_dir():
            raise LoraLiteError(
                f"{folder}: the folder around it does not exist.", fix=f'Path("{folder.parent}").mkdir(parents=True)'
            )


def write_folder(folder: Path, options: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    content = {
        k: (t.detach().float() if t.dtype == torch.float64 else t.detach()).cpu().contiguous() for k, t in tensors.items()
    }
    if bad := [key for key, tensor in content.items() if not is_finite(tensor)]:
        raise LoraLiteError(f"{some(bad)} is not finite.", expected="Finite numbers.", fix="ll.status(model)")
    with new_folder(folder) as place:
        write_atomically(place / TENSORS, serialized(content, {"format": "pt", CHECKSUM: checksum(content)}))
        write_atomically(place / CONFIG, (json.dumps(options, indent=2, sort_keys=True) + "\n").encode())
