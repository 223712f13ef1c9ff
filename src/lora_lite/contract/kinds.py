"""One check of kinds for every option: what an annotation of a config's field takes, and what is made of lists and of names."""

import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

import torch

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)}
"""What an adapter's numbers may be. Names come from files: none is looked up among torch's attributes."""
OTHER_NAMES = {"float": torch.float32, "double": torch.float64, "half": torch.float16}
UNIONS = (Union, types.UnionType)


def normalised(value: Any, hint: Any) -> Any:
    """Lists become tuples, one name becomes a tuple of it, dtype names become dtypes, integers become floats where asked."""
    options = typing.get_args(hint) if typing.get_origin(hint) in UNIONS else (hint,)
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and torch.dtype in options:
        return (DTYPES | OTHER_NAMES).get(value, value)
    literals = [v for o in options if typing.get_origin(o) is Literal for v in typing.get_args(o)]
    if isinstance(value, str) and value not in literals and any(typing.get_origin(o) is tuple for o in options):
        return (value,)
    if isinstance(value, int) and not isinstance(value, bool) and float in options and int not in options:
        return float(value) if abs(value) < LARGEST else value
    return dict(value) if isinstance(value, Mapping) else value


LARGEST = 3e38
"""Of a number that float32 holds: a scale above it is infinite in every product."""


def bounds(value: Any, name: str) -> str:
    """The bounds that a number breaks, in words; "" where it keeps them. Texts, tables and what is no number have none."""
    if isinstance(value, float):
        return "" if abs(value) <= LARGEST else "a finite number"
    if isinstance(value, int) and not isinstance(value, bool):
        most = 2**64 if name == "seed" else 2**16 if name in ("r", "rank_pattern") else 2**31
        return "" if abs(value) <= most else f"a number of at most {most}"
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    return next(filter(None, (bounds(one, name) for one in inner)), "")


def accepts(value: Any, hint: Any) -> bool:
    """Whether `value` is of the kind that the annotation says; unions, literals, tuples and dicts are looked into."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in UNIONS:
        return any(accepts(value, option) for option in args)
    if origin is Literal:
        return any(value is option or (type(value) is type(option) and value == option) for option in args)
    if origin is tuple:
        return isinstance(value, tuple) and all(accepts(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(accepts(k, args[0]) and accepts(v, args[1]) for k, v in value.items())
    if hint in (int, float):
        return isinstance(value, hint) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def readable(hint: Any) -> str:
    """The annotation as words for an error."""
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) in UNIONS:
        return " or ".join(readable(option) for option in typing.get_args(hint))
    if hint is types.NoneType:
        return "None"
    return getattr(hint, "__name__", str(hint)) if typing.get_origin(hint) is None else str(hint)
