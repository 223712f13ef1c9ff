"""What attaching costs beside PEFT, and how that grows: the parts `attach`, `growth` and `large` of `just bench-cost`.

Every case runs in a process of its own, after the same on a small model: seconds are the median of its repeats, peak is the
most memory beyond what the model and its libraries took before, in the first of them. Energy is |U^T M|^2 of the start's r
directions U over the largest possible, M = W, or W C and W C^(1/2) for starts from data, the least of the first block's
layers. Growth: one option at a time.
"""

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lora_lite as ll
from benchmarks.cost.attach_case import CASES

BASE = {"d": 512, "rank": 16, "layers": 2, "tokens": 256}
GROWTH = {"d": (256, 512, 768, 1024), "rank": (4, 8, 16, 32), "layers": (1, 2, 4, 8), "tokens": (256, 512, 1024, 2048)}
GROWN = ("pissa", "corda")
LARGE = {"pissa_fast": 6, "corda": 16}  # blocks: those of a model outweigh the temporaries of the one layer that is worked on
FEW_TOKENS = 128  # of a batch, there: every group of layers takes a pass through the model


@dataclass(frozen=True, kw_only=True)
class Attach:
    """model: of `cases`, d and its width; seconds: that the repeats of one of them go on for."""

    cases: tuple[str, ...] = tuple(CASES)
    model: str = "d1024"
    rank: int = 16
    tokens: int = 512
    batches: int = 2
    repeats: int = 3
    seconds: float = 3.0
    threads: int = 2
    peer: str = "peft"


def child(specs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`measured` of each in one fresh process."""
    env = {**os.environ, "OMP_NUM_THREADS": str(specs[0]["threads"])}
    words = [sys.executable, "-m", "benchmarks.cost.attach_case", json.dumps(specs)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ll.LoraLiteError(f"{specs[0]['case']} of {specs[0]['subject']} failed.", found=done.stderr[-500:])
    return json.loads(done.stdout.splitlines()[-1])


def spec_of(settings: Attach, **fields: Any) -> dict[str, Any]:
    general = {name: getattr(settings, name) for name in ("threads", "batches", "repeats")}
    return {**general, "enough": 0.0, "shape": "", "energy": False, "subject": "ours", **fields}


def attach_rows(settings: Attach, done: Callable[[str], None] = lambda name: None) -> list[dict[str, Any]]:
    """One row per case: ours and PEFT's seconds, peak bytes and energy; cases with one peer share its figures."""
    rows, peers = [], {}
    sizes = {"d": int(settings.model[1:]), "layers": 2, "rank": settings.rank, "tokens": settings.tokens}
    sizes |= {"energy": True, "enough": settings.seconds}
    for name in settings.cases:
        row: dict[str, Any] = {"case": name, "model": settings.model, "r": settings.rank, "tokens": settings.tokens}
        row["ours"] = child([spec_of(settings, case=name, **sizes)])[0]
        done(name)
        peer = CASES[name]["peer"]
        if settings.peer == "peft":
            if peer not in peers:
                peers[peer] = child([spec_of(settings, case=name, subject="peft", **sizes)])[0]
            row["peft"] = peers[peer]
            done(f"{name}, PEFT")
        rows.append(row)
    return rows


def exponent(sizes: list[float], values: list[float]) -> float:
    """p of the least-squares fit value ~ size^p."""
    x, y = [math.log(size) for size in sizes], [math.log(max(value, 1e-9)) for value in values]
    mx, my = statistics.mean(x), statistics.mean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def growth_rows(settings: Attach, done: Callable[[str], None] = lambda name: None) -> list[dict[str, Any]]:
    """One row per case and option: seconds and peak bytes at four values each, and their fitted exponents."""
    rows = []
    for name in GROWN:
        for key, values in GROWTH.items():
            found = child([spec_of(settings, case=name, **{**BASE, key: value, "repeats": 2}) for value in values])
            done(f"{name} against {key}")
            row = {"case": name, "against": key, "at": list(values), "others": {k: v for k, v in BASE.items() if k != key}}
            for measure_ in ("seconds", "peak_bytes"):
                row[measure_] = [one[measure_] for one in found]
                row[f"{measure_}_exponent"] = exponent(list(values), row[measure_])
            rows.append(row)
    return rows


def large_rows(settings: Attach, done: Callable[[str], None] = lambda name: None) -> list[dict[str, Any]]:
    """One row per case: seconds, peak and model bytes on a stack of an 8B model's blocks, in bfloat16."""
    rows = []
    for name, blocks in LARGE.items():
        spec = spec_of(settings, case=name, d=4096, layers=blocks, rank=16, tokens=FEW_TOKENS, shape="8b", repeats=1)
        rows.append({"case": name, "blocks": blocks, "r": 16, "tokens": FEW_TOKENS, "ours": child([spec])[0]})
        done(f"{name}, 8B")
    return rows


def count(settings: Attach, part: str) -> int:
    """How often a part calls `done`."""
    if part == "attach":
        return len(settings.cases) * (2 if settings.peer == "peft" else 1)
    return len(GROWN) * len(GROWTH) if part == "growth" else len(LARGE)
