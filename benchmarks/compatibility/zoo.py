"""The table of architectures on docs/compatibility.md, from what tests/zoo/expected.md records of each."""

import re
from pathlib import Path


def section(expected: Path) -> str:
    """One row for each architecture: its class, coverage, what "all-linear" adapts, and what it leaves out with the reason."""
    text = expected.read_text()
    rows = []
    for family, body in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", text, flags=re.S | re.M):
        for name, entry in re.findall(r"^### (.+?)\n(.*?)(?=^### |\Z)", body, flags=re.S | re.M):
            facts = dict(re.findall(r"^- (\w[\w ]*): (.+)$", entry, flags=re.M))
            head = re.search(r"Layers: (\d+), coverage ([\d.]+)", entry)
            share = f"{float(head[2]):.0%}" if head else "refused"
            cells = (family, f"`{name}`", share, facts.get("adapted", "-"), facts.get("skipped", "-"))
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    head = [
        "## What `all-linear` takes of which architecture",
        "",
        f"{len(rows)} architectures at tiny sizes, held by `tests/zoo`; [more of each](../tests/zoo/expected.md). The share is",
        "that of the model's numbers in adapted layers; at real sizes embeddings weigh less.",
        "",
        "| family | architecture | share | adapted | left out, and why |",
        "|---|---|--:|---|---|",
    ]
    return "\n".join([*head, *rows]) + "\n"
