"""just bench-variant NAME [key=value ...]: adapt a real model with one variant, print what it cost and bought.

Keys are fields of benchmarks.embedded.run.Settings (steps=50 seeds=0,1,2 lr=1e-3 model=FOLDER task=math ...) or of the
variant's config (r=4 alpha=8 targets=o_proj,down_proj ...). Writes a JSON record and a plot to out= (default benchmarks/runs).
On several processes: accelerate launch --multi_gpu --num_processes 2 -m benchmarks NAME [key=value ...]
"""

import dataclasses
import logging
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import lora_lite as ll
from benchmarks.common import team
from benchmarks.common.options import folder, usable, value_of
from benchmarks.common.places import RUNS
from benchmarks.common.records import environment, write_pair
from benchmarks.embedded import report
from benchmarks.embedded.run import Settings, load_base, make_task, run_variant, settings_json
from lora_lite.errors import closest

console = Console(quiet=not team.is_first())


def parse(pairs: list[str], cls: type[ll.Adapter]) -> tuple[Settings, dict[str, Any], Path]:
    """(settings, config fields, output folder) of key=value words. Raises LoraLiteError for an unknown key."""
    settings_fields = {f.name for f in dataclasses.fields(Settings)}
    config_fields = {f.name for f in dataclasses.fields(cls.Config)}
    run: dict[str, Any] = {}
    config: dict[str, Any] = {}
    out = RUNS
    for pair in pairs:
        key, equals, word = pair.partition("=")
        if not equals or key not in settings_fields | config_fields | {"out"}:
            raise ll.LoraLiteError(
                f"{pair!r} is no option of this benchmark or of {cls.variant}.",
                expected="Options are written key=value.",
                found=closest(key, settings_fields | config_fields | {"out"}),
                fix=f"just bench-variant {cls.variant} steps=200 r=8",
            )
        if key == "out":
            out = Path(word)
        else:
            (run if key in settings_fields else config)[key] = value_of(word)
    for key, hint in (("seeds", int),):
        if key in run:
            run[key] = run[key] if isinstance(run[key], tuple) else (run[key],)
            if not all(type(v) is hint for v in run[key]):
                raise ll.LoraLiteError(f"{key}={run[key]}", expected="Integers.", fix="seeds=0,1,2")
    settings = Settings(**run)
    for key in ("steps", "batch", "window", "eval_windows", "calibration_batches"):
        if type(getattr(settings, key)) is not int or getattr(settings, key) < 1:
            raise ll.LoraLiteError(f"{key}={getattr(settings, key)!r}", expected="An integer above 0.", fix=f"{key}=100")
    if settings.lr is not None and not (isinstance(settings.lr, (int, float)) and settings.lr > 0):
        raise ll.LoraLiteError(f"lr={settings.lr!r}", expected="A number above 0.", fix="lr=1e-3")
    return settings, config, out


def progress_over(progress: Progress) -> Any:
    def run(steps: Iterable[int], label: str) -> Iterable[int]:
        steps = list(steps)
        task = progress.add_task(label, total=len(steps))
        for step in steps:
            yield step
            progress.advance(task)

    return run


def bench(name: str, pairs: list[str]) -> dict[str, Any]:
    """Run one variant over its seeds; the record. Of several processes the first scores, prints and writes."""
    cls = ll.get(name)
    settings, fields, out = parse(pairs, cls)
    ll.config(name, **fields)  # a wrong field fails before anything is loaded
    folder(str(out))
    usable(settings.device)
    settings = dataclasses.replace(settings, device=team.joined(settings.device))
    started = time.perf_counter()
    with console.status("loading the base and scoring it untouched"):
        bare, tokenizer = load_base(settings)
        first_task = make_task(settings, tokenizer, settings.seeds[0])
        base = first_task.evaluate(bare) if team.is_first() else {}
    record: dict[str, Any] = {
        "variant": name,
        "metric": first_task.metric,
        "settings": settings_json(settings),
        "data": first_task.describe(),
        "environment": environment(),
        "base": base,
        "runs": [],
    }
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        track = progress_over(progress)

        def over_seeds(variant: str, variant_fields: dict[str, Any]) -> list[dict[str, Any]]:
            runs = []
            for seed in settings.seeds:
                torch.manual_seed(seed)
                task = make_task(settings, tokenizer, seed)
                runs.append(run_variant(variant, variant_fields, settings, seed, track, bare=bare, task=task))
            return runs

        record["runs"] = over_seeds(name, fields)
        if len(settings.seeds) > 1 and settings.against != name:
            record["peer"] = {"variant": settings.against, "runs": over_seeds(settings.against, {})}
    team.leave(settings.device)
    if not team.is_first():
        return record
    record["paired"] = report.paired(record)
    record["wall_seconds"] = round(time.perf_counter() - started, 1)
    written = write_pair(out, record["variant"], record, report.plot(record))
    report.show(record, console)
    on = f" on {team.size()} processes" if team.size() > 1 else ""
    console.print(f"{record['wall_seconds']:.0f} s{on}; wrote {written}", soft_wrap=True)
    return record


def main(
    name: Annotated[str, typer.Argument(help="name of a registered variant")],
    pairs: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="options, see above")] = None,
) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        bench(name, pairs or [])
    except ll.LoraLiteError as error:
        console.print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("stopped; no record was written")
        sys.exit(130)
