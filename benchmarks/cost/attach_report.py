"""What the rows of `cost_attach` say, as lines of Markdown. Figures come from the rows alone."""

import textwrap
from typing import Any


def mib(value: float) -> str:
    return f"{value / 2**20:.0f}"


def share(row: dict[str, Any], measure: str) -> str:
    """Ours over PEFT's."""
    return f"{row['ours'][measure] / row['peft'][measure]:.2f}" if "peft" in row else "-"


def lost(row: dict[str, Any], subject: str) -> str:
    energy = row.get(subject, {}).get("energy")
    return "-" if energy is None else f"{max(1 - energy, 0):.0e}"


def section(record: dict[str, Any]) -> list[str]:
    """The part of the page on attaching."""
    used, threads = record["settings"], record["settings"]["threads"]
    how = (
        f"Seconds on {threads} threads, median of {used['repeats']} or more (growth: of 2), peak memory beyond the model, each "
        f"in a new process; {used['batches']} batches of {used['tokens']} calibration tokens where a start needs them. Lost: "
        "the share of the largest possible |U^T M|^2 that the directions miss. The peer of a method without one is PEFT's "
        "nearest."
    )
    lines = ["## Attaching", "", *textwrap.wrap(how, 120)]
    if "rows" in record:
        lines += ["", "| start | model | r | s | PEFT s | ratio | MiB | PEFT MiB | ratio | lost | PEFT lost |"]
        lines += ["|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for row in record.get("rows", []):
        ours, peft = row["ours"], row.get("peft")
        lines.append(
            f"| `{row['case']}` | {row['model']} | {row['r']} | {ours['seconds']:.2f} | "
            f"{format(peft['seconds'], '.2f') if peft else '-'} | {share(row, 'seconds')} | {mib(ours['peak_bytes'])} | "
            f"{mib(peft['peak_bytes']) if peft else '-'} | {share(row, 'peak_bytes')} | "
            f"{lost(row, 'ours')} | {lost(row, 'peft')} |"
        )
    if "growth" in record:
        lines += ["", "Growth, one option at a time: four values, and p of the fit ~ size^p.", ""]
        lines += ["| start | against | at | s | p | MiB | p |", "|---|---|---|---|---:|---|---:|"]
    for row in record.get("growth", []):
        lines.append(
            f"| `{row['case']}` | {row['against']} | {', '.join(map(str, row['at']))} | "
            f"{', '.join(f'{s:.2f}' for s in row['seconds'])} | {row['seconds_exponent']:.2f} | "
            f"{', '.join(map(mib, row['peak_bytes']))} | {row['peak_bytes_exponent']:.2f} |"
        )
    if "large" in record:
        tokens = record["large"][0]["tokens"]
        how = "Blocks of an 8B model's sizes in bfloat16: peak beyond the model over the model's size. Batches there have"
        lines += ["", *textwrap.wrap(f"{how} {tokens} tokens.", 120), ""]
        lines += ["| start | blocks | s | model MiB | MiB | ratio |", "|---|---:|---:|---:|---:|---:|"]
    for row in record.get("large", []):
        ours = row["ours"]
        lines.append(
            f"| `{row['case']}` | {row['blocks']} | {ours['seconds']:.0f} | {mib(ours['model_bytes'])} | "
            f"{mib(ours['peak_bytes'])} | {ours['peak_bytes'] / ours['model_bytes']:.2f} |"
        )
    return lines
