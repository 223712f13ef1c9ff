"""What is generated: parts of pages and whole pages of docs; from the registry and the committed records.

`--check` finds stale ones. Parts stand between two comments that name them, in the page that PARTS says:

example  a whole variant file              variants  the table
base     how well the embedded base predicts prose       steering  what one direction does
attacked what hostile files and kills did
"""

import json
import sys
from pathlib import Path
from typing import Any

import lora_lite as ll
import lora_lite.variants
from benchmarks.common.places import BASE, RESULTS, ROOT
from benchmarks.compatibility import report as compatibility_report
from benchmarks.compatibility import zoo
from benchmarks.cost import report as cost_report
from benchmarks.embedded.report import final
from benchmarks.forecast import report as forecast_report
from benchmarks.sequential import figures, page
from benchmarks.steering.report import summary
from docs import rooms
from lora_lite.contract.registry import card

VARIANTS = Path(lora_lite.variants.__file__).parent


def record(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def row(name: str) -> str:
    """Name and page, what it does, source, and the figures of its committed run."""
    cls = ll.get(name)
    fields = card(cls)
    what = fields["title"].partition(": ")[2].rstrip(".")
    source, _, rest = fields.get("paper", "").partition(", arXiv:")
    if arxiv := rest[:10]:
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
    return f"| [`{name}`](reviews/{name}.md) | {what} | {source} | {' | '.join(figures)} |"


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
        f"{text}. Learning rates from a sweep on a validation part of the training text "
        "([records](../benchmarks/results/sweep)).\nRanks are each config's default, lowered where the base's narrowest layer "
        "is narrower; one seed does not rank methods. "
        f"{where['threads']} CPU threads, torch {where['torch']}; step time is forward + backward\n"
        "beside the bare frozen model in the same run. Records: [benchmarks/results](../benchmarks/results)."
    )


def example() -> str:
    """The shortest variant file that builds on nothing but the contract, whole, as a code block."""
    own = [VARIANTS / f"{name}.py" for name in ll.names() if ll.get(name).__bases__ == (ll.Adapter,)]
    path = min(own, key=lambda p: (len(p.read_text().splitlines()), p.name))
    return f"This is a whole variant, `src/lora_lite/variants/{path.name}`:\n\n```python\n{path.read_text()}```"


def base() -> str:
    found = json.loads((BASE / "pretrain.json").read_text())["held_out_bits_per_byte"]
    return (
        f"The embedded base predicts held-out English technical prose at {found['model']:.2f} bits per byte;\n"
        "on the same bytes "
        f"`zlib -9` needs {found['zlib -9']:.2f} and `lzma -9e` {found['lzma -9e']:.2f} "
        "([recipe, log and figures](../benchmarks/base)).\n"
        "Which modules and topics are held out follows from a hash of their names."
    )


def steering() -> str:
    found = record("steering")
    return summary(found) if found else "`just steering out=benchmarks/results` has not been run."


def attacked() -> str:
    """What the last run of tests/reliability.py tried, and what came of it."""
    found = record("reliability")
    if not found or "files" not in found:
        return "`python -m tests.reliability` has not been run."
    files, crowd = found["files"], found["crowd"]
    lines = [
        f"{files['mutants']:,} mutants of real files, read by `ll.load`, `ll.load_peft`, `inspect` and `from_json`: "
        f"{files['refused']:,} refused,",
        f"{files['accepted']:,} harmless, {files['foreign']} other errors than LoraLiteError, {files['slow']} above a second, "
        f"{files['wrong']} damaged and taken for whole.",
        f"The slowest took {files['slowest']:.2f} s.",
        "",
        "| killed at random | kills | old content | new | torn | left behind after the next writing |",
        "|---|--:|--:|--:|--:|--:|",
        *(
            f"| {job} | {one['kills']} | {one['old']} | {one['new']} | {one['torn']} | {one['left']} |"
            for job, one in found["kills"].items()
        ),
        "",
        f"{crowd['processes']} processes that save, load and export to the same places, {crowd['calls']:,} calls: "
        f"{crowd['refused']} refused by LoraLiteError,",
        f"{sum(crowd['foreign'].values())} other errors, {crowd['torn']} torn; {crowd['won']} of {crowd['places']} folders "
        "have exactly one winner.",
    ]
    return "\n".join(lines)


REPORTS = {"cost": cost_report, "compatibility": compatibility_report, "forecast": forecast_report}
PARTS = {
    "README.md": {"example": example},
    "docs/variants.md": {"variants": lambda: f"{table()}\n\n{caption()}"},
    "docs/benchmark.md": {"base": base},
    "docs/steering.md": {"steering": steering},
    "docs/security.md": {"attacked": attacked},
}


def fresh(page: str, text: str) -> str:
    """The text of `page` with every generated part written anew."""
    for name, write in PARTS[page].items():
        begin, end = f"<!-- {name}: written by `just table` -->", f"<!-- end of {name} -->"
        head, tail = text[: text.index(begin)], text[text.index(end) :]
        text = f"{head}{begin}\n{write()}\n{tail}"
    return text


def pages() -> dict[Path, str]:
    """Every generated document as it should be."""
    made = {ROOT / page: fresh(page, (ROOT / page).read_text()) for page in PARTS}
    for name, report in REPORTS.items():
        if found := record(name):
            made[ROOT / "docs" / f"{name}.md"] = report.page(found)
    made[ROOT / "docs" / "compatibility.md"] += "\n" + zoo.section(ROOT / "tests" / "zoo" / "expected.md")
    made[ROOT / "docs" / "rooms.md"] = rooms.page()
    made[ROOT / "docs" / "sequential.md"] = page.page(figures.committed())
    return made


def main() -> None:
    for path, content in pages().items():
        if "--check" not in sys.argv:
            path.write_text(content)
        elif not path.exists() or path.read_text() != content:
            sys.exit(f"{path.name} is stale: just table")


if __name__ == "__main__":
    main()
