"""just bench-objectives [key=value ...]: what each objective adds to a training step on the embedded base.

A step is forward with `ll.capture`, objective and backward of the base with a lora adapter on every Linear, beside the step
without an objective, in turns, in CPU seconds of one thread: waiting for other programs does not count. Each figure is the
median over the rounds of the ratio to the plain step of the same round, with the smallest and the largest.

Keys: rounds=9 rows=4 tokens=256 r=8 out=FOLDER (default benchmarks/runs). Writes objectives_cost.json.
"""

import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import lora_lite as ll
from benchmarks.common import text
from benchmarks.common.options import Options, command
from benchmarks.common.places import RUNS
from benchmarks.common.records import environment, write_json
from benchmarks.embedded.run import Settings, load_base

SUBJECTS = (
    "l1",
    "gossip:5,tau=.5",
    "repulsion:2",
    "diversity",
    "barrier:.1,alpha=.1,soft=true,eps=.01",
    "delta_norm:.0001",
)


@dataclass(frozen=True, kw_only=True)
class Cost(Options):
    rounds: int = 9
    rows: int = 4
    tokens: int = 256
    r: int = 8
    out: str = str(RUNS)


def step(model: nn.Module, ids: Tensor, objective: ll.objectives.Summand) -> None:
    with ll.capture(model, objective) as seen:
        loss = model(input_ids=ids, labels=ids).loss
    (loss + objective(seen)).backward()
    model.zero_grad()


def cpu_seconds(model: nn.Module, ids: Tensor, objective: ll.objectives.Summand) -> float:
    start = time.process_time()
    step(model, ids, objective)
    return time.process_time() - start


def measured(settings: Cost, console: Console) -> dict[str, Any]:
    torch.set_num_threads(1)
    model, _ = load_base(Settings())
    ll.attach(model, ll.config("lora", r=settings.r))
    model.train()
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    wanted = settings.rows * settings.tokens
    ids = torch.tensor(list(text.joined(text.prose(held_out=False))[:wanted])).view(settings.rows, settings.tokens)
    subjects = {name: ll.objectives.parse(name) for name in ("none", *SUBJECTS)}
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for number in track(range(settings.rounds + 1), description="rounds", console=console, transient=True):
        for name, objective in subjects.items():
            spent = cpu_seconds(model, ids, objective)
            if number:  # the first warms up
                seconds[name].append(spent)
    plain = seconds.pop("none")
    ratios = {name: [spent / bare for spent, bare in zip(found, plain)] for name, found in seconds.items()}
    return {
        "settings": {key: value for key, value in asdict(settings).items() if key != "out"},
        "environment": environment(),
        "plain_seconds": round(statistics.median(plain), 4),
        "ratios": {
            name: {
                "median": round(statistics.median(found), 3),
                "least": round(min(found), 3),
                "most": round(max(found), 3),
            }
            for name, found in ratios.items()
        },
    }


def markdown(record: dict[str, Any]) -> list[str]:
    """The table of the guide, a line per row."""
    return [
        "| objective | step / plain step | smallest to largest |",
        "|---|--:|--:|",
        *(f"| `{name}` | {f['median']:.2f} | {f['least']:.2f} to {f['most']:.2f} |" for name, f in record["ratios"].items()),
    ]


def run(words: list[str], console: Console) -> None:
    settings = Cost.parse(words, "just bench-objectives rounds=9")
    record = measured(settings, console)
    table = Table("objective", "step / plain step", "smallest", "largest")
    for name, found in record["ratios"].items():
        table.add_row(name, *(f"{found[key]:.2f}" for key in ("median", "least", "most")))
    path = Path(settings.out) / "objectives_cost.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    console.print(table)
    console.print(f"plain step {record['plain_seconds']:.3f} CPU seconds; wrote {path}", soft_wrap=True)


def main(words: list[str]) -> None:
    command(words, __doc__, run, "nothing was written")


if __name__ == "__main__":
    main(sys.argv[1:])
