"""What a run shows: a table on the terminal and a plot, from its record alone."""

import io
import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common.statistics import described
from benchmarks.common.statistics import paired as differences

LABELS = {
    "code_bits_per_byte": "code, bits per byte (adaptation)",
    "code_accuracy": "code, next-byte accuracy",
    "prose_bits_per_byte": "prose, bits per byte (forgetting)",
    "prose_accuracy": "prose, next-byte accuracy",
    "exact_match": "GSM8K, exact match",
}
COST = {
    "trainable": ("trained numbers", "{:,.0f}"),
    "frozen": ("frozen numbers of the adapter", "{:,.0f}"),
    "file_bytes": ("file size, bytes", "{:,.0f}"),
    "attach_seconds": ("attach, seconds", "{:.2f}"),
    "load_seconds": ("load, seconds", "{:.3f}"),
    "step_ratio": ("forward + backward / bare frozen model", "{:.2f}"),
    "forward_ratio": ("forward / bare frozen model", "{:.2f}"),
    "saved_for_backward_ratio": ("bytes kept for backward / bare frozen model", "{:.2f}"),
}
EXACT = ("identity_at_start", "coeff_zero", "save_load", "unmerge", "detach")


def final(run: dict[str, Any]) -> dict[str, float]:
    """Scores after the last step."""
    return {k: v for k, v in run["curve"][-1].items() if k not in ("step", "loss")}


def mean_and_deviation(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def paired(record: dict[str, Any]) -> dict[str, Any] | None:
    """Statistics of this variant less the one it ran against, seed by seed, on the adaptation metric."""
    if not record.get("peer"):
        return None
    metric = record["metric"]
    ours, theirs = ([final(run)[metric] for run in runs] for runs in (record["runs"], record["peer"]["runs"]))
    return {"against": record["peer"]["variant"], "metric": metric, **differences(ours, theirs)}


def table(record: dict[str, Any]) -> Table:
    runs, base = record["runs"], record["base"]
    seeds = f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"
    lr = runs[0]["config"]["lr"]
    shown = Table(title=f"{record['variant']}: {record['settings']['steps']} steps, lr {lr:g}, {seeds}", title_justify="left")
    shown.add_column("")
    shown.add_column("untouched base", justify="right")
    shown.add_column("adapted", justify="right")
    shown.add_column("change", justify="right")
    for metric, before in base.items():
        values = [final(run)[metric] for run in runs]
        change = statistics.mean(values) - before
        shown.add_row(LABELS.get(metric, metric), f"{before:.4f}", mean_and_deviation(values), f"{change:+.4f}")
    if comparison := record.get("paired"):
        shown.add_section()
        shown.add_row(f"paired difference to {comparison['against']}", "", described(comparison), "")
    shown.add_section()
    first = runs[0]
    measured = {**first["cost"], **first["fidelity"]}
    for key, (label, form) in COST.items():
        shown.add_row(label, "", form.format(measured[key]), "")
    shown.add_section()
    for key, value in first["fidelity"].items():
        if key not in COST:
            exact = "bit for bit" if key in EXACT and value == 0 else f"{value:.3g}"
            shown.add_row(key.replace("_", " "), "", exact, "")
    return shown


def plot(record: dict[str, Any]) -> bytes:
    """A PNG. Left: the adaptation metric over the steps, from the untouched base on. Right: base and adapted on every text."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metric, base = record["metric"], record["base"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", width_ratios=(3, 2))
    groups = [(record["variant"], record["runs"], "C0")]
    if record.get("peer"):
        groups.append((record["peer"]["variant"], record["peer"]["runs"], "C1"))
    for name, runs, colour in groups:
        for index, run in enumerate(runs):
            steps = [0, *(point["step"] for point in run["curve"])]
            scores = [base[metric], *(point[metric] for point in run["curve"])]
            left.plot(steps, scores, "o-", color=colour, alpha=0.8, markersize=4, label=name if index == 0 else None)
    left.axhline(base[metric], color="0.5", linestyle="--", linewidth=1, label="untouched base")
    left.set_xlabel("training step")
    left.set_ylabel(LABELS.get(metric, metric))
    left.legend(frameon=False)
    shown = [m for m in base if m.endswith("bits_per_byte")] or list(base)
    for offset, (label, values, colour) in enumerate(
        (
            ("untouched base", [base[m] for m in shown], "0.7"),
            (record["variant"], [statistics.mean(final(run)[m] for run in record["runs"]) for m in shown], "C0"),
        )
    ):
        bars = right.bar([i + 0.38 * offset for i in range(len(shown))], values, 0.36, color=colour, label=label)
        right.bar_label(bars, fmt="%.3f", fontsize=8)
    right.set_xticks([i + 0.19 for i in range(len(shown))], [m.split("_")[0] for m in shown])
    right.set_ylabel("bits per byte on held-out text" if shown[0].endswith("byte") else shown[0])
    right.set_ylim(0, 1.18 * max(bar.get_height() for bar in right.patches))
    right.legend(frameon=False, ncols=2, loc="upper center")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    trained = record["runs"][0]["cost"]["trainable"]
    figure.suptitle(f"{record['variant']}: {trained:,} trained numbers, {record['settings']['steps']} steps", x=0.01, ha="left")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130)
    plt.close(figure)
    return out.getvalue()


def show(record: dict[str, Any], console: Console) -> None:
    console.print(table(record))
