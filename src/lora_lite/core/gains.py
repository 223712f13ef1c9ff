"""Gains for groups of layers: {"layers.0-7": 0.25, "layers.8-.o_proj": 0.5}.

A pattern is a row of names as in a module path, and fits wherever they follow one another in the path. Instead of a number it
may have a range: 0-7 includes both ends, 16- has none. * and ? stand for any letters of one name. Where several patterns fit a
layer, the longest counts; where none does, the gain is 1.
"""

import math
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from ..errors import LoraLiteError, some


def fits(pattern: str, path: str) -> bool:
    wanted, names = pattern.split("."), path.split(".")
    starts = range(len(names) - len(wanted) + 1)
    return any(all(map(fits_name, wanted, names[start : start + len(wanted)])) for start in starts)


def fits_name(pattern: str, name: str) -> bool:
    span = re.fullmatch(r"([0-9]+)-([0-9]*)", pattern)
    if span and name.isdecimal():
        return int(span[1]) <= int(name) <= (int(span[2]) if span[2] else math.inf)
    return fnmatchcase(name, pattern)


def gains(patterns: Mapping[str, float], paths: Iterable[str]) -> dict[str, float]:
    """{path: gain} for every path.

    Raises LoraLiteError for a gain that is no finite number, a pattern that fits no path, and a path that two longest patterns
    fit which do not agree.
    """
    paths = list(dict.fromkeys(paths))
    for pattern, gain in patterns.items():
        if isinstance(gain, bool) or not isinstance(gain, (int, float)) or not math.isfinite(gain):
            raise LoraLiteError(f"The gain {gain!r} of {pattern!r} is no finite number.", fix=f"{{{pattern!r}: 0.5}}")
        if not any(fits(pattern, path) for path in paths):
            raise LoraLiteError(
                f"{pattern!r} fits no adapted layer.",
                expected="Names of the path, one after the other, with ranges such as 0-7 or 16-.",
                found=f"Adapted layers: {some(paths)}.",
                fix=f"{{{paths[0]!r}: 0.5}}",
            )
    return {path: longest(patterns, path) for path in paths}


def longest(patterns: Mapping[str, float], path: str) -> float:
    fitting = [pattern for pattern in patterns if fits(pattern, path)]
    top = [pattern for pattern in fitting if len(pattern) == max(map(len, fitting))]
    if len({patterns[pattern] for pattern in top}) > 1:
        raise LoraLiteError(
            f"{path} fits {some(map(repr, top))}, equally long and with different gains.",
            expected="One longest pattern for a layer.",
            fix=f"{{{path!r}: {patterns[top[0]]}}}  # the whole path is longer",
        )
    return float(patterns[top[0]]) if top else 1.0


def thirds(paths: Iterable[str], first: float, second: float, third: float) -> dict[str, float]:
    """Patterns that give the blocks with index < n/3, < 2n/3 and the rest these gains; n is the highest index + 1.

    paths  of the adapted layers, such as `handle.layers`. Raises LoraLiteError where none is in a numbered block.
    """
    places = [found for path in paths if (found := re.search(r"(?:^|([^.]+)\.)([0-9]+)(?=\.|$)", path))]
    if not places:
        raise LoraLiteError(
            "No layer is in a numbered block.", expected="Paths such as layers.3.q_proj.", fix="{'q_proj': 0.5}"
        )
    n = 1 + max(int(found[2]) for found in places)
    bounds = [0, math.ceil(n / 3), math.ceil(2 * n / 3), n]
    patterns: dict[str, float] = {}
    for low, high, gain in zip(bounds, bounds[1:], (first, second, third)):
        for found in places:
            if low <= int(found[2]) < high:
                patterns[f"{found[1]}.{low}-{high - 1}" if found[1] else f"{low}-{high - 1}"] = gain
    return patterns
