"""just sequential-records [NAME ...]: run bench-sequential anew for every committed record, or for the named ones.

Writes benchmarks/results/sequential/NAME.json, and docs/sequential.png from one of them; `just table` makes docs/sequential.md
from all. Half of the time is that of the embedded base.
"""

import sys

from rich.console import Console

import lora_lite as ll
from benchmarks.common.options import command
from benchmarks.common.places import ROOT
from benchmarks.common.records import write_json
from benchmarks.sequential.bench import measured
from benchmarks.sequential.figures import FOLDER
from benchmarks.sequential.report import plot, show
from lora_lite.core.checkpoint import write_atomically
from lora_lite.errors import closest

PICTURE, PICTURED = ROOT / "docs" / "sequential.png", "base_conflict"
SIX = ("lora", "model=tier", "seeds=0,1,2,3,4,5", "alpha=16")
FULL, HALF = (*SIX, "lr=5e-3"), (*SIX, "lr=2e-3", "batch=8")
"""Two regimes: facts are learned whole in the first phase, or in part."""
SWEEP = "routes=" + ",".join(f"A+0.9B+{c:g}C" for c in (0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.75, 1.0))
OBJECTIVES = {
    "repulsion_2": "repulsion:2",
    "gossip_5": "gossip:5,tau=.5",
    "gossip_12.5": "gossip:12.5,tau=.5",
    "repulsion_preset": "repulsion",
    "l1": "l1:.1",
}
SECOND = ("B_rehearsal", "B_related", "B_strong", "N_neutral")
RECORDS = {
    "conflict": (*FULL, "joint=yes", SWEEP),
    "neutral_last": (*FULL, "phases=A,B_related,N_neutral", "routes=A+B+C"),
    **{f"full_{task}": (*FULL, f"phases=A,{task}", "routes=A+B") for task in SECOND},
    **{f"half_{task}": (*HALF, f"phases=A,{task}", "routes=A+B") for task in SECOND},
    "continual_80": (*FULL, "suite=continual", "joint=yes", "routes=A+B"),
    "continual_160": (*FULL, "suite=continual", "joint=yes", "steps=160", "routes=A+0.25B,A+0.5B,A+0.75B"),
    **{name: (*FULL, f"objective={text}", "routes=A+0.9B+0.25C") for name, text in OBJECTIVES.items()},
    "base_conflict": ("lora", "joint=yes"),
    **{f"base_{task}": ("lora", f"phases=A,{task}", "steps=20", "routes=A+B") for task in ("B_rehearsal", "N_neutral")},
}
"""{name: words of bench-sequential}."""


def make(names: list[str], console: Console) -> None:
    for name in names:
        if name not in RECORDS:
            raise ll.LoraLiteError(f"There is no record {name!r}.", found=closest(name, RECORDS), fix="just sequential-records")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in names or RECORDS:
        record = measured(list(RECORDS[name]), console)
        write_json(FOLDER / f"{name}.json", record)
        if name == PICTURED:
            write_atomically(PICTURE, plot(record))
        show(record, console)
        console.print(f"wrote {name}.json", soft_wrap=True)


if __name__ == "__main__":
    command(sys.argv[1:], __doc__, make, "the record in work was not written")
