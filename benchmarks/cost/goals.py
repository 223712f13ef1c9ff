"""What the record of bench-cost is held against: the goals, ratios with their spread, and whether a goal is met."""

import statistics
from typing import Any, NamedTuple


def pairs(row: dict[str, Any], subject: str, measure: str, beside: str = "bare") -> list[float]:
    """A subject's measure over that of another, of every round in which both were measured; [] where one is missing."""
    ours, other = row.get(subject, {}).get(measure), row.get(beside, {}).get(measure)
    if ours is None or other is None:
        return []
    rounds = min((len(values) for values in (ours, other) if isinstance(values, list)), default=1)
    ours, other = ((v if isinstance(v, list) else [v] * rounds) for v in (ours, other))
    return [a / b for a, b in zip(ours, other)]


def ratio(row: dict[str, Any], subject: str, measure: str, beside: str = "bare") -> float | None:
    found = pairs(row, subject, measure, beside)
    return statistics.median(found) if found else None


def unsteady(row: dict[str, Any], subject: str, measure: str, beside: str) -> bool:
    """Whether the middle half of the rounds spreads over more than a tenth of the median."""
    if not pairs(row, subject, measure, beside):
        return False
    low, middle, high = spread(row, subject, measure, beside)
    return high - low > 0.1 * middle


def cell(row: dict[str, Any], subject: str, measure: str, beside: str) -> str:
    value = ratio(row, subject, measure, beside)
    return "-" if value is None else f"{'~' * unsteady(row, subject, measure, beside)}{value:.2f}"


def label(row: dict[str, Any]) -> str:
    return row["variant"] + ("" if row["mode"] == "eager" else f", {row['mode']}")


class Goal(NamedTuple):
    """What was asked of a method: a ratio of ours, at most `most`, on every model of these."""

    variants: tuple[str, ...]
    measure: str
    beside: str
    most: float
    models: tuple[str, ...] = ("d512", "d1024")


GOALS = (
    Goal(("lora", "ia3", "road", "delora", "vera", "loha", "lokr"), "step", "peft", 1.0),
    Goal(("pissa", "corda", "olora"), "step", "peft", 1.05),
    Goal(("dora", "oft"), "step", "peft", 0.85),
    Goal(("dora",), "forward", "peft", 0.75),
    Goal(("hra", "boft"), "step", "peft", 0.25),
    Goal(("randlora",), "step", "peft", 0.7),
    Goal(("lora",), "forward", "bare", 1.08, ("d1024",)),
    Goal(("ia3", "antipasto_ablate"), "forward", "bare", 1.03, ("d1024",)),
)


class StartGoal(NamedTuple):
    """The same of one figure of attaching (rows and large of the record) or of the part start."""

    part: str
    row: str
    ours: str
    beside: str
    most: float


START_GOALS = (
    *(StartGoal("rows", name, "seconds", "peft", 0.35) for name in ("pissa", "olora", "antipasto", "antipasto_corda")),
    StartGoal("rows", "pissa_fast", "seconds", "peft", 0.1),
    StartGoal("rows", "corda", "seconds", "peft", 0.25),
    StartGoal("rows", "corda", "peak_bytes", "peft", 0.4),
    StartGoal("large", "pissa_fast", "peak_bytes", "model_bytes", 0.25),
    StartGoal("large", "corda", "peak_bytes", "model_bytes", 0.25),
    StartGoal("start", "attach", "lora", "peft", 1.0),
    StartGoal("start", "load", "lora", "read_bytes", 1.5),
)


KEPT = {"dora": True, "hra": False}
"""Whose bytes kept for backward are held against lora's; True: and the outputs that it stretches, whose gradient needs them."""
KEPT_MOST = 1.2

GOALS_READ = (
    "What the project set out to reach, with the quartiles of the turns, and the limit beside the same: a goal below the "
    "limit asks for less time than the bare model and the method's own multiply-adds and bytes take here. Within the spread: "
    "the median misses the goal and a quarter of the turns or more keep it. Products: multiply-adds beyond the bare "
    "model's, ours over PEFT's. Kept beside lora's are bytes beyond the bare model's."
)


def spread(row: dict[str, Any], subject: str, measure: str, beside: str) -> tuple[float, float, float]:
    """Quartiles of the rounds' ratios."""
    return quartiles(pairs(row, subject, measure, beside))


def quartiles(found: list[float]) -> tuple[float, float, float]:
    low, _, high = statistics.quantiles(found, n=4) if len(found) > 1 else (found[0],) * 3
    return low, statistics.median(found), high


def controlled(record: dict[str, Any]) -> str:
    """What the turns can tell apart, "" in records without a control."""
    found = {name: quartiles(ratios["step"]) for name, ratios in record.get("control", {}).items()}
    shown = ", ".join(f"{mid:.2f} [{low:.2f}, {high:.2f}] ({name})" for name, (low, mid, high) in found.items())
    return f"Control, a step of two copies of the bare model, one over the other in the same turns: {shown}." if found else ""


def verdict(medians: list[float], lows: list[float], most: float) -> str:
    if max(medians) <= most + 0.005:
        return "yes"
    return "within the spread" if max(lows) <= most else "no"


def kept(record: dict[str, Any]) -> list[str]:
    """The row of the goal that no method keeps more bytes for backward than PEFT's."""
    found = [(value, row) for row in record["rows"] if (value := ratio(row, "ours", "saved_bytes", "peft")) is not None]
    above = [f"{value:.2f} (`{label(row)}`, {row['model']})" for value, row in found if value > 1.005]
    shown = ", ".join(above) or f"{max((value for value, _ in found), default=0.0):.2f}"
    lines = (
        [f"| all with a peer | kept / PEFT | 1.00 | at most {shown} | - | - | {'no' if above else 'yes'} |"] if found else []
    )
    return lines + [line for name in KEPT if (line := kept_beside_lora(record, name))]


def kept_beside_lora(record: dict[str, Any], name: str) -> str:
    """The row of the goal of the bytes that a method keeps above the bare model, "" where one of the two was not measured."""
    rows = {(row["variant"], row["model"]): row for row in record["rows"] if row["mode"] == "eager"}
    values = {}
    for (variant, model), row in rows.items():
        if variant != name or ("lora", model) not in rows:
            continue
        work = row["extra"]
        outputs = (3 * work["forward"]["bytes"] - work["step"]["bytes"]) // 2  # see `limit.moved_bytes`
        bare = row["bare"]["saved_bytes"]
        allowed = rows["lora", model]["ours"]["saved_bytes"] - bare + KEPT[name] * outputs
        values[model] = (row["ours"]["saved_bytes"] - bare) / allowed
    if not values:
        return ""
    beside = "lora's and the outputs" if KEPT[name] else "lora's"
    shown = ", ".join(f"{value:.2f} ({model})" for model, value in values.items())
    met = verdict([*values.values()], [*values.values()], KEPT_MOST)
    return f"| `{name}` | kept / {beside} | {KEPT_MOST:.2f} | {shown} | - | - | {met} |"


def started(record: dict[str, Any]) -> list[str]:
    """Rows of the goals of attaching and loading."""
    lines = []
    for goal in START_GOALS:
        rows = record.get("start", []) if goal.part == "start" else record.get("attach", {}).get(goal.part, [])
        for row in rows:
            if row.get("case", row.get("measure")) != goal.row:
                continue
            if goal.part == "start":
                value, what = (
                    row["ours"]["median"] / row[goal.beside]["median"],
                    {"peft": "PEFT", "read_bytes": "reading"}[goal.beside],
                )
                lines.append(goal_line(goal.ours, f"{goal.row} / {what}", goal.most, value))
            elif goal.beside in row or goal.beside in row["ours"]:
                beside = row[goal.beside][goal.ours] if goal.beside in row else row["ours"][goal.beside]
                what = {"seconds": "attach", "peak_bytes": "memory of attach"}[goal.ours]
                other = "PEFT" if goal.beside in row else f"model of {row['blocks']} 8B blocks"
                lines.append(goal_line(goal.row, f"{what} / {other}", goal.most, row["ours"][goal.ours] / beside))
    return lines


def goal_line(name: str, what: str, most: float, value: float) -> str:
    return f"| `{name}` | {what} | {most:.2f} | {value:.2f} | - | - | {verdict([value], [value], most)} |"


def products(row: dict[str, Any], measure: str) -> str:
    """Multiply-adds of our method over those of PEFT's, beyond the bare model's."""
    theirs = row["peft"].get("multiply_adds", {}).get(measure)
    return f"{row['extra'][measure]['multiply_adds'] / theirs:.2f}" if theirs else "-"


def reached(record: dict[str, Any]) -> list[str]:
    """Rows of the table of goals: every goal whose rows the record has, with what the arithmetic leaves possible."""
    lines = []
    rows = {(row["variant"], row["model"]): row for row in record["rows"] if row["mode"] == "eager"}
    for goal in GOALS:
        for name in goal.variants:
            found = [(m, rows[name, m]) for m in goal.models if (name, m) in rows]
            found = [(m, row) for m, row in found if pairs(row, "ours", goal.measure, goal.beside)]
            if not found:
                continue
            beside = {"peft": "PEFT", "bare": "bare"}[goal.beside]
            ours = [spread(row, "ours", goal.measure, goal.beside) for _, row in found]
            measured = ", ".join(f"{mid:.2f} [{low:.2f}, {high:.2f}] ({m})" for (m, _), (low, mid, high) in zip(found, ours))
            limits = ", ".join(f"{cell(row, 'limit', goal.measure, goal.beside)} ({m})" for m, row in found)
            least = [ratio(row, "limit", goal.measure, goal.beside) or 0.0 for _, row in found]
            met = verdict([mid for _, mid, _ in ours], [low for low, _, _ in ours], goal.most)
            work = ", ".join(f"{products(row, goal.measure)} ({m})" for m, row in found) if goal.beside == "peft" else "-"
            beyond = ", and below the limit" if met == "no" and max(least) > goal.most else ""
            lines.append(
                f"| `{name}` | {goal.measure} / {beside} | {goal.most:.2f} | {measured} | {limits} | {work} | {met}{beyond} |"
            )
    return [*lines, *kept(record), *started(record)]
