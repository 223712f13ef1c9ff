"""Records of a benchmark: where it ran, and how the JSON and the picture are written."""

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

import lora_lite as ll
from benchmarks.common import team
from lora_lite.core.checkpoint import write_atomically


def environment() -> dict[str, Any]:
    """Where a record was made; no names of machines."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "lora_lite": ll.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "threads": torch.get_num_threads(),
        "system": sys.platform,
        **({"processes": team.size()} if team.size() > 1 else {}),
    }


def write_json(path: Path, record: dict[str, Any]) -> None:
    """The record, whole or not at all."""
    write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())


def write_pair(out: Path, name: str, record: dict[str, Any], picture: bytes) -> str:
    """Write NAME.png and NAME.json into `out`, the record last; their paths, as they are shown to the user."""
    write_atomically(out / f"{name}.png", picture)
    write_json(out / f"{name}.json", record)
    return " and ".join(os.path.relpath(out / f"{name}.{kind}") for kind in ("json", "png"))
