"""Figures of the committed records of bench-sequential, by seed, and how a sentence gives them."""

import json
from collections.abc import Callable
from statistics import fmean as mean
from typing import Any

from benchmarks.common.places import RESULTS

FOLDER = RESULTS / "sequential"
Records = dict[str, dict[str, Any]]


def committed() -> Records:
    return {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}


def ends(record: dict[str, Any], task: str, measure: str, p: int = -1) -> list[float]:
    """A measure of one task after phase p, by seed; the last one by default."""
    return [run["rows"][p]["tasks"][task][measure] for run in record["runs"]]


def intrusions(record: dict[str, Any]) -> list[float]:
    return [run["rows"][-1]["intrusion"] for run in record["runs"]]


def of_metric(record: dict[str, Any], measure: str, name: str) -> list[float]:
    return [run["metrics"][measure][name] for run in record["runs"]]


def on_route(record: dict[str, Any], route: str, figure: Callable[[dict[str, Any]], float]) -> list[float]:
    return [figure(next(r for r in run["routes"] if r["route"] == route)) for run in record["runs"]]


def gains(record: dict[str, Any], figure: str) -> list[float]:
    return record["paired"][figure]["differences"]


def span(values: list[float], form: str = ".2f") -> str:
    """The mean, and lowest to highest over the seeds where they differ."""
    low, high, middle = (f"{v:{form}}" for v in (min(values), max(values), mean(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def cosines(record: dict[str, Any]) -> str:
    names = record["runs"][0]["delta_cosines"]
    return ", ".join(f"{name} {mean([run['delta_cosines'][name] for run in record['runs']]):+.3f}" for name in names)
