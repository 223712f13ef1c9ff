"""What a record of the sequential suite shows: tables on the terminal and a plot. Every figure comes from the record."""

import io
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.sequential.measures import MEASURES
from benchmarks.sequential.summary import GOOD, good

Runs = list[dict[str, Any]]


def mean(found: list[float | None]) -> float | None:
    """None where a run has no such figure."""
    numbers = [value for value in found if value is not None]
    return sum(numbers) / len(numbers) if len(numbers) == len(found) and found else None


def number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else f"{value:{form}}"


def moments(record: dict[str, Any]) -> list[str]:
    return ["before", *(f"after {task}" for task in record["tasks"])]


def cell_of(runs: Runs, p: int, task: str, measure: str) -> float | None:
    return mean([run["rows"][p]["tasks"][task][measure] for run in runs])


def table(title: str, caption: str = "") -> Table:
    return Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,
    )


# --- terminal ---------------------------------------------------------------------------------------------------------


def matrix(record: dict[str, Any]) -> Table:
    """Every measure of every task before and after each phase; plain lora in brackets."""
    runs, peer, settings = record["runs"], record["peer"], record["settings"]
    made = table(
        f"{record['variant']}, {settings['model']}: {settings['steps']} steps of {settings['batch']} lines a phase, "
        f"lr {runs[0]['lr']:g}, {len(runs)} seed{'s' * (len(runs) > 1)}"
        + (f", objective {settings['objective']}" if settings["objective"] != "none" else ""),
        "NLL in nats of the line's and the answer's tokens, lead of the answer's first value; acc: answers written exactly; "
        "intrusion: first task's prompts answered as the conflicting task does; held-out entities"
        + (f"; in brackets plain {peer['variant']}" if peer else ""),
    )
    for head in ("task", "measure", "good"):
        made.add_column(head, no_wrap=True)
    for moment in moments(record):
        made.add_column(moment.replace(" ", "\n"), justify="right", no_wrap=True)

    def row(name: str, measure: str, figures: Any) -> None:
        cells = []
        for p in range(len(record["tasks"]) + 1):
            beside = f" ({number(figures(peer['runs'], p))})" if peer else ""
            cells.append(number(figures(runs, p)) + beside)
        made.add_row(name, measure, GOOD[measure], *cells)

    for task in record["tasks"]:
        for k, measure in enumerate(MEASURES):
            row(task if k == 0 else "", measure, lambda of, p: cell_of(of, p, task, measure))  # noqa: B023
        made.add_section()
    row("", "intrusion", lambda of, p: mean([run["rows"][p]["intrusion"] for run in of]))
    return made


def difference(found: dict[str, Any] | None) -> tuple[str, str]:
    """(mean paired difference and its interval, p) of a statistic."""
    if not found or found["mean"] is None:
        return "", ""
    text = f"{found['mean']:+.3f}"
    if found["interval"]:
        text += f" [{found['interval'][0]:+.3f},{found['interval'][1]:+.3f}]"
    if found["p"] is None:
        return text, ""
    return text, ("<.001" if found["p"] < 0.001 else f"{found['p']:.3f}") + " *" * found["finding"]


def compared(made: Table, peer: dict[str, Any] | None, of: str = "") -> None:
    """Columns for what `difference` says: the first is the one that a narrow terminal breaks."""
    if peer:
        made.add_column(f"{of}less {peer['variant']}", justify="right")
        made.add_column("p", justify="right", no_wrap=True)


def metrics(record: dict[str, Any]) -> Table:
    runs, peer = record["runs"], record["peer"]
    caption = "means over seeds; loss metrics in nats"
    if peer:
        caption += (
            f"; less plain {peer['variant']}: paired difference, 95 % t interval, p; * a finding, uncorrected for many figures"
        )
    made = table("metrics, each from its measure", caption)
    made.add_column("metric", no_wrap=True)
    made.add_column("good", no_wrap=True)
    for measure in MEASURES:
        made.add_column(measure, justify="right", no_wrap=True)
    compared(made, peer, "answer, ")
    for name in runs[0]["metrics"]["line"]:
        cells = [number(mean([run["metrics"][m].get(name) for run in runs]), "+.3f") for m in MEASURES]
        made.add_row(name, good(name), *cells, *(difference(record["paired"].get(f"answer.{name}")) if peer else ()))
    return made


def routes(record: dict[str, Any]) -> Table | None:
    """Composed adapters beside the sequence: what they keep of every task, and what that costs."""
    runs, tasks = record["runs"], list(record["tasks"])
    if not runs[0].get("routes"):
        return None
    names = [f"interference_{x}" for x in "ab"] + ["learning_c"] if len(tasks) == 3 else ["forgetting_a", "learning_b"]
    chosen = [run["oracle"] for run in runs if run["oracle"]]
    gains = [f"{number(mean([found['gains'][name] for found in chosen]))} {name}" for name in "ABC"] if chosen else []
    made = table(
        "routes: sums of the phases' increments",
        "answer NLL; frontier: ll.frontier, 0 for the sequence itself"
        + (f"; by score: {' '.join(gains)}, chosen on half of the held-out lines and shown on the other" if chosen else ""),
    )
    made.add_column("route", no_wrap=True)
    for head in (*(f"acc {task.partition('_')[0]}" for task in tasks), *names, "frontier"):
        made.add_column("\n".join(head.rsplit("_", 1)), justify="right", no_wrap=True)

    def row(name: str, of: Runs) -> None:
        cells = [mean([part["row"]["tasks"][task]["acc"] for part in of]) for task in tasks]
        cells += [mean([part["metrics"][metric] for part in of]) for metric in names]
        made.add_row(name, *map(number, cells), number(mean([part["frontier"] for part in of]), "+.2f"))

    row("the sequence", [{"row": r["rows"][-1], "metrics": r["metrics"]["answer"], "frontier": 0.0} for r in runs])
    for k, route in enumerate(runs[0]["routes"]):
        row(route["route"], [run["routes"][k] for run in runs])
    if chosen:
        row("by score", chosen)
    return made


def geometry(record: dict[str, Any]) -> Table:
    runs, peer = record["runs"], record["peer"]
    made = table("geometry of held-out lines of the last task", "delta cosines: of the phases' increments, mean over modules")
    for head in ("figure", "good", "base", "after the\nlast phase"):
        made.add_column(head, justify="left" if head in ("figure", "good") else "right", no_wrap=True)
    compared(made, peer)
    for name in runs[0]["geometry"]["after"]:
        cells = [number(mean([run["geometry"][w].get(name) for run in runs]), ".3f") for w in ("before", "after")]
        made.add_row(name, good(name), *cells, *(difference(record["paired"].get(f"geometry.{name}")) if peer else ()))
    for name in runs[0].get("delta_cosines", {}):
        value = number(mean([run["delta_cosines"][name] for run in runs]), "+.3f")
        made.add_row(name, "-", "", value, *(difference(record["paired"].get(name)) if peer else ()))
    return made


def show(record: dict[str, Any], console: Console) -> None:
    for made in (matrix(record), metrics(record), routes(record), geometry(record)):
        if made is not None:
            console.print(made, "")
    if "joint" in record["runs"][0]:
        tasks = record["tasks"]
        accuracy = ", ".join(f"{t} {number(mean([r['joint']['tasks'][t]['acc'] for r in record['runs']]))}" for t in tasks)
        console.print(f"Trained on all tasks at once, acc: {accuracy}.")
    console.print(record["verdict"]["text"], style="bold", soft_wrap=True)


# --- plot -------------------------------------------------------------------------------------------------------------

PANELS = {"lead": "loss of the answer's first value,\nnats", "acc": "answers written exactly"}


def curves(runs: Runs, task: str, measure: str, places: int) -> list[list[float]]:
    """[run][place]: a measure before and after every phase, and on the first route where that has a place and exists."""
    rows = [[*run["rows"], *(route["row"] for route in run.get("routes", ())[:1])] for run in runs]
    return [[row["tasks"][task][measure] for row in of[:places]] for of in rows]


def ticks(record: dict[str, Any]) -> list[str]:
    labels = [moment.replace(" ", "\n").replace("_", "\n") for moment in moments(record)]
    first = record["runs"][0].get("routes", ())[:1]
    return [*labels, *(f"route\n{route['route']}".replace("B+", "B\n+") for route in first)]


def panel(axes: Any, groups: list[tuple[str, Runs, str, float]], task: str, measure: str, phases: int, places: int) -> None:
    """Means over the seeds as thick lines, single seeds as thin ones; a route is a hollow mark behind the last phase."""
    for name, runs, colour, width in groups:
        found = curves(runs, task, measure, places)
        for curve in found if len(found) > 1 else ():
            axes.plot(range(phases + 1), curve[: phases + 1], color=colour, lw=0.7, alpha=0.35)
        means = [sum(place) / len(place) for place in zip(*found)]
        style: dict[str, Any] = {"color": colour, "lw": width, "markersize": 3 + width, "clip_on": False}
        axes.plot(range(phases + 1), means[: phases + 1], "o-", label=name, **style)
        if len(means) > phases + 1:
            axes.plot((phases, phases + 1), means[phases:], ":", **style)
            axes.plot(phases + 1, means[-1], "o", markerfacecolor="white", **style)
    axes.spines[["top", "right"]].set_visible(False)


def drawn(record: dict[str, Any]) -> Figure:
    """A column per task, scored before and after every phase: loss above, accuracy below; this variant beside plain lora."""
    tasks, settings, peer = list(record["tasks"]), record["settings"], record["peer"]
    objective = "" if settings["objective"] == "none" else f" + {settings['objective']}"
    groups = [(f"plain {peer['variant']}", peer["runs"], "0.65", 4.5)] if peer else []
    groups.append((f"{record['variant']}{objective}", record["runs"], "C0", 2.0))
    figure = Figure(figsize=(1.2 + 3.6 * len(tasks), 6), layout="constrained")
    panels = figure.subplots(2, len(tasks), sharex=True, sharey="row", squeeze=False)
    for column, task in enumerate(tasks):
        for line, measure in enumerate(PANELS):
            panels[line][column].axvspan(column + 0.5, column + 1.5, color="C1", alpha=0.12, lw=0)
            panel(panels[line][column], groups, task, measure, len(tasks), len(ticks(record)))
            panels[line][0].set_ylabel(PANELS[measure])
        panels[0][column].set_title(f"scored on {task}", fontsize=11)
        panels[1][column].set_xticks(range(len(ticks(record))), ticks(record), fontsize=9)
        panels[1][column].annotate(
            "trained here", (column + 1, 0.5), ha="center", va="center", rotation=90, color="C1", fontsize=9, alpha=0.9
        )
    panels[0][0].set_ylim(bottom=0)  # of a whole row, and once every panel has its curves: a limit ends the scaling
    panels[1][0].set_ylim(-0.05, 1.05)
    figure.legend(*panels[0][0].get_legend_handles_labels(), frameon=False, fontsize=9, ncols=2, loc="outside upper right")
    seeds = len(record["runs"])
    head = f"{settings['steps']} steps for each, model {settings['model']}, {seeds} seed{'s' * (seeds > 1)}"
    figure.suptitle(f"One adapter, one task after the other: {head}", x=0.01, ha="left", fontsize=11)
    return figure


def plot(record: dict[str, Any]) -> bytes:
    """The drawing as PNG."""
    buffer = io.BytesIO()
    drawn(record).savefig(buffer, dpi=130, format="png")
    return buffer.getvalue()
