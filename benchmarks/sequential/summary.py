"""What follows from the runs of a sequential record: paired statistics, of routes too, and a verdict."""

import math
from collections.abc import Iterable, Mapping
from statistics import fmean as mean
from typing import Any

from benchmarks.common.statistics import CLAIM, paired
from benchmarks.sequential.tasks import contradicts

WEAK = 1.0  # nats that the conflicting task must add to the first value of A's answer, for plain lora
GOOD = {
    "learning": "higher",
    "forward": "higher",
    "forgetting": "lower",
    "accretion": "higher",
    "interference": "lower",
    "retention": "higher",
    "frontier": "higher",
    "line": "lower",
    "answer": "lower",
    "lead": "lower",
    "acc": "higher",
    "intrusion": "lower",
    "eff_rank": "higher",
    "sigma_ratio": "lower",
    "head_sim": "lower",
    "active_frac": "lower",
}
"""Which way is better, by the first word or the whole of a name."""


def good(name: str) -> str:
    """higher, lower, or - where neither is."""
    return GOOD.get(name, GOOD.get(name.partition("_")[0], "-"))


def figures(run: dict[str, Any]) -> dict[str, float]:
    """Every figure of a run under one name: answer.interference_a, end.A.acc, end.intrusion, geometry.eff_rank, ..."""
    end = run["rows"][-1]
    return {
        **{f"{measure}.{name}": value for measure, found in run["metrics"].items() for name, value in found.items()},
        **{f"end.{task}.{measure}": value for task, found in end["tasks"].items() for measure, value in found.items()},
        **({} if end["intrusion"] is None else {"end.intrusion": end["intrusion"]}),
        **{f"geometry.{name}": value for name, value in run["geometry"]["after"].items()},
        **run.get("delta_cosines", {}),
    }


def column(found: Iterable[Mapping[str, float | None]], name: str) -> list[float]:
    """One figure of every run; NaN where it has none."""
    return [math.nan if (value := figures.get(name)) is None else value for figures in found]


def rise(record: dict[str, Any]) -> list[float]:
    """What the last phase adds to the lead NLL of the first task, for plain lora, by seed."""
    runs = (record["peer"] or record)["runs"]
    first = next(iter(record["tasks"]))
    return [run["rows"][-1]["tasks"][first]["lead"] - run["rows"][-2]["tasks"][first]["lead"] for run in runs]


def verdict(record: dict[str, Any]) -> dict[str, Any]:
    """Whether the tasks were strong enough to tell anything, and what differs from plain lora by the rules of statistics.py."""
    plain = "lora" if record["peer"] is None else record["peer"]["variant"]
    first, *_, last = record["tasks"]
    harm, seeds, opposed = mean(rise(record)), len(record["runs"]), contradicts(last, first)
    rise_of = f"{harm:.2f} nats to the first value of {first}'s answer"
    found: dict[str, Any] = {"lead_rise": harm, "strong": opposed and harm >= WEAK, "findings": []}
    if not opposed:
        return found | {"text": "The last task contradicts nothing: no verdict on forgetting."}
    if not found["strong"]:
        return found | {"text": f"Too weak, no verdict: the last task adds {rise_of}, less than {WEAK:g}."}
    text = f"Strong enough: for plain {plain} the last task adds {rise_of}."
    if not record["paired"]:
        return found | {"text": text}
    if seeds < CLAIM:
        return found | {"text": f"{text} Differences are shown; nothing is claimed below {CLAIM} seeds."}
    found["findings"] = [name for name, result in record["paired"].items() if result["finding"]]
    return found | {"text": f"{text} {len(found['findings'])} of {len(record['paired'])} figures differ from plain {plain}."}


def against_sequence(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{route: {figure: paired difference to the sequence itself}}, in answer NLL."""
    found: dict[str, dict[str, Any]] = {}
    runs = [run for run in record["runs"] if run.get("routes")]
    for k, route in enumerate(runs[0]["routes"] if runs else ()):
        ours, theirs = [run["routes"][k]["metrics"] for run in runs], [run["metrics"]["answer"] for run in runs]
        found[route["route"]] = {name: paired(column(ours, name), column(theirs, name)) for name in ours[0]}
    return found


def lasting(value: Any) -> Any:
    """As a record keeps it: six significant digits, and None for a number that is not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: lasting(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [lasting(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def finished(record: dict[str, Any]) -> dict[str, Any]:
    """The record as it is kept, with everything that follows from its runs."""
    record = lasting(record)
    made = {**record, "paired": {}}
    if record["peer"]:
        ours, theirs = ([figures(run) for run in runs] for runs in (record["runs"], record["peer"]["runs"]))
        made["paired"] = {name: paired(column(ours, name), column(theirs, name)) for name in ours[0] if name in theirs[0]}
    made["routed"] = against_sequence(record)
    made["verdict"] = verdict(made)
    return lasting(made)
