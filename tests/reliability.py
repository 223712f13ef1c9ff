"""The record of what files and kills were tried: python -m tests.reliability [files=20000] [kills=300] [seed=0] [out=PATH].

files  mutants of real files that every reader is given      kills  of each of save, export_peft and merge to a folder
out    benchmarks/results/reliability.json, whose other parts stay as they are
"""

import base64
import json
import platform
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import torch

from lora_lite.core.writing import write_atomically
from tests import ROOT
from tests.oracles import killing, mutants

RECORD = ROOT / "benchmarks" / "results" / "reliability.json"
CORPUS = ROOT / "tests" / "core" / "corpus" / "cases.json"


def cases() -> list[dict[str, Any]]:
    return json.loads(CORPUS.read_text())


def sample_of(case: dict[str, Any]) -> mutants.Sample:
    model = mutants.small_one if case["sample"].startswith("old version") else mutants.toy.toy
    parts = {name: zlib.decompress(base64.b64decode(text)) for name, text in case["parts"].items()}
    return mutants.Sample(case["sample"], parts, model, case["variant"])


def keep(sample: mutants.Sample, outcome: mutants.Outcome) -> None:
    """Add a case to the corpus, once for each thing that was told."""
    told = outcome.told.replace(str(ROOT), "")[:160]
    known = cases()
    if all(case["told"] != told for case in known):
        parts = {name: base64.b64encode(zlib.compress(content, 9)).decode() for name, content in sample.parts.items()}
        known.append({"sample": sample.name, "variant": sample.variant, "told": told, "parts": parts})
        write_atomically(CORPUS, (json.dumps(known, indent=1) + "\n").encode())


def inside(work: Callable[[Path], Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return work(Path(folder))


def killed(job: str, count: int, seed: int, folder: Path) -> dict[str, int]:
    (folder / job).mkdir()
    return killing.kill(job, count, folder / job, seed)


def main(files: int = 20_000, kills: int = 300, seed: int = 0, out: Path = RECORD) -> None:
    record = json.loads(out.read_text()) if out.exists() else {}
    record["environment"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
        "system": platform.system(),
    }
    record["files"] = {"seed": seed, **inside(lambda place: mutants.run(files, seed, place, keep))}
    record["kills"] = {job: inside(lambda place, job=job: killed(job, kills, seed, place)) for job in killing.JOBS}
    record["crowd"] = inside(lambda place: killing.crowd(place, 4, 100))
    write_atomically(out, (json.dumps(record, indent=1) + "\n").encode())
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    told = dict(word.split("=", 1) for word in sys.argv[1:])
    numbers = {name: int(told[name]) for name in ("files", "kills", "seed") if name in told}
    main(**numbers, **({"out": Path(told["out"])} if "out" in told else {}))
