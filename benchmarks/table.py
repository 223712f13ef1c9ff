"""The README's table of variants, from the registry and the committed records; `--check` fails when it is stale."""

import json
import sys
from pathlib import Path
from typing import Any

import lora_lite as ll
from benchmarks.report import final
from lora_lite.registry import card

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- variants: written by `just table` -->", "<!-- end of variants -->"


def record(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def row(name: str) -> str:
    """Name and page, what it does, source, and the figures of its committed run."""
    cls = ll.get(name)
    fields = card(cls)
    what = fields["title"].partition(": ")[2].rstrip(".")
    source = fields.get("paper", "").partition(",")[0]
    if (arxiv := fields.get("paper", "").partition("arXiv:")[2][:10]) and "arXiv:" in fields["paper"]:
        source += f", [{arxiv}](https://arxiv.org/abs/{arxiv})"
    found = record(name)
    figures = ["-"] * 5
    if found:
        run, base = found["runs"][0], found["base"]
        after, cost = final(run), run["cost"]
        figures = [
            f"{cost['trainable']:,}",
            f"{run['config']['lr']:g}",
            f"{after['code_bits_per_byte']:.3f}",
            f"{after['prose_bits_per_byte'] - base['prose_bits_per_byte']:+.3f}",
            f"{cost['step_ratio']:.2f}",
        ]
    return f"| [`{name}`](docs/reviews/{name}.md) | {what} | {source} | {' | '.join(figures)} |"


def table() -> str:
    head = [
        "| variant | what it does | source | trained | lr | code bpb | prose bpb, change | step time / bare |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    return "\n".join([*head, *map(row, ll.names())])


def caption() -> str:
    """The conditions of the figures, from the records."""
    records = [found for name in ll.names() if (found := record(name))]
    if not records:
        return ""
    first = records[0]
    full = json.loads(path.read_text()) if (path := RESULTS / "full.json").exists() else None
    settings, where = first["settings"], first["environment"]
    text = (
        f"Held-out standard library code and prose, bits per byte (bpb), after {settings['steps']} steps of "
        f"{settings['batch']} x {settings['window']} bytes, one seed; the untouched base has "
        f"{first['base']['code_bits_per_byte']:.3f} on code"
    )
    if full:
        text += f", full fine-tuning reaches {final(full['runs'][0])['code_bits_per_byte']:.3f}"
    return (
        f"{text}. Learning rates from a sweep on a validation part of the training text ([record](benchmarks/results/sweep.json)). "
        f"One seed does not rank methods. {where['threads']} CPU threads, torch {where['torch']}; step time is forward + backward "
        "beside the bare frozen model in the same run. Records: [benchmarks/results](benchmarks/results)."
    )


def section() -> str:
    return f"{BEGIN}\n{table()}\n\n{caption()}\n{END}"


def current(readme: str) -> str:
    """The part of the README between the marks, marks included."""
    return readme[readme.index(BEGIN) : readme.index(END) + len(END)]


def main() -> None:
    path = ROOT / "README.md"
    readme = path.read_text()
    fresh = readme.replace(current(readme), section())
    if "--check" in sys.argv:
        if fresh != readme:
            sys.exit("README.md: the table of variants is stale: just table")
        return
    path.write_text(fresh)


if __name__ == "__main__":
    main()
