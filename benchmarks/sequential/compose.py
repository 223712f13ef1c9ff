"""What snapshots between phases tell: cosines of their changes, routes, gains chosen by a score. All sums are ll's own."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import lora_lite as ll
from benchmarks.sequential.measures import metrics
from lora_lite.algebra.mixture import linear
from lora_lite.algebra.snapshot import rebuilt
from lora_lite.core.delta import Change, change

NAMES = "ABC"
"""Of the phases in routes, by their place."""
GRID = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)


# --- cosines ----------------------------------------------------------------------------------------------------------


def increments(chain: Sequence[ll.Snapshot]) -> list[dict[str, Change]]:
    """What every phase added to each weight; the first counts from the base."""
    changes = []
    for taken in chain:
        adapters = rebuilt(taken)
        changes.append({path: change(layer, adapters[path]) for path, layer in taken.layers.items()})
    later = [
        {path: linear(path, [(1.0, after[path]), (-1.0, before[path])]) for path in after}
        for before, after in itertools.pairwise(changes)
    ]
    return [changes[0], *later]


def inner(x: Change, y: Change) -> float:
    """<dW_x, dW_y>; of low-rank changes trace((L_x^T L_y) (R_y R_x^T)), without a dense matrix."""
    if x.right is not None and y.right is not None:
        return float(((x.left.T @ y.left) * (x.right @ y.right.T)).sum())
    return float((x.dense() * y.dense()).sum())


@torch.no_grad()
def cosines(chain: Sequence[ll.Snapshot]) -> tuple[dict[str, float], dict[str, int]]:
    """({delta_cosine_a_b: mean over modules}, {delta_cosine_a_b: modules left out because a phase did not move them})."""
    steps, means, zeros = increments(chain), {}, {}
    for i, j in itertools.combinations(range(len(steps)), 2):
        name = f"delta_cosine_{NAMES[i]}_{NAMES[j]}".lower()
        norms = {
            path: math.sqrt(inner(steps[i][path], steps[i][path]) * inner(steps[j][path], steps[j][path])) for path in steps[i]
        }
        found = [inner(steps[i][path], steps[j][path]) / norm for path, norm in norms.items() if norm > 0]
        means[name] = sum(found) / len(found) if found else math.nan
        zeros[name] = len(norms) - len(found)
    return means, zeros


# --- routes -----------------------------------------------------------------------------------------------------------


Row = dict[str, Any]
Score = Callable[[nn.Module], Row]


def losses(rows: Sequence[Row], tasks: Sequence[str]) -> dict[str, float]:
    """Metrics in answer NLL."""
    return metrics([row["tasks"] for row in rows], tasks, "answer")


def with_last(rows: Sequence[Row], last: Row) -> list[Row]:
    """The sequence as if it had ended in another row: every metric then has the definition that it has for a sequence."""
    return [*rows[:-1], last]


def frontier(rows: Sequence[Row], last: Row, tasks: Sequence[str]) -> float:
    """ll.frontier of a row in the place of the last one, answer NLL; accretion of A and learning of B count what C undid."""
    found = losses(with_last(rows, last), tasks)
    at_end = {
        **found,
        "accretion_a": found["accretion_a"] - found["interference_a"],
        "learning_b": found["learning_b"] - found["interference_b"],
    }
    names = ("accretion_a", "interference_a", "interference_b", "learning_c", "learning_b")
    return ll.frontier({name: at_end[name] for name in names}, losses(rows, tasks))


def routed(
    model: nn.Module, chain: Sequence[ll.Snapshot], route: str, rows: Sequence[Row], score: Score, tasks: Sequence[str]
) -> dict[str, Any]:
    """Scores of the composed adapter, and the metrics of the sequence that ends in it."""
    phases = dict(zip(NAMES, chain))
    with ll.apply(model, ll.compose(route, chain=phases), name="route"):
        last = score(model)
    return {
        "route": ll.format_route(ll.parse_route(route, list(phases))),
        "row": last,
        "metrics": losses(with_last(rows, last), tasks),
        "frontier": frontier(rows, last, tasks) if len(tasks) == 3 else None,
    }


# --- gains by a score -------------------------------------------------------------------------------------------------


def replayed(model: nn.Module, chain: Sequence[ll.Snapshot], score: Score) -> list[Row]:
    """The rows of the sequence, from its snapshots."""
    rows = [score(model)]
    for taken in chain:
        with ll.apply(model, taken, name="replay"):
            rows.append(score(model))
    return rows


def oracle(
    model: nn.Module, chain: Sequence[ll.Snapshot], select: Score, report: Score, tasks: Sequence[str]
) -> dict[str, Any]:
    """One gain for each phase's increment: the best frontier on the lines of `select`; its worth on those of `report`."""
    rows = {score: replayed(model, chain, score) for score in (select, report)}
    parts = [{chain[0]: 1.0}, *({after - before: 1.0} for before, after in itertools.pairwise(chain))]
    names = [
        f"back_{k}" for k in reversed(range(len(parts)))
    ]  # ll.route goes by name: the last phase, which harms, comes first
    handles = [ll.apply(model, ll.compose(part), name=name) for name, part in zip(names, parts)]

    def worth(score: Score) -> float:
        return frontier(rows[score], score(model), tasks)

    found = ll.route(model, "adapter", GRID, score=worth, select=select, report=report)
    last = found.measure(lambda score: score(model))
    for handle in handles:
        handle.detach()
    return {
        "gains": {letter: found.gains[name] for letter, name in zip(NAMES, names)},
        "row": last,
        "metrics": losses(with_last(rows[report], last), tasks),
        "frontier": frontier(rows[report], last, tasks),
    }
