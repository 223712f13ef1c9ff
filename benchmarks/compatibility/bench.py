"""just compatibility: which variant goes where, found by running the checks of every column on every variant.

Every check attaches, trains or converts a small model and returns "yes" or a reason; a defect raises and stands in the table as
such. Writes compatibility.json after every variant; `just table` makes docs/compatibility.md of it.

Keys: variants=lora,dora columns=merge,export out=FOLDER (default benchmarks/results)
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import lora_lite as ll
from benchmarks.common.options import Options, command
from benchmarks.common.places import RESULTS
from benchmarks.common.records import environment, write_json
from benchmarks.compatibility.report import table
from lora_lite.errors import closest
from tests.oracles import compat_engines, compat_merge, compat_peft, compat_quantised

COLUMNS: dict[str, Callable[[str], str]] = {
    "merge": compat_merge.check_merge,
    "compose": compat_merge.check_algebra,
    "export": compat_peft.check_export,
    "import": compat_peft.check_import,
    "8-bit": compat_quantised.check_8bit,
    "4-bit": compat_quantised.check_4bit,
    "int8": compat_quantised.check_int8,
    "Conv1D": compat_quantised.check_conv1d,
    "compile": compat_engines.check_compile,
}
TWO_PROCESSES = ("ddp", "fsdp2")  # all variants in one pair of processes


@dataclass(frozen=True, kw_only=True)
class Compatibility(Options):
    variants: tuple[str, ...] = ("all",)
    columns: tuple[str, ...] = (*COLUMNS, *TWO_PROCESSES)
    out: str = str(RESULTS)

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, lawful in {"variants": ("all", *ll.names()), "columns": (*COLUMNS, *TWO_PROCESSES)}.items():
            for word in getattr(self, field):
                if word not in lawful:
                    raise ll.LoraLiteError(f"{field}={word!r}", found=closest(word, lawful), fix=f"{field}={lawful[0]}")


def verdict(check: Callable[[str], str], name: str) -> str:
    """What the check says; what it raises is a defect, told in one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return check(name)
    except Exception as error:
        return f"DEFECT {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def run(settings: Compatibility, console: Console) -> dict[str, Any]:
    names = ll.names() if "all" in settings.variants else list(settings.variants)
    record: dict[str, Any] = {"benchmark": "compatibility", "environment": environment(), "rows": {name: {} for name in names}}
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(names) * len(settings.columns))
        for column in settings.columns:
            progress.update(task, description=column)
            found = compat_engines.over_two_processes(column, names) if column in TWO_PROCESSES else {}
            for name in names:
                record["rows"][name][column] = found.get(name) or verdict(COLUMNS[column], name)
                progress.advance(task)
            write_json(out / "compatibility.json", record)
    return record


def work(words: list[str], console: Console) -> None:
    console.print(table(run(Compatibility.parse(words, "just compatibility variants=lora columns=merge"), console)))


def main(words: list[str]) -> None:
    command(words, __doc__, work, "the columns that were finished stand in compatibility.json")
