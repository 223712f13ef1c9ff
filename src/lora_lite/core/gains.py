"""Gains for groups of layers: {"layers.0-7": 0.25, "layers.8-.o_proj": 0.5}.

The grammar of patterns is that of contract/pattern.py. Where several fit a layer, the longest counts; where none does, the gain
is 1.
"""

import math
import re
from collections.abc import Iterable, Mapping

from ..contract.pattern import exactly, fault, fits, longest, settled, several, spellings
from ..errors import LoraLiteError, closest, some
from .repairs import nearest


def gains(patterns: Mapping[str, float], paths: Iterable[str]) -> dict[str, float]:
    """{path: gain} for every path.

    Raises LoraLiteError for a gain that is no finite number, a pattern that fits no path, and a path that two longest patterns
    fit which do not agree.
    """
    paths = list(dict.fromkeys(paths))
    leaves = dict.fromkeys(path.rpartition(".")[2] for path in paths)
    for pattern, gain in patterns.items():
        if isinstance(gain, bool) or not isinstance(gain, (int, float)) or not math.isfinite(gain):
            raise LoraLiteError(f"The gain {gain!r} of {pattern!r} is no finite number.", fix=f"{{{pattern!r}: 0.5}}")
        if wrong := fault(pattern):
            apart = several("", patterns).removeprefix("=")
            fix = f"ll.scale(model, {apart})" if apart else spellings(pattern)
            raise LoraLiteError(f"{pattern!r} is no pattern: {wrong}.", fix=fix)
        if not any(fits(pattern, path) for path in paths):
            near = nearest(pattern, leaves) or next(iter(leaves))
            raise LoraLiteError(
                f"{pattern!r} fits no adapted layer.",
                expected="Names of the path, one after the other, with ranges such as 0-7 or 16-.",
                found=f"Adapted layers: {some(paths)}. {closest(pattern, leaves)}",
                fix=f"ll.scale(model, { {near if p == pattern else p: g for p, g in patterns.items()} })",
            )
    if (apart := settled(patterns, paths)) != patterns:
        path = next(path for path in paths if exactly(path) in apart and exactly(path) not in patterns)
        raise LoraLiteError(
            f"{path} fits patterns that are equally long and have different gains.",
            expected="One longest pattern for a layer.",
            found=f"Given: {patterns}.",
            fix=f"ll.scale(model, {apart})",
        )
    return {path: float(longest(patterns, path, 1.0)) for path in paths}


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
