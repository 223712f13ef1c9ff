"""What a record of bench-cost says, and nothing else: a table on the terminal, a plot, the page docs/cost.md."""

import io
import textwrap
from typing import Any

from rich import box
from rich.table import Table

from benchmarks.cost.attach_report import section
from benchmarks.cost.goals import GOALS_READ, cell, controlled, label, ratio, reached
from benchmarks.cost.start_report import start_lines

COLUMNS = (
    ("forward / bare", "ours", "forward", "bare"),
    ("step / bare", "ours", "step", "bare"),
    ("step / limit", "ours", "step", "limit"),
    ("forward / PEFT", "ours", "forward", "peft"),
    ("step / PEFT", "ours", "step", "peft"),
    ("kept / bare", "ours", "saved_bytes", "bare"),
    ("kept / PEFT", "ours", "saved_bytes", "peft"),
    ("peak / bare", "ours", "peak_bytes", "bare"),
    ("peak / PEFT", "ours", "peak_bytes", "peft"),
    ("attach / PEFT", "ours", "attach_seconds", "peft"),
)


ON_TERMINAL = ("forward / bare", "step / bare", "step / limit", "forward / PEFT", "step / PEFT", "kept / PEFT", "peak / PEFT")


def table(record: dict[str, Any]) -> Table:
    environment, settings = record["environment"], record["settings"]
    made = Table(
        title=f"medians of {settings['repeats']} or more interleaved rounds, {settings['tokens']} tokens, {settings['dtype']}",
        caption=f"{environment['device']}, {environment['threads']} threads, torch {environment['torch']}; step: forward + "
        "backward; limit: bare + the method's multiply-adds and bytes at measured rates; kept: bytes kept for backward; peak: "
        "memory above what was there before; below 1 ours is cheaper; ~: unsteady",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    columns = [column for column in COLUMNS if column[0] in ON_TERMINAL]
    made.add_column("variant", no_wrap=True)
    for head, *_ in columns:
        made.add_column(head.replace(" / ", "\n/"), justify="right", no_wrap=True)
    for model in dict.fromkeys(row["model"] for row in record["rows"]):
        made.add_section()
        made.add_row(f"[bold]{model}[/bold]")
        for row in record["rows"]:
            if row["model"] == model:
                made.add_row(label(row), *(cell(row, *rest) for _, *rest in columns))
    return made


def plot(record: dict[str, Any]) -> bytes:
    """Step time over the bare model's: ours, PEFT's and the limit, a panel per model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(row["model"] for row in record["rows"]))
    names = list(dict.fromkeys(map(label, record["rows"])))
    height = 1.4 + 0.24 * len(names)
    figure, axes = plt.subplots(
        1, len(models), figsize=(2.2 + 3.4 * len(models), height), layout="constrained", sharey=True, squeeze=False
    )
    marks = (
        ("peft", "bare", "PEFT", {"marker": "o", "facecolors": "none", "edgecolors": "C1", "s": 34}),
        ("ours", "bare", "lora_lite", {"marker": "o", "color": "C0", "s": 26}),
        ("limit", "bare", "the arithmetic", {"marker": "|", "color": "0.35", "s": 90}),
    )
    for axis, model in zip(axes[0], models):
        rows = [row for row in record["rows"] if row["model"] == model]
        for subject, beside, text, style in marks:
            found = [(value, label(row)) for row in rows if (value := ratio(row, subject, "step", beside)) is not None]
            axis.scatter(
                [v for v, _ in found], [len(names) - 1 - names.index(n) for _, n in found], label=text, zorder=3, **style
            )
        axis.axvline(1.0, color="0.7", linewidth=1, zorder=1)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_title(model, fontsize=10)
        axis.grid(axis="y", color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(range(len(names)), reversed(names), fontsize=8)
    figure.legend(*axes[0][0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside upper right", ncols=3)
    figure.supxlabel("time of forward + backward over that of the bare frozen model", fontsize=9)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150, metadata={"Software": None})
    plt.close(figure)
    return out.getvalue()


def prose(record: dict[str, Any]) -> list[str]:
    """The sections on attaching and starting, of the parts that were run."""
    lines = section(record["attach"]) if set(record["attach"]) > {"settings"} else []
    return [*lines, "", "## Before the first step", "", *start_lines(record["start"])] if "start" in record else lines


def page(record: dict[str, Any]) -> str:
    """docs/cost.md."""
    settings, where = record["settings"], record["environment"]
    how = (
        "Medians over turns in one process on the same "
        f"{settings['tokens']} tokens: a round is the bare frozen model, ours, PEFT's, and then the bare one, PEFT's, ours; "
        f"{settings['repeats']} rounds, and as many as go into {settings['seconds']:g} seconds (one for who is over four times "
        f"slower than the bare model); {where['threads']} CPU threads, torch {where['torch']}, {settings['dtype']}. Forward is "
        "without gradients, step is forward + backward down to the embeddings, kept are bytes that "
        "forward keeps for backward, peak is the most memory that a step holds above what was there before. "
        "Limit is the bare model's time, the method's "
        "multiply-adds at the rate of a square product, and its bytes (its tensors, and the activations it changes, once in "
        "and once out) at the rate of a copy, both measured here. Below 1 ours is cheaper; with ~ the middle half "
        "of the turns spreads over more than a tenth: such a figure says little. Attach includes calibration where a method "
        "starts from data (two batches), which PEFT's figure does not: corda, eva and lora_ga stand beside PEFT's plain LoRA, "
        "which is what they train there."
    )
    models = (
        "Models: `base` is the embedded one (six blocks, 192 wide); `d512` and `d1024` are two Qwen3 blocks of that width with "
        "random weights, an inner width of three times that and half as many key and value heads."
    )
    if settings["device"] == "cpu":
        models += " No GPU was at hand: times there, and of compiled steps on one, are unmeasured."
    lines = [
        "# What adapters cost",
        "",
        "Generated by `just table` from [the record](../benchmarks/results/cost.json) of `just bench-cost`.",
        "",
        *textwrap.wrap(how, 120),
        "",
        *textwrap.wrap(models, 120),
        "",
        "![Step time over the bare model's: ours, PEFT's, the limit](cost.png)",
    ]
    if goals := reached(record):
        lines += ["", "## Goals", "", *textwrap.wrap(f"{GOALS_READ} {controlled(record)}", 120), ""]
        lines += ["| variant | ratio | at most | measured | limit | products | met |", "|---|---|--:|---|---|---|---|", *goals]
    for model in dict.fromkeys(row["model"] for row in record["rows"]):
        rate = record["rates"][model]
        lines += ["", f"## {model}", ""]
        products, copies = rate["multiply_adds_per_second"] / 1e9, rate["bytes_per_second"] / 1e9
        lines.append(f"Rates measured: {products:.0f} billion multiply-adds per second, {copies:.1f} GB per second.")
        lines += ["", f"| variant | r | {' | '.join(head for head, *_ in COLUMNS)} |", "|---|--:|" + "--:|" * len(COLUMNS)]
        for row in record["rows"]:
            if row["model"] == model:
                shown = " | ".join(cell(row, *rest) for _, *rest in COLUMNS)
                lines.append(f"| `{label(row)}` | {row['r'] or '-'} | {shown} |")
    walls = ", ".join(f"{part} {seconds / 60:.1f}" for part, seconds in record["wall_seconds"].items())
    lines += [
        "",
        *prose(record),
        "",
        f"Minutes that the parts of this run took: {walls}.",
        *textwrap.wrap(record.get("note", ""), 120),
    ]
    return "\n".join(lines) + "\n"
