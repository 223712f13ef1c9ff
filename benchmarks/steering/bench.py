"""just steering [key=value ...]: a direction from labelled text is taken out of a real model; what that steers and harms.

Property: mark-up in backquotes. DUE places are those where one opens (a backquote behind a space, line break or bracket and in
front of a word), OTHERWISE those where a lower-case letter stands behind the same bytes. Labelled calibration on training prose
gives each layer the difference of its mean outputs at the byte before either kind; antipasto_ablate removes it at a = 1. The
paper it comes from shares one direction among all layers; here each writer has that of its own means.

Which blocks are ablated is chosen on validation prose: the largest drop of P(backquote) at DUE places at coeff 1 with a KL of
at most KL_LIMIT elsewhere. Held-out prose is only measured: P(backquote) before both kinds of places; KL and bits per byte on
evenly spaced windows, less the bytes at DUE places. Beside it: random directions, and those of the largest output variance.

Keys are fields of Steering (windows=64 seeds=0,1 coeffs=-1,0,1 ...). Writes steering.json and steering.png to out= (default
benchmarks/runs).
"""

import dataclasses
import math
import re
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import lora_lite as ll
from benchmarks.common import text
from benchmarks.common.options import command, folder
from benchmarks.common.places import BASE
from benchmarks.common.records import environment, write_pair
from benchmarks.embedded.run import Settings, fitting, load_base
from benchmarks.steering.passages import DUE, OTHERWISE, Passages, calibration_data, prose
from benchmarks.steering.report import plot, table
from benchmarks.steering.settings import CONTEXT, Steering

BYTE = ord("`")
MEANING = "mark-up in backquotes"
KL_LIMIT = 0.1
VARIANT = "antipasto_ablate"
Row = dict[str, float]


@dataclass(frozen=True)
class Predictions:
    """log2 of P(backquote) after the rows of each kind, and of all next-byte probabilities in the windows."""

    due: Tensor
    otherwise: Tensor
    windows: Tensor


def logarithms(model: nn.Module, rows: Tensor, kept: slice) -> Tensor:
    parts = [model(input_ids=part).logits[:, kept].float().log_softmax(-1) for part in rows.split(32)]
    return torch.cat(parts) / math.log(2)


@torch.no_grad()
def predictions(model: nn.Module, passages: Passages) -> Predictions:
    due, otherwise = (logarithms(model, rows, slice(-1, None))[:, 0, BYTE] for rows in (passages.due, passages.otherwise))
    return Predictions(due, otherwise, logarithms(model, passages.windows[:, :-1], slice(CONTEXT - 1, None)))


def score(got: Predictions, base: Predictions, passages: Passages) -> Row:
    """Means in bits; due_change_error: standard error of the mean change at the due places."""
    taken = got.windows.gather(-1, passages.windows[:, CONTEXT:, None])[..., 0]
    kl = (base.windows.exp2() * (base.windows - got.windows)).sum(-1)
    return {
        "due": got.due.mean().item(),
        "due_change_error": ((got.due - base.due).std() / len(got.due) ** 0.5).item(),
        "otherwise": got.otherwise.mean().item(),
        "kl": kl[passages.counted].mean().item(),
        "bits_per_byte": -taken[passages.counted].mean().item(),
    }


def config(**fields: Any) -> Any:
    return ll.config(VARIANT, init_alpha=1.0, **fields)


def choose_blocks(model: nn.Module, data: Any, passages: Passages) -> tuple[tuple[int, ...], list[dict[str, float]]]:
    """(block numbers, what each candidate did): from which block on the ablation acts, on validation text alone."""
    handle = ll.attach(model, fitting(model, config(seed_direction="contrast")), data)
    block = {path: int(re.search(r"\d+", path)[0]) for path in handle.layers}  # type: ignore[index]
    with ll.disabled(model):
        base = predictions(model, passages)
    tried = []
    for first in sorted(set(block.values())):
        for path, adapter in handle.layers.items():
            adapter.coeff = float(block[path] >= first)
        found = score(predictions(model, passages), base, passages)
        tried.append({"first_block": first, "due": found["due"], "kl": found["kl"]})
    handle.detach()
    allowed = [t for t in tried if t["kl"] <= KL_LIMIT] or [min(tried, key=lambda t: t["kl"])]
    best = min(allowed, key=lambda t: t["due"])["first_block"]
    return tuple(n for n in sorted(set(block.values())) if n >= best), tried


def curve(model: nn.Module, coeffs: Iterable[float], base: Predictions, passages: Passages) -> Iterator[Row]:
    """A row of scores per coefficient; outside [0, 1] too, which the variant warns of."""
    for coeff in coeffs:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "coeff outside", ll.LoraLiteWarning)
            scaled = ll.scale(model, coeff)
        with scaled:
            yield {"coeff": coeff, **score(predictions(model, passages), base, passages)}


def experiment(settings: Steering, progress: Progress) -> dict[str, Any]:
    started = time.perf_counter()
    model, _ = load_base(Settings(device="cpu", model=str(BASE)))
    training, validation, test = (prose()[part] for part in ("train", "validation", "test"))
    data = calibration_data(training, settings)
    passages = Passages.of(test, settings)
    step = progress.add_task("choosing blocks", total=None)
    blocks, tried = choose_blocks(model, data, Passages.of(validation, settings))
    base = predictions(model, passages)
    kinds = [("contrast", 0, data), ("variance", 0, data), *(("random", seed, None) for seed in settings.seeds)]
    progress.update(step, description="measuring", total=len(kinds) * len(settings.coeffs))
    curves: dict[str, list[dict[str, Any]]] = {}
    for kind, seed, given in kinds:
        handle = ll.attach(model, fitting(model, config(seed_direction=kind, seed=seed, layers=blocks)), given)
        rows = []
        for row in curve(model, settings.coeffs, base, passages):
            rows.append(row)
            progress.advance(step)
        curves.setdefault(kind, []).append({"seed": seed, "layers": sorted(handle.layers), "rows": rows})
        handle.detach()
    return {
        "example": "steering",
        "variant": VARIANT,
        "rule": {
            "due": DUE.decode(),
            "otherwise": OTHERWISE.decode(),
            "byte": chr(BYTE),
            "meaning": MEANING,
        },
        "settings": {k: v for k, v in dataclasses.asdict(settings).items() if k != "out"} | {"context": CONTEXT},
        "model": "benchmarks/base",
        "data": {
            "calibration": {
                "bytes": len(training),
                "sha256": text.digest(training),
                **{f"rows_{label}": sum(len(b["input_ids"]) for b in batches) for label, batches in data.items()},
            },
            "validation": {"bytes": len(validation), "sha256": text.digest(validation)},
            "held_out": passages.source,
        },
        "environment": environment(),
        "kl_limit": KL_LIMIT,
        "blocks": list(blocks),
        "candidates": tried,
        "base": score(base, base, passages),
        "curves": curves,
        "wall_seconds": round(time.perf_counter() - started, 1),
    }


def steer(words: list[str], console: Console) -> dict[str, Any]:
    """Measure, show and write. Raises LoraLiteError for wrong options."""
    settings = Steering.parse(words, "just steering windows=64 seeds=0,1")
    out = folder(settings.out)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        record = experiment(settings, progress)
    written = write_pair(out, "steering", record, plot(record))
    console.print(table(record))
    console.print(f"{record['wall_seconds']:.0f} s; wrote {written}", soft_wrap=True)
    return record


def main(words: list[str]) -> None:
    command(words, __doc__, steer, "no record was written")
