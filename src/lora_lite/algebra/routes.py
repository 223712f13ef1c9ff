"""Routes: 'A+0.9B+0.4C' says how much of each phase of a training to keep.

A term is a coefficient in [0, 1.5] (1 where left out), an optional *, and the name of a phase. The first phase of the chain is
the stable one and stands with coefficient 1; every later name means the increment over the phase before it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import NoReturn

from ..errors import LoraLiteError, closest, some

TERM = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)?\s*\*?\s*([A-Za-z_][A-Za-z0-9_]*)")
MOST = 1.5


def parse_route(route: str, phases: Sequence[str]) -> dict[str, float]:
    """{phase: coefficient} in the order of the chain `phases`, of the phases that the route names.

    Raises LoraLiteError for an empty or unreadable term, an unknown or repeated phase, a coefficient outside [0, 1.5], and a
    stable phase that is missing or scaled.
    """
    found: dict[str, float] = {}
    for term in route.split("+"):
        read = TERM.fullmatch(term.strip())
        if read is None:
            refuse(route, f"the term {term!r} cannot be read" if term.strip() else "a term is empty", phases)
        name, coefficient = read[2], float(read[1] or 1)
        if name not in phases:
            refuse(route, f"there is no phase {name!r}. {closest(name, phases).rstrip('.')}", phases)
        if name in found:
            refuse(route, f"the phase {name!r} stands twice", phases)
        if coefficient > MOST:
            refuse(route, f"{coefficient:g} is above {MOST}", phases)
        found[name] = coefficient
    if found.get(phases[0]) != 1:
        refuse(route, f"the stable phase {phases[0]!r} must stand in it, with coefficient 1", phases)
    return {name: found[name] for name in phases if name in found}


def refuse(route: str, fault: str, phases: Iterable[str]) -> NoReturn:
    phases = list(phases)
    raise LoraLiteError(
        f"The route {route!r} cannot be followed: {fault}.",
        expected=f"Terms such as 0.9B joined by +, without exponents, of the phases {some(phases)}.",
        fix=repr("+".join([phases[0], *(f"0.9{name}" for name in phases[1:])])),
    )


def format_route(coefficients: Mapping[str, float]) -> str:
    """The normal form: six significant digits, a coefficient of 1 left out and one of 0 kept; in the order given."""
    digits = {name: f"{Decimal(f'{coefficient:.6g}'):f}" for name, coefficient in coefficients.items()}
    return "+".join(("" if number == "1" else number) + name for name, number in digits.items())


def absolute(coefficients: Mapping[str, float], phases: Sequence[str]) -> dict[str, float]:
    """What the sum of increments is in terms of the phases themselves: phase k gets c_k - c_(k+1), 0 for one not named."""
    c = [coefficients.get(name, 0.0) for name in phases] + [0.0]
    return {name: c[k] - c[k + 1] for k, name in enumerate(phases)}
