"""Objectives from text, for command lines and records: 'gossip:5', 'gossip:5,tau=.5+l1:.1', 'combined'.

grammar   sum = term ('+' term)*     term = name [':' weight] (',' field '=' value)*
"""

import dataclasses
import re
from typing import Any

from ...errors import LoraLiteError, closest
from .barrier import AttentionBarrier
from .base import Objective, Sum, Summand
from .change import DeltaNorm
from .heads import HeadDiversity
from .hidden import L1, Gossip, Repulsion

KINDS: dict[str, type[Objective]] = {
    cls.name: cls for cls in (AttentionBarrier, HeadDiversity, Repulsion, L1, Gossip, DeltaNorm)
}
PRESETS = {
    "none": "",
    "sparse": "l1:.0005",
    "combined": "diversity:.01+repulsion:.01+l1:.0002",
}
"""Names that stand for a text; every kind of objective is also one, with its defaults."""

TERM = re.compile(r"\s*(?P<name>\w+)\s*(?::(?P<weight>[^,]*))?(?P<fields>,.*)?")
EXAMPLE = "gossip:5,tau=.5+l1:.1"


def names() -> list[str]:
    """What `parse` knows."""
    return sorted({*KINDS, *PRESETS})


def parse(text: str) -> Summand:
    """The objective that a text names; 'none' is a sum without terms.

    Raises LoraLiteError for an unknown name, an unknown field and a value that the field does not take.
    """
    if not isinstance(text, str):
        raise LoraLiteError(
            f"{text!r} is no text.", expected="name:weight,field=value, joined by +.", fix=f"parse({EXAMPLE!r})"
        )
    parts = re.split(r"\+(?=\s*[A-Za-z_])", text) if text.strip() else [""]
    found = [term(part) for part in parts]
    return found[0] if len(found) == 1 else Sum([t for summand in found for t in summand.terms])


def term(text: str) -> Summand:
    match = TERM.fullmatch(text)
    if match is None:
        raise LoraLiteError(f"{text!r} is no objective.", expected="name:weight,field=value.", fix=EXAMPLE)
    name, weight = match["name"], match["weight"]
    if name not in names():
        hints = dict.fromkeys((closest(name, names()), f"Known: {', '.join(names())}."))
        raise LoraLiteError(f"There is no objective {name!r}.", found=" ".join(hints), fix=EXAMPLE)
    pairs = [pair(name, field) for field in (match["fields"] or "").split(",")[1:]]
    if weight is not None:
        pairs.append(("weight", number(weight)))
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise LoraLiteError(
            f"{text.strip()!r} gives a field twice.", expected="Each once; what follows the colon is the weight.", fix=EXAMPLE
        )
    if name not in PRESETS:
        return KINDS[name](**fields)
    preset = parse(PRESETS[name]) if PRESETS[name] else Sum()
    if not fields:
        return preset
    if not isinstance(preset, Objective):
        raise LoraLiteError(f"{name!r} is a whole and takes no values.", fix=PRESETS[name] or "none")
    return dataclasses.replace(preset, **fields)


def pair(name: str, text: str) -> tuple[str, Any]:
    """(field, value) of 'field=value'."""
    field, equals, value = (part.strip() for part in text.partition("="))
    if not (field and equals and value):
        raise LoraLiteError(f"{text!r} is no field of {name!r}.", expected="field=value.", fix=EXAMPLE)
    return field, number(value)


def number(text: str) -> Any:
    """int, float or bool where the text is one, else the text; the objective itself checks kinds."""
    words = {"true": True, "false": False, "none": None}
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            pass
    return words.get(text.strip().lower(), text.strip())
