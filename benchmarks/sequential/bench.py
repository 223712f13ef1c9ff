"""just bench-sequential NAME [key=value ...]: one adapter, task after task: what it learns, keeps and forgets.

suite=accretion   A, then B_related (or B_strong, B_rehearsal, N_neutral), then C_conflict, which contradicts A, or N_neutral
suite=continual   P, then Q, which gives the same keys other values
phases=A,B_rehearsal,C_conflict   the tasks themselves, of one suite

Every phase goes on with the same adapter and a new AdamW. After each, every task is scored on entities that no task trained:
loss of the line, of the answer, of its first value, share of answers written exactly. Beside it runs plain lora, without the
objective, from the same seeds. From snapshots between the phases come routes, sums such as A+0.9B+0.25C.

model=base (the embedded Qwen3, default), model=tier (74,784 parameters, words for tokens, seconds) or a folder
objective=gossip:5 or any other that lora_lite.objectives knows, seeds=0,1,2 steps=40 batch=8 lines=32 routes=A+B,A+0.9B+0.25C
joint=yes also trains on all tasks at once; out=FOLDER (default benchmarks/runs); other keys go to the variant's config (r=4)
"""

import dataclasses
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

import lora_lite as ll
from benchmarks.common.options import Options, command, folder, usable, value_of
from benchmarks.common.places import BASE, RUNS
from benchmarks.common.records import environment, write_pair
from benchmarks.embedded.run import Settings, load_base
from benchmarks.sequential.data import Pieces, Tokens, Words
from benchmarks.sequential.model import tier
from benchmarks.sequential.report import plot, show
from benchmarks.sequential.run import Plan, sequence
from benchmarks.sequential.summary import finished
from benchmarks.sequential.tasks import ENTITIES, LEDGERS, LINES, digest
from lora_lite.contract.config import AdapterConfig
from lora_lite.errors import closest

USAGE = "just bench-sequential lora suite=accretion objective=gossip:5 seeds=0,1,2"
PLAIN = "lora"  # what everything is measured against
SUITES = {"accretion": ("A", "B_related", "C_conflict"), "continual": ("P", "Q")}
PRESETS = {"tier": ("steps=80", "batch=16", "lines=64")}
"""Words that go before the user's, by model."""
ROUTES = {3: ("A+0.9B+0.25C", "A+0.9B+0.5C", "A+0.9B+0.75C", "A+B+C"), 2: ("A+0.25B", "A+0.5B", "A+0.75B", "A+B")}


@dataclass(frozen=True, kw_only=True)
class Sequential(Options):
    """suite: default means that of the phases; phases and routes: those of the suite; lines: held-out lines of each task that
    are scored, at most."""

    suite: str = "default"
    phases: tuple[str, ...] = ("default",)
    objective: str = "none"
    model: str = "base"
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 40
    batch: int = 8
    lines: int = 32
    routes: tuple[str, ...] = ("default",)
    joint: str = "no"
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    out: str = str(RUNS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.suite != "default":
            self.one_of("suite", self.suite, SUITES)
        self.one_of("joint", self.joint, ("no", "yes"))
        if self.phases == ("default",):
            object.__setattr__(self, "phases", SUITES.get(self.suite, SUITES["accretion"]))
        for phase in self.phases:
            self.one_of("phases", phase, LINES, fix=f"phases={','.join(SUITES['accretion'])}")
        suites = {"continual" if phase in LEDGERS else "accretion" for phase in self.phases}
        if len(suites) > 1 or not 2 <= len(set(self.phases)) == len(self.phases) <= 3:
            raise ll.LoraLiteError(
                f"phases={','.join(self.phases)}",
                expected="Two or three different tasks of one suite.",
                fix="phases=A,B_strong,C_conflict",
            )
        (suite,) = suites
        if self.suite not in ("default", suite):
            raise ll.LoraLiteError(
                f"phases={','.join(self.phases)} are tasks of suite={suite}, not of suite={self.suite}.", fix=f"suite={suite}"
            )
        object.__setattr__(self, "suite", suite)
        if len(set(self.seeds)) < len(self.seeds):
            raise ll.LoraLiteError(
                f"seeds={','.join(map(str, self.seeds))}",
                expected="Different seeds: one run counted twice is no second one.",
                fix="seeds=0,1,2",
            )
        if self.lines < 2:
            raise ll.LoraLiteError(
                f"lines={self.lines}",
                expected="2 or more: gains are chosen on one half and shown on the other.",
                fix="lines=32",
            )
        usable(self.device)
        if self.routes == ("default",):
            object.__setattr__(self, "routes", ROUTES[len(self.phases)])
        for route in self.routes:
            ll.parse_route(route, "ABC"[: len(self.phases)])
        ll.objectives.parse(self.objective)

    @staticmethod
    def one_of(key: str, value: str, known: Any, fix: str = "") -> None:
        if value not in known:
            raise ll.LoraLiteError(
                f"{key}={value} is unknown.",
                found=closest(value, known),
                fix=fix or f"{key}={next(iter(known))}",
            )


def parsed(words: list[str]) -> tuple[str, Sequential, dict[str, Any]]:
    """(variant, options, fields of its config). Raises LoraLiteError for unknown names and for keys that neither has."""
    if not words or "=" in words[0]:
        raise ll.LoraLiteError(
            "Which variant?", expected="Its name, then options.", found=f"Known: {', '.join(ll.names())}.", fix=USAGE
        )
    name, *rest = words
    cls = ll.get(name)
    known = {f.name for f in dataclasses.fields(cls.Config)} - {"seed"}  # which `seeds` sets
    fields = {key: value_of(value) for key, equals, value in (word.partition("=") for word in rest) if equals and key in known}
    model = next((word.partition("=")[2] for word in rest if word.startswith("model=")), Sequential.model)
    mine = [word for word in rest if word.partition("=")[0] not in fields]
    options = Sequential.parse([*PRESETS.get(model, ()), *mine], USAGE, also=known)
    if not ll.config(name, **fields).coeff:  # a wrong field fails before anything is loaded
        raise ll.LoraLiteError("coeff=0 switches the adapter off.", expected="One that can be trained.", fix="coeff=1")
    return name, options, fields


def plain_fields(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Those that plain lora takes over: of lora all; of another method rank, layers and the like, and not its rate."""
    common = {f.name for f in dataclasses.fields(AdapterConfig)} - {"lr", "seed", "coeff"}
    return {key: value for key, value in fields.items() if name == PLAIN or key in common}


def own_rate(name: str, model: str) -> dict[str, float]:
    """Of a model that the sweep does not speak for: the config's rate, which is meant for language models."""
    swept = model in ("base", "tier") or Path(model).resolve() == BASE.resolve()
    return {} if swept else {"lr": ll.config(name).lr}


def base_of(options: Sequential) -> tuple[nn.Module, Tokens]:
    if options.model == "tier":
        return tier().to(options.device), Words()
    folder = str(BASE) if options.model == "base" else options.model
    model, tokenizer = load_base(Settings(device=options.device, model=folder))
    return model, Pieces(tokenizer)


def experiment(name: str, options: Sequential, fields: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """The record of NAME and of plain lora beside it, seed by seed."""
    bare, tokens = base_of(options)
    plan = Plan(
        options.phases,
        tokens,
        bare,
        options.objective,
        options.steps,
        options.batch,
        options.lines,
        options.routes,
        options.joint == "yes",
        options.device,
    )
    plain = dataclasses.replace(plan, objective="none", joint=False)
    is_plain = name == PLAIN and not ll.objectives.parse(options.objective).needs
    kinds = [("runs", name, fields, plan)] + ([] if is_plain else [("peer", PLAIN, plain_fields(name, fields), plain)])
    found: dict[str, list[Any]] = {}
    for key, variant, given, its in kinds:
        for seed in options.seeds:
            task = progress.add_task(f"{variant}, seed {seed}", total=its.work())
            run = sequence(
                its, variant, {**own_rate(variant, options.model), **given}, seed, lambda task=task: progress.advance(task)
            )
            progress.remove_task(task)
            found.setdefault(key, []).append(run)
    record: dict[str, Any] = {
        "benchmark": "sequential",
        "variant": name,
        "config": fields,
        "settings": {k: v for k, v in dataclasses.asdict(options).items() if k != "out"},
        "tasks": {task: {"entities": ENTITIES[task], "sha256": digest(task)} for task in options.phases},
        "environment": environment(),
        "runs": found["runs"],
        "peer": {"variant": PLAIN, "runs": found["peer"]} if "peer" in found else None,
    }
    return finished(record)


def name_of(record: dict[str, Any]) -> str:
    """Of the record's files: the variant, model, tasks and objective."""
    settings = record["settings"]
    words = [record["variant"], Path(settings["model"]).name, *record["tasks"]]
    if settings["objective"] != "none":
        words.append(re.sub("[^A-Za-z0-9.]+", "_", settings["objective"]))
    return "-".join(words)


def measured(words: list[str], console: Console) -> dict[str, Any]:
    """The record that the words ask for. Raises LoraLiteError for wrong options."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        record = experiment(*parsed(words), progress)
    shown = [word for word in words if not word.startswith("out=")]
    return {"command": " ".join(["just bench-sequential", *shown]), **record}


def bench(words: list[str], console: Console) -> dict[str, Any]:
    """Measure, show and write. Raises LoraLiteError for wrong options."""
    started = time.perf_counter()
    out = folder(parsed(words)[1].out)
    record = measured(words, console)
    written = write_pair(out, name_of(record), record, plot(record))
    show(record, console)
    console.print(f"{time.perf_counter() - started:.0f} s; wrote {written}", soft_wrap=True)
    return record


def main(words: list[str]) -> None:
    command(words, __doc__, bench, "no record was written")
