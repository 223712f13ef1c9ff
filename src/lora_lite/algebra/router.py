"""route: choose a gain for each group of layers by a score, one group after the other; frontier: what a choice is worth."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ..core import coefficients, finding
from ..errors import LoraLiteError
from ..sites.model import unwrapped

Kind = Literal["layer", "module", "adapter"]


@dataclass(frozen=True)
class Routing:
    """Chosen gains {group: gain}, the score of every try {group: {gain: score}}, and the data kept back for the report."""

    bank: nn.Module
    kind: Kind
    gains: dict[str, float]
    scores: dict[str, dict[float, float]]
    report: Any

    def scale(self) -> coefficients.Scaling:
        """Set the chosen gains; as a context manager it puts the old coefficients back on leaving."""
        return scaled(self.bank, self.kind, self.gains)

    def measure(self, metric: Callable[[Any], Any]) -> Any:
        """metric(report) under the chosen gains."""
        with self.scale():
            return metric(self.report)


def route(
    bank: nn.Module,
    groups: Kind = "layer",
    grid: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    *,
    score: Callable[[Any], float],
    select: Any,
    report: Any,
) -> Routing:
    """Greedy choice of one gain per group, from all ones, in natural order: the gain of the highest score(select) stays.

    bank    a model with adapters; on return its coefficients are as they were
    groups  what shares a gain: a numbered block, a module, or an adapter by its name
    grid    gains to try, 1 among them; a tie keeps the present one. `score` is called exactly groups x grid times
    report  data that no score sees, for `Routing.measure`; another object than `select`

    Raises LoraLiteError before the first call for a grid without 1 or not finite, an unknown kind and data given twice, and
    for a score that is NaN.
    """
    if groups not in ("layer", "module", "adapter"):
        raise LoraLiteError(
            f"There are no groups {groups!r}.", expected="'layer', 'module' or 'adapter'.", fix='groups="layer"'
        )
    if 1 not in grid or len(set(grid)) != len(grid) or not all(map(math.isfinite, grid)):
        raise LoraLiteError(f"grid={grid}", expected="Different finite gains, 1 among them.", fix="grid=(0.0, 0.5, 1.0)")
    if select is report:
        raise LoraLiteError(
            "select and report are the same object.",
            expected="A choice is reported on data that it was not made with.",
            fix="ll.route(bank, groups, grid, score=score, select=validation, report=test)",
        )
    names = sorted({group(found, groups) for found in finding.present(bank, None)}, key=natural)
    chosen, scores = dict.fromkeys(names, 1.0), {}
    for name in names:
        tried: dict[float, float] = {}
        for gain in grid:
            with scaled(bank, groups, {**chosen, name: gain}):
                tried[float(gain)] = float(score(select))
        if unknown := [gain for gain, value in tried.items() if math.isnan(value)]:
            raise LoraLiteError(
                f"The score of {name} at gain {unknown[0]:g} is NaN.",
                expected="Numbers that can be compared; -inf is never chosen before another.",
                fix="score=lambda data: -math.inf if math.isnan(value := metric(data)) else value",
            )
        best = max(tried.values())
        chosen[name] = 1.0 if tried[1.0] == best else next(gain for gain, value in tried.items() if value == best)
        scores[name] = tried
    return Routing(bank, groups, chosen, scores, report)


def group(found: finding.Found, kind: Kind) -> str:
    """The name of its block, its own path, or its adapter's name."""
    block = re.match(r"(?:.*?\.)??[0-9]+(?=\.|$)", found.path)
    return found.name if kind == "adapter" else block[0] if kind == "layer" and block else found.path


def natural(name: str) -> list[tuple[bool, int, str]]:
    """Sorting key that puts layers.10 after layers.9."""
    return [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"([0-9]+)", name)]


def scaled(bank: nn.Module, kind: Kind, gains: Mapping[str, float]) -> coefficients.Scaling:
    found = finding.present(bank, None)
    return coefficients.Scaling(unwrapped(bank), coefficients.by_gain(found, lambda f: gains[group(f, kind)]))


def frontier(routed: Mapping[str, float], sequential: Mapping[str, float], *, centred: bool = True) -> float:
    """d accretion_a - d interference_a - d interference_b + d learning_c + d learning_b / 4, d = routed - sequential.

    Sequential accretion_a and learning_b are those before phase C, so the unchanged route would score - interference_a -
    interference_b / 4 of the sequence: `centred` subtracts that, and the unchanged route scores 0.
    """
    d = {key: routed[key] - sequential[key] for key in routed}
    raw = d["accretion_a"] - d["interference_a"] - d["interference_b"] + d["learning_c"] + d["learning_b"] / 4
    return raw + (sequential["interference_a"] + sequential["interference_b"] / 4 if centred else 0.0)
