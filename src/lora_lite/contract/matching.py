"""Regular expressions that stand in somebody else's file: the answer of `re`, without backtracking, within a number of steps.

Python's own search of "(.+.+)+!" takes longer than anyone waits. Here a part of an expression is a map from the places where it
may begin to those where it may end, which says the same of whether there is a match. References to groups, atomic groups and
flags are refused.
"""

import functools
import importlib
import re
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import LoraLiteError
from .strict import shown

parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
LETTERS, STEPS = 2000, 500_000  # of one expression; places looked at in all the matches of one file

Places = frozenset[int]


class Unlawful(ValueError):
    """What an expression holds that is not matched here."""


@dataclass
class Budget:
    """Steps that the matches of one file may still take."""

    left: int = STEPS


def fullmatch(pattern: str, text: str, budget: Budget) -> bool:
    """Whether the whole text matches. Raises LoraLiteError for an expression that is none, or that takes too many steps."""
    return len(text) in ends(pattern, text, Places({0}), budget)


def search(pattern: str, text: str, budget: Budget) -> bool:
    return bool(ends(pattern, text, Places(range(len(text) + 1)), budget))


def ends(pattern: str, text: str, starts: Places, budget: Budget) -> Places:
    try:
        return Run(text, budget).sequence(tree(pattern), starts)
    except (Unlawful, re.error, RecursionError, OverflowError) as error:
        raise LoraLiteError(
            f"{shown(pattern)} of a file is not matched: {shown(str(error))}.",
            expected=f"A regular expression of at most {LETTERS} letters that ends soon, without flags or references.",
        ) from error


def why_unlawful(pattern: Any) -> str:
    """Why nothing can be matched with it, in words; "" where it can."""
    try:
        Run("", Budget()).sequence(tree(pattern), Places({0}))
    except (Unlawful, TypeError, re.error, RecursionError, OverflowError) as error:
        return str(error)
    return ""


@functools.lru_cache(maxsize=1024)
def tree(pattern: str) -> Any:
    if len(pattern) > LETTERS:
        raise Unlawful(f"{len(pattern)} letters")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = parser.parse(pattern)
    if found.state.flags & ~re.UNICODE:
        raise Unlawful("it has flags")
    return found


class Run:
    """One match, which takes its steps from the budget."""

    def __init__(self, text: str, budget: Budget):
        self.text, self.budget = text, budget

    def take(self, steps: int) -> None:
        self.budget.left -= steps
        if self.budget.left < 0:
            raise Unlawful("it takes too many steps")

    def sequence(self, parts: Iterable[tuple[Any, Any]], places: Places) -> Places:
        for op, argument in parts:
            self.take(1 + len(places))
            do = getattr(self, str(op).lower(), None)
            if do is None:
                raise Unlawful(f"{str(op).lower()} is not known here")
            places = do(argument, places)
        return places

    def letters(self, fits: Any, places: Places) -> Places:
        return Places(p + 1 for p in places if p < len(self.text) and fits(self.text[p]))

    def literal(self, code: int, places: Places) -> Places:
        return self.letters(lambda c: ord(c) == code, places)

    def not_literal(self, code: int, places: Places) -> Places:
        return self.letters(lambda c: ord(c) != code, places)

    def any(self, _: None, places: Places) -> Places:
        return self.letters(lambda c: c != "\n", places)

    def in_(self, items: list[tuple[Any, Any]], places: Places) -> Places:
        self.take(len(items) * len(places))
        negated = str(items[0][0]) == "NEGATE"
        return self.letters(lambda c: any(holds(item, c) for item in items[negated:]) != negated, places)

    def branch(self, argument: tuple[None, list[Any]], places: Places) -> Places:
        return Places().union(*(self.sequence(one, places) for one in argument[1]))

    def subpattern(self, argument: tuple[Any, int, int, Any], places: Places) -> Places:
        if argument[1] or argument[2]:
            raise Unlawful("it has flags")
        return self.sequence(argument[3], places)

    def max_repeat(self, argument: tuple[int, int, Any], places: Places) -> Places:
        least, most, inner = argument
        for _ in range(min(least, 2 * len(self.text) + 2)):  # then nothing changes any more
            places = self.sequence(inner, places)
        found = fresh = places
        while fresh and (most := most - 1) >= least:
            fresh = self.sequence(inner, fresh) - found
            found |= fresh
        return found

    min_repeat = max_repeat

    def at(self, where: Any, places: Places) -> Places:
        holds = AT.get(str(where))
        if holds is None:
            raise Unlawful(f"{str(where).lower()} is not known here")
        return Places(p for p in places if holds(self.text, p))

    def looked_around(self, argument: tuple[int, Any], places: Places) -> Places:
        direction, inner = argument
        if direction > 0:
            return Places(p for p in places if self.sequence(inner, Places({p})))
        return places & Places().union(*(self.sequence(inner, Places({p})) for p in range(max(places, default=-1) + 1)))

    assert_ = looked_around

    def assert_not(self, argument: tuple[int, Any], places: Places) -> Places:
        return places - self.looked_around(argument, places)

    def failure(self, _: None, places: Places) -> Places:
        return Places()


setattr(Run, "in", Run.in_)
setattr(Run, "assert", Run.assert_)


def is_word(text: str, at: int) -> bool:
    return 0 <= at < len(text) and (text[at].isalnum() or text[at] == "_")


AT = {
    "AT_BEGINNING": lambda text, p: p == 0,
    "AT_BEGINNING_STRING": lambda text, p: p == 0,
    "AT_END": lambda text, p: p == len(text),
    "AT_END_STRING": lambda text, p: p == len(text),
    "AT_BOUNDARY": lambda text, p: is_word(text, p - 1) != is_word(text, p),
    "AT_NON_BOUNDARY": lambda text, p: is_word(text, p - 1) == is_word(text, p),
}
CATEGORIES = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_WORD": lambda c: is_word(c, 0),
}


def holds(item: tuple[Any, Any], letter: str) -> bool:
    """Whether a letter is in one part of a set."""
    kind, argument = str(item[0]), item[1]
    if kind == "LITERAL":
        return ord(letter) == argument
    if kind == "RANGE":
        return argument[0] <= ord(letter) <= argument[1]
    name = str(argument)
    if kind != "CATEGORY" or (plain := name.replace("_NOT_", "_")) not in CATEGORIES:
        raise Unlawful(f"{name.lower()} is not known here")
    return CATEGORIES[plain](letter) != ("_NOT_" in name)
