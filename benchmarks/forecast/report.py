"""What a record of the forecasting example says: a table, a plot and docs/forecast.md; no figure comes from elsewhere."""

import io
import textwrap
from collections.abc import Iterator
from statistics import fmean as mean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.common.statistics import paired

SHOWN = {"noise": 0.4, "spikes": 0.05, "gaps": 0.2}
"""The size of each disturbance that tables show."""
Run = dict[str, Any]


def at(record: dict[str, Any], run: Run, name: str) -> float:
    """The loss at the size of a disturbance that tables show."""
    return run["disturbed"][name][record["sizes"][name].index(SHOWN[name])]


def rows(record: dict[str, Any]) -> Iterator[list[str]]:
    """Task, arm, then figures: means over the seeds."""
    for name, found in record["tasks"].items():
        for arm, runs in {"base": [found["base"]], **found["arms"]}.items():
            figures = [f"{mean([run[key] for run in runs]):.3f}" for key in ("loss", "error", "trace")]
            beyond = "-" if runs[0]["beyond"] is None else f"{mean([run['beyond'] for run in runs]):.1%}"
            disturbed = [f"{mean([at(record, run, kind) for run in runs]):.3f}" for kind in SHOWN]
            yield [name, arm, *figures, beyond, *disturbed]
        yield [name, "last value", "-", f"{found['last_value_error']:.3f}", *["-"] * 5]


HEADS = ("task", "barrier", "loss", "error", "trace", "beyond", *SHOWN)
SIZES = ", ".join(f"{name} {size:g}" for name, size in SHOWN.items())


def table(record: dict[str, Any]) -> Table:
    seeds = len(record["settings"]["seeds"])
    made = Table(
        title=f"{record['settings']['variant']} with and without an attention barrier",
        caption=f"Held-out windows, {f'mean of {seeds} seeds' if seeds > 1 else 'one seed'}: forecasting loss, mean absolute "
        f"error, attention trace, share beyond the barrier; loss on disturbed inputs ({SIZES}); less is better",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for index, head in enumerate(HEADS):
        made.add_column(head, justify="right" if index > 1 else "left", no_wrap=True)
    last = None
    for name, *cells in rows(record):
        if last not in (None, name):
            made.add_section()
        made.add_row(name if name != last else "", *cells)
        last = name
    return made


def changes(record: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(task, measure, statistics of the run with the barrier less the one without, seed by seed)."""
    for name, found in record["tasks"].items():
        with_barrier, without = found["arms"]["barrier"], found["arms"]["none"]
        for key in ("loss", "error", "trace"):
            yield name, key, paired([run[key] for run in with_barrier], [run[key] for run in without])
        for kind in SHOWN:
            pair = ([at(record, run, kind) for run in runs] for runs in (with_barrier, without))
            yield name, kind, paired(*pair)


# --- plot -------------------------------------------------------------------------------------------------------------

LINES: dict[str, dict[str, Any]] = {
    "none": {"label": "without barrier", "color": "C0", "lw": 2.5, "alpha": 0.6},
    "barrier": {"label": "with barrier", "color": "C1", "lw": 1},
}


def plot(record: dict[str, Any]) -> bytes:
    """A row per task: a held-out window and its forecasts, then the loss over the size of each disturbance."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = record["tasks"]
    widths = [1.7, *[1] * len(SHOWN)]
    figure, grid = plt.subplots(
        len(tasks), len(widths), figsize=(13, 2.5 * len(tasks)), layout="constrained", width_ratios=widths, squeeze=False
    )
    for row, (name, found) in zip(grid, tasks.items()):
        draw_window(row[0], name, found["picture"])
        for axes, kind in zip(row[1:], SHOWN):
            for arm, line in LINES.items():
                columns = list(zip(*(run["disturbed"][kind] for run in found["arms"][arm]), strict=True))
                sizes, low, high = record["sizes"][kind], [*map(min, columns)], [*map(max, columns)]
                axes.plot(sizes, [mean(list(column)) for column in columns], "o-", markersize=3, **line)
                axes.fill_between(sizes, low, high, color=line["color"], alpha=0.2, lw=0)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_title(kind, fontsize=9, loc="left")
        row[1].set_ylabel("forecasting loss", fontsize=8)
    for axes in grid[-1, 1:]:
        axes.set_xlabel("size of the disturbance", fontsize=8)
    grid[-1, 0].set_xlabel("point of the window", fontsize=8)
    grid[0, 0].legend(frameon=False, fontsize=7, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.08))
    for axes in grid.flat:
        axes.tick_params(labelsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=85, format="png")
    plt.close(figure)
    return buffer.getvalue()


def draw_window(axes: Any, name: str, picture: dict[str, list[float]]) -> None:
    points = range(128 - len(picture["truth"]), 128)
    axes.plot(points, picture["truth"], color="0.2", lw=1.6, label="truth")
    axes.plot(points, picture["base"], color="0.65", lw=1, ls=":", label="base")
    for arm, line in LINES.items():
        axes.plot(points, picture[arm], **line)
    low, high = min(picture["truth"]), max(picture["truth"])
    axes.set_ylim(low - 0.5 * (high - low), high + 0.5 * (high - low))
    axes.set_ylabel(name, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


# --- docs/forecast.md -------------------------------------------------------------------------------------------------


def described(found: dict[str, Any]) -> str:
    """The mean of the differences, the lowest and the highest, and a star where it is a finding."""
    low, high = min(found["differences"]), max(found["differences"])
    return f"{found['mean']:+.3f} [{low:+.3f}, {high:+.3f}]" + "*" * found["finding"]


def verdict(record: dict[str, Any]) -> str:
    """Counts of findings, for better and for worse, over tasks and inputs."""
    losses = [(f"{name} ({key})", found) for name, key, found in changes(record) if key in ("loss", *SHOWN)]
    better = [where for where, found in losses if found["finding"] and found["mean"] < 0]
    worse = [where for where, found in losses if found["finding"] and found["mean"] > 0]

    def listed(which: list[str]) -> str:
        return f"{len(which)}{': ' if which else ''}{', '.join(which)}"

    falls = [
        found["mean"] / mean([run["trace"] for run in record["tasks"][name]["arms"]["none"]])
        for name, key, found in changes(record)
        if key == "trace"
    ]
    return (
        f"The barrier lowers the mean attention trace by {-max(falls):.0%} to {-min(falls):.0%}. Of {len(losses)} comparisons "
        "of loss, on clean and on disturbed inputs of each task, those that are findings for the barrier are "
        f"{listed(better)}; against it {listed(worse)}. That it makes forecasts better or more robust is not established. "
        f"Tasks on which repeating the last value has a smaller error than what was trained: {listed(naive_wins(record))}."
    )


def naive_wins(record: dict[str, Any]) -> list[str]:
    """Tasks on which the last value beats both."""
    return [
        name
        for name, found in record["tasks"].items()
        if found["last_value_error"] < min(mean([run["error"] for run in found["arms"][arm]]) for arm in ("none", "barrier"))
    ]


def introduction(record: dict[str, Any]) -> str:
    settings, where = record["settings"], record["environment"]
    trained = next(iter(record["tasks"].values()))["trained"]
    return (
        "A causal time-series transformer of 34,768 parameters, built like Toto (fused wQKV, time-wise and space-wise layers), "
        f"pre-trained on sums of two sinusoids. `{settings['variant']}` (r {settings['r']}, alpha {settings['alpha']:g}, "
        f"{trained:,} numbers) on {', '.join(f'`{target}`' for target in record['targets'])} is trained for "
        f"{settings['steps']} steps of {settings['batch']} windows at {settings['lr']:g}, with seeds "
        f"{', '.join(map(str, settings['seeds']))}. {where['threads']} CPU thread{'s' * (where['threads'] > 1)}, torch "
        f"{where['torch']}, {record['wall_seconds'] / 60:.0f} minutes in all. Figures are of held-out windows. sawtooth is "
        "generated. The others are real series that ship with statsmodels, the last quarter of which is held out; windows are "
        "standardised by their first 96 points and scored on the last 32, one patch of 8 ahead."
    )


def legend(record: dict[str, Any]) -> str:
    return (
        'Barrier: none; `barrier` is AttentionBarrier(alpha="auto", soft=True, eps=.01, '
        f"weight={record['settings']['barrier']:g}); `defaults` is AttentionBarrier(), the original's; `tight` has 40 times "
        "the automatic alpha at the same weight (soft with eps .1). Base: the model before training. Last value: the last "
        "point of the patch before, repeated. Loss: .575 negative log-likelihood + .425 ln(1 + (error / .1)^2 / 2). Error: "
        "mean absolute. Trace: mean over time-wise layers, heads and patches. Beyond: share of positions with 1 - alpha trace "
        f"< eps. The last columns are losses on disturbed inputs against clean points: {SIZES}. The plot has all "
        "sizes, shaded from the lowest to the highest seed."
    )


DIFFERENCES = (
    "With the barrier less without, seed by seed: mean, lowest and highest. * marks a finding: at least six seeds, and p below "
    ".05 in a paired t test and in the exact sign-flip test, without correction for the number of comparisons."
)


def page(record: dict[str, Any]) -> str:
    """docs/forecast.md."""
    keys = list(dict.fromkeys(key for _, key, _ in changes(record)))
    lines = [
        "# Forecasting with and without an attention barrier",
        "",
        "Generated by `just table` from [the record](../benchmarks/results/forecast.json) of `just forecast`; how to use the",
        "barrier stands in the [guide](guide/forecast.md).",
        "",
        *textwrap.wrap(introduction(record), 120, break_on_hyphens=False),
        "",
        *textwrap.wrap(verdict(record), 120, break_on_hyphens=False),
        "",
        "![Forecasts of a held-out window, and loss over disturbances of the inputs](forecast.png)",
        "",
        *textwrap.wrap(legend(record), 120, break_on_hyphens=False),
        "",
        f"| {' | '.join(HEADS)} |",
        "|---|---|" + "--:|" * (len(HEADS) - 2),
        *(f"| {' | '.join(cells)} |" for cells in rows(record)),
        "",
        "## Changes by the barrier",
        "",
        *textwrap.wrap(DIFFERENCES, 120, break_on_hyphens=False),
        "",
        f"| task | {' | '.join(keys)} |",
        "|---|" + "--:|" * len(keys),
    ]
    for name in record["tasks"]:
        lines.append(f"| {name} | {' | '.join(described(found) for task, _, found in changes(record) if task == name)} |")
    return "\n".join(lines) + "\n"
