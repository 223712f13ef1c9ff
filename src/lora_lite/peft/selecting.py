"""PEFT's own rules of matching, so that a folder means here what it means there, with the time that a match takes bounded."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from ..contract.matching import Budget, fullmatch, why_unlawful
from ..contract.strict import is_count

LARGEST = 3e38  # of a number that float32 holds
MOST_PATTERNS = 512  # of a table; names of layers are any number
PLAIN = re.compile(r"[\w.-]*")


def listed(names: Any, path: str, budget: Budget | None = None) -> bool:
    """Whether a list of names, or one regular expression, matches the whole path or its end."""
    if isinstance(names, str):
        return fullmatch(names, path, budget or Budget())
    return any(path == name or path.endswith(f".{name}") for name in names or ())


def targeted(options: Mapping[str, Any], path: str, budget: Budget | None = None) -> bool:
    """Whether target_modules, exclude_modules, layers_to_transform and layers_pattern of PEFT select this path."""
    names, blocks, budget = options.get("target_modules") or (), options.get("layers_to_transform"), budget or Budget()
    if listed(options.get("exclude_modules"), path, budget) or not listed(names, path, budget):
        return False
    if blocks in (None, []) or (not isinstance(names, str) and path in names):
        return True
    patterns = options.get("layers_pattern") or ()
    rules = [rf"(.*\.)?({p})\." for p in ([patterns] if isinstance(patterns, str) else patterns)] or [r".*\.[^.]*\."]
    for rule in rules:
        for number in re.finditer(r"(?<=\.)[0-9]+(?=\.)", path):
            if fullmatch(rule, path[: number.start()], budget):
                return int(number[0]) in (blocks if isinstance(blocks, list) else [blocks])
    return False


def by_path(patterns: Mapping[str, Any] | None, paths: list[str], budget: Budget) -> dict[str, Any]:
    """{path: value} of rank_pattern or alpha_pattern: that of the first key which matches the end of the path.

    A dot of a key without other signs is taken for a dot: there are as many such keys as layers.
    """
    order = list(patterns or {})
    plain = {key: n for n, key in enumerate(order) if PLAIN.fullmatch(key)}
    others = [(n, key) for n, key in enumerate(order) if key not in plain]
    found = {}
    for path in paths:
        ends = [path, *(path[n + 1 :] for n, letter in enumerate(path) if letter == ".")]
        first = min((plain[end] for end in ends if end in plain), default=len(order))
        first = next((n for n, key in others if n < first and fullmatch(rf"(.*\.)?({key})", path, budget)), first)
        if first < len(order):
            found[path] = (patterns or {})[order[first]]
    return found


def number(least: int, most: int = 2**31) -> Callable[[Any], bool]:
    return lambda value: is_count(value, least, most)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST


def is_pattern(value: Any) -> bool:
    """One regular expression, or names one by one."""
    if isinstance(value, list):
        return all(isinstance(name, str) for name in value)
    return isinstance(value, str) and not why_unlawful(value)


def table_of(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A table of layers by name or by pattern."""

    def fits(value: Any) -> bool:
        if not isinstance(value, dict) or not all(map(kind, value.values())):
            return False
        patterns = [key for key in value if not PLAIN.fullmatch(key)]
        return len(patterns) <= MOST_PATTERNS and all(map(is_pattern, patterns))

    return fits


def blocks(value: Any) -> bool:
    return is_count(value) or (isinstance(value, list) and all(map(is_count, value)))


FORMS = {
    "target_modules": is_pattern,
    "exclude_modules": is_pattern,
    "feedforward_modules": is_pattern,
    "layers_pattern": is_pattern,
    "layers_to_transform": blocks,
    "rank_pattern": table_of(number(1, 2**16)),
    "alpha_pattern": table_of(is_number),
    "projection_prng_key": number(0, 2**63),
    "num_cayley_neumann_terms": number(1, 1000),
}
"""The form of what this library computes with, beside that which a config of ours checks."""


def readable(option: str, value: Any) -> bool:
    return value is None or option not in FORMS or FORMS[option](value)
