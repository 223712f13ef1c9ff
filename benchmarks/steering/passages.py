"""The text that `just steering` reads: places where a backquote is due, and those where it is not."""

import functools
import random
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import text
from benchmarks.steering.settings import CONTEXT, Steering

DUE, OTHERWISE = rb"(?<=[ \n(])`+(?=\w)", rb"(?<=[ \n(])[a-z]"


@functools.cache
def prose() -> dict[text.Part, bytes]:
    """The three parts, with no longer paragraph in two of them or twice in one."""
    known: set[str] = set()
    parts: tuple[text.Part, ...] = ("test", "validation", "train")
    made = {}
    for part in parts:
        documents = {name: passage for name, passage in text.prose(part == "test").items() if text.part_of(name) == part}
        made[part] = text.joined(text.without_paragraphs(documents, known))
    return made


def places(data: bytes, rule: bytes) -> list[int]:
    """Positions of the first bytes that the rule matches."""
    return [match.start() for match in re.finditer(rule, data)]


def rows_before(data: bytes, rule: bytes, count: int, settings: Steering) -> Tensor:
    """(count at most, length): the bytes before places that are drawn with the seed."""
    ends = [place for place in places(data, rule) if place >= settings.length]
    ends = random.Random(settings.seed).sample(ends, min(count, len(ends)))
    return torch.tensor([list(data[end - settings.length : end]) for end in ends])


def calibration_data(data: bytes, settings: Steering) -> dict[str, list[dict[str, Tensor]]]:
    """Batches of both classes, whose last bytes are those before a place."""
    rules = {"positive": DUE, "negative": OTHERWISE}
    drawn = {label: rows_before(data, rule, settings.calibration, settings) for label, rule in rules.items()}
    return {label: [{"input_ids": part} for part in rows.split(32)] for label, rows in drawn.items()}


@dataclass(frozen=True)
class Passages:
    """due, otherwise: rows before places of each kind; windows (n, window); counted: their scored bytes less those at DUE."""

    due: Tensor
    otherwise: Tensor
    windows: Tensor
    counted: Tensor
    source: dict[str, Any]

    @classmethod
    def of(cls, data: bytes, settings: Steering) -> "Passages":
        due, otherwise = (rows_before(data, rule, settings.places, settings) for rule in (DUE, OTHERWISE))
        starts = torch.linspace(0, len(data) - settings.window, min(settings.windows, len(data) // settings.window)).long()
        cut = starts[:, None] + torch.arange(settings.window)
        mark = torch.ones(len(data), dtype=torch.bool)
        mark[torch.tensor(places(data, DUE))] = False
        counted = mark[cut][:, CONTEXT:]
        source = {
            "bytes": len(data),
            "sha256": text.digest(data),
            "places_due": len(due),
            "places_otherwise": len(otherwise),
            "windows": len(cut),
            "counted_bytes": int(counted.sum()),
        }
        return cls(due, otherwise, torch.tensor(list(data))[cut], counted, source)
