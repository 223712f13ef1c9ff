"""JSON that somebody else wrote: each key once, numbers finite and of a size, nesting of a depth; texts fit to be printed."""

import json
import math
from typing import Any, NoReturn

from ..errors import LoraLiteError

DIGITS = 20  # of an integer: 2^64 has 20
NAME = 256  # letters of a name
DEPTH, ENTRIES = 8, 2**16  # of a value that is passed on without a table that says what it holds
SHOWN = 80  # letters of a value in an error


def parsed(text: str | bytes | bytearray, what: str, fix: str = "") -> Any:
    """The value of a JSON text. Raises LoraLiteError, which begins with `what`, for what json.dumps would not have written."""
    try:
        text = text if isinstance(text, str) else text.decode()
        return json.loads(text, object_pairs_hook=table, parse_int=integer, parse_float=number, parse_constant=constant)
    except RecursionError as error:
        raise LoraLiteError(f"{what} is nested too deeply.", expected="JSON as json.dumps writes it.", fix=fix) from error
    except MemoryError as error:
        raise LoraLiteError(f"{what} does not fit into memory.", fix=fix) from error
    except (ValueError, TypeError) as error:
        raise LoraLiteError(f"{what} is no JSON: {printable(str(error))}.", fix=fix) from error


def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{shown(next(name for name in found if names.count(name) > 1))} stands in it twice")
    return found


def integer(text: str) -> int:
    if len(text.lstrip("-")) > DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def number(text: str) -> float:
    if not math.isfinite(found := float(text)):
        raise ValueError(f"{text[:SHOWN]} is no finite number")
    return found


def constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no finite number")


def refuse_boundless(value: Any, what: str, depth: int = DEPTH) -> None:
    """Raise LoraLiteError where a value holds tables in tables without end, or too many entries for what it is."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if len(inner) > ENTRIES or (inner and not depth):
        raise LoraLiteError(f"{what} is too large.", expected=f"At most {ENTRIES} entries, {DEPTH} levels deep.")
    for one in inner:
        refuse_boundless(one, what, depth - 1)


def is_name(value: Any, most: int = NAME) -> bool:
    """Whether it is a text of at most `most` letters that a terminal prints as they are."""
    return isinstance(value, str) and len(value) <= most and value.isprintable()


def is_count(value: Any, least: int = 0, most: int = 2**53) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def shown(value: object) -> str:
    """A value in an error: as Python writes it, cut short, without letters that steer a terminal."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def printable(text: str) -> str:
    """The text with escapes in the place of every letter that steers a terminal, line breaks among them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
