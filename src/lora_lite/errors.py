"""The one error of the library: what failed, what was expected, what is there, and the repair as code."""

import difflib
from collections.abc import Iterable
from typing import Any

LISTED = 40


class LoraLiteError(ValueError):
    """A request that cannot be carried out; the model is as it was before the call."""

    def __init__(
        self, failed: str, *, expected: str = "", found: str = "", fix: str = "", lawful: dict[str, Any] | None = None
    ):
        """lawful: {option: largest value that would be allowed}, where that is known."""
        self.lawful = lawful or {}
        sentence = " ".join(part for part in (failed, expected, found) if part)
        super().__init__(sentence + (f"\n    {fix}" if fix else ""))


class LoraLiteWarning(UserWarning):
    """Something that a user should look at, and that can still be lawful."""


def closest(word: str, known: Iterable[str]) -> str:
    """'Closest name: x.' for the known word nearest to `word`, case aside, else the list of them, cut after LISTED."""
    known = sorted(known)
    lowered = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), lowered, n=3, cutoff=0.6)
    near.sort(key=lambda name: sorted(name) != sorted(word.lower()))  # swapped letters are the likeliest slip
    return f"Closest name: {lowered[near[0]]}." if near else f"Known: {some(known, LISTED)}."


def some(names: Iterable[str], most: int = 6) -> str:
    """The names as one phrase, cut after `most`."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
