"""What is done with whole adapters: snapshots of a training, their weighted sums, routes between them, TIES and DARE.

It promises that a composition equals the sum of changes that it stands for, in the space that is asked for (changes of the
weight, factors, outputs), and says what truncation cost. A mixed batch is not made here: it is one coefficient per sample
(core/coefficients.py). Users reach it as `ll.algebra` and `ll.snapshot`, `ll.compose`, `ll.apply`, ...; a variant's author
needs none of it.
"""

from .compose import compose
from .router import Routing, frontier, route
from .routes import format_route, parse_route
from .snapshot import Increment, Snapshot, apply, snapshot
from .ties import dare, ties

__all__ = [
    "Increment",
    "Routing",
    "Snapshot",
    "apply",
    "compose",
    "dare",
    "format_route",
    "frontier",
    "parse_route",
    "route",
    "snapshot",
    "ties",
]
