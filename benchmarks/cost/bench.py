"""just bench-cost [key=value ...]: what every variant costs beside the bare frozen model and beside PEFT, in one run.

Parts: step, for each model and variant three copies of one model, the bare one, ours and PEFT's, take turns in one process on
the same inputs: forward without gradients, forward + backward, bytes kept for backward, peak memory. attach, starts from the
weights and from data; growth, how they grow; large, at an 8B model's sizes; start, import, attach, save and load.
Ranks of step: r=16 for low-rank methods, 8 where that is the config's default or the method asks for it.

Keys: parts=step,attach,growth,start variants=lora,dora models=base,d512,d1024 repeats=2 seconds=2 tokens=512
peer=peft|none modes=eager,compiled device=cpu|cuda dtype=float32|bfloat16 out=FOLDER (default benchmarks/runs).
A row takes `repeats` rounds of two turns at least, and as many as go into `seconds`. Models 0.6B, 1.7B and 8B have the shapes
of Qwen3 and random weights; they want device=cuda dtype=bfloat16.
Writes cost.json, after every row, so that an interrupted run keeps what it has, and cost.png.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from benchmarks.common.options import command, folder
from benchmarks.common.records import environment, write_json
from benchmarks.cost import attach as cost_attach
from benchmarks.cost import start as cost_start
from benchmarks.cost.report import plot, prose, table
from benchmarks.cost.settings import Cost, chosen
from benchmarks.cost.step import Done, step_rows


def run(settings: Cost, console: Console) -> dict[str, Any]:
    attach = cost_attach.Attach(peer=settings.peer, tokens=settings.tokens, threads=torch.get_num_threads())
    record: dict[str, Any] = {
        "benchmark": "cost",
        "settings": dataclasses.asdict(settings) | {"out": None},
        "environment": environment(),
        "attach": {"settings": dataclasses.asdict(attach)},
        "wall_seconds": {},
    }
    measured: dict[str, Callable[[Done], Any]] = {
        "step": lambda done: step_rows(settings, record, done),
        "attach": lambda done: record["attach"].update(rows=cost_attach.attach_rows(attach, done)),
        "growth": lambda done: record["attach"].update(growth=cost_attach.growth_rows(attach, done)),
        "large": lambda done: record["attach"].update(large=cost_attach.large_rows(attach, done)),
        "start": lambda done: record.update(start=cost_start.start_rows(settings)),
    }
    out = folder(settings.out)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        for part in settings.parts:
            rows = len(chosen(settings)) * len(settings.models) * len(settings.modes)
            total = {"step": rows, "start": 1}.get(part) or cost_attach.count(attach, part)
            task, started = progress.add_task(part, total=total), time.perf_counter()

            def done(name: str, part: str = part, task: TaskID = task) -> None:
                progress.update(task, description=f"{part}: {name}", advance=1)
                write_json(out / "cost.json", record)

            measured[part](done)
            record["wall_seconds"][part] = round(time.perf_counter() - started, 1)
            write_json(out / "cost.json", record)
            progress.remove_task(task)
    if "rows" in record:
        (out / "cost.png").write_bytes(plot(record))
    return record


def measure(words: list[str], console: Console) -> None:
    record = run(Cost.parse(words, "just bench-cost variants=lora,dora models=d512"), console)
    if "rows" in record:
        console.print(table(record))
    console.print("\n".join(prose(record)), markup=False, highlight=False, soft_wrap=True)


def main(words: list[str]) -> None:
    command(words, __doc__, measure, "the rows that were finished, if any, stand in cost.json")
