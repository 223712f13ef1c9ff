"""Variants of one kind promise the same and are built alike: in the everyday suite one of them stands for all in slow tests.

`just test-long` runs every one.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import pytest

import lora_lite as ll
from lora_lite.contract.method import Method
from lora_lite.testing import toy


def kind(name: str) -> Hashable:
    """What decides which code of the library a variant goes through: its claims, its sides, and whether it reads data."""
    cls = ll.get(name)
    claims = cls.claims
    promises = (claims.affine, claims.contraction, claims.isometry, claims.rank is not None, claims.start == 0)
    built = (claims.safe_coeff is not None, claims.reads_weight)
    sides = (cls.forward is not Method.forward, cls.forward_input is not Method.forward_input)
    return promises, built, sides, bool(cls.needs(toy.small(cls)))


def representatives(names: Iterable[str] | None = None) -> set[str]:
    """The first of every kind among these names, or among all."""
    first: dict[Hashable, str] = {}
    for name in ll.names() if names is None else names:
        first.setdefault(kind(name), name)
    return set(first.values())


def one_of_each_kind(names: Sequence[str]) -> list[Any]:
    """The names as parameters of a slow test: one of each kind every day, the others in `just test-long`."""
    return daily(names, *representatives(names))


OF_THE_MACHINE = {
    f"check_{word}"
    for word in (
        "specs_are_declarative config_goes_to_json_and_back shapes_match_annotations places_are_exact repeats_itself compiles "
        "base_is_never_written checkpointing_is_exact detach_is_exact failed_attach_leaves_no_trace deepcopy_is_independent "
        "stacks load_is_strict pickles"
    ).split()
}
"""Checks of what surrounds a variant's formula, which its options hardly reach: with them in `just test-long`."""


def of_options(check: Any) -> tuple[Any, ...]:
    """The marks of a check that is run with other options than a variant's own."""
    return (pytest.mark.long,) if check.function.__name__ in OF_THE_MACHINE else ()


def daily(names: Iterable[str], *chosen: str) -> list[Any]:
    """The names as parameters of a test: the chosen ones every day, the others in `just test-long`."""
    return [name if name in chosen else pytest.param(name, marks=pytest.mark.long) for name in names]
