"""Patterns that choose places of a model by their paths: the one grammar of targets, exclude, rank_pattern, scale and commands.

A pattern is a row of whole names as in a module path, and fits wherever they follow one another in the path: "q_proj",
"layers.1", "mlp.experts". A name may be a range of numbers, both ends included ("layers.0-7", "layers.16-"), and * and ? stand
for any letters within one name. "re:..." is a regular expression, searched in the whole path. Where several patterns fit a
place, the longest counts.
"""

import functools
import math
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

from ..errors import LoraLiteError, some

T = TypeVar("T")
REGULAR = "re:"
FOREIGN = re.compile(r"[^\w.*?-]")  # a letter that no name of a module has and the grammar does not know
BETWEEN = re.compile(r"\s*[,|;]\s*|\s+")
NAME = re.compile(r"[\w*?-]+")


def exactly(path: str) -> str:
    """The pattern that fits this path alone."""
    return f"{REGULAR}^{re.escape(path)}$"


def fault(pattern: object) -> str:
    """What is wrong with a pattern, in words; "" where nothing is."""
    if not isinstance(pattern, str) or not pattern.removeprefix(REGULAR):
        return "a pattern is a text that is not empty"
    if pattern.startswith(REGULAR):
        try:
            re.compile(pattern.removeprefix(REGULAR))
        except (re.error, RecursionError, OverflowError) as error:
            return f"it is no regular expression ({error})"
        return ""
    if found := FOREIGN.search(pattern):
        return f"{found[0]!r} stands in no name"
    return "" if all(map(NAME.fullmatch, pattern.split("."))) else "it has an empty name"


def spellings(pattern: str) -> str:
    """Both ways to write what somebody may have meant by a pattern that is none."""
    bare = pattern.removeprefix(REGULAR) or "q_proj"
    names = ".".join(filter(None, re.sub(r"[^\w.*?-]+", "", bare.replace(r"\.", ".").replace(".*", "*")).split(".")))
    regular = bare if not fault(REGULAR + bare) else re.escape(bare)
    return f"{names or 'q_proj'!r}  # whole names of the path; or a regular expression: {REGULAR + regular!r}"


def several(field: str, patterns: Iterable[str]) -> str:
    """A field's patterns with those apart that commas or bars hold together in one text, as code; "" where there are none."""
    values = patterns if isinstance(patterns, Mapping) else dict.fromkeys(patterns)
    apart = {part: value for pattern, value in values.items() for part in BETWEEN.split(str(pattern)) if part}
    if len(apart) <= len(values) or any(map(fault, apart)):
        return ""
    return f"{field}={apart if isinstance(patterns, Mapping) else tuple(apart)}"


def fits(pattern: str, path: str) -> bool:
    """Whether a lawful pattern fits the path."""
    if pattern.startswith(REGULAR):
        return bool(regular(pattern).search(path))
    wanted, names = pattern.split("."), path.split(".")
    starts = range(len(names) - len(wanted) + 1)
    return any(all(map(fits_name, wanted, names[start : start + len(wanted)])) for start in starts)


@functools.lru_cache(maxsize=1024)
def regular(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern.removeprefix(REGULAR))


def fits_name(pattern: str, name: str) -> bool:
    if pattern == name:
        return True
    span = re.fullmatch(r"([0-9]+)-([0-9]*)", pattern)
    if span and name.isdecimal():
        return int(span[1]) <= int(name) <= (int(span[2]) if span[2] else math.inf)
    return fnmatchcase(name, pattern)


def any_fits(patterns: Iterable[str], path: str) -> bool:
    return any(fits(pattern, path) for pattern in patterns)


def longest(patterns: Mapping[str, T], path: str, default: T) -> T:
    """The value of the longest pattern that fits. Raises LoraLiteError where equally long ones have different values."""
    fitting = [pattern for pattern in patterns if fits(pattern, path)]
    top = [pattern for pattern in fitting if len(pattern) == max(map(len, fitting))]
    if len({patterns[pattern] for pattern in top}) > 1:
        raise LoraLiteError(
            f"{path} fits {some(map(repr, top))}, equally long and with different values.",
            expected="One longest pattern for a layer.",
            fix=f"{settled(patterns, [path])!r}  # what fits one path alone is longer",
        )
    return patterns[top[0]] if top else default


def settled(patterns: Mapping[str, T], paths: Iterable[str]) -> dict[str, T]:
    """The patterns without a conflict at the paths: where the longest disagree, the first counts, for that path alone."""
    found = dict(patterns)
    for path in paths:
        fitting = [pattern for pattern in patterns if fits(pattern, path)]
        top = [pattern for pattern in fitting if len(pattern) == max(map(len, fitting))]
        if len({patterns[pattern] for pattern in top}) > 1:
            found[exactly(path)] = patterns[top[0]]
            if len(exactly(path)) <= len(top[0]):
                for pattern in top[1:]:
                    found.pop(pattern, None)
    return found
