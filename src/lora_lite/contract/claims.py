"""Claims: what a variant promises at every parameter value."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Claims:
    """What a variant promises at every parameter value; selects the checks of the conformance suite.

    affine       for fixed parameters the adapted layer is an affine map of x; needed for merge and delta_weight
    contraction  for coeff in [0, 1] outputs are never further apart than those of the base layer
    isometry     at coeff 1 the adapter's own map is orthogonal (of x for input-side methods, of y - b otherwise)
    rank         cfg -> largest rank of the weight change, None where there is no such bound
    safe_coeff   range of coeff inside which the promises hold; `scale` warns outside
    start        largest |y' - y| / max|y| right after attach; 0 means bit for bit
    reads_weight whether `init` reads W; False spares the copy: W comes on the meta device, with a shape and no numbers
    """

    affine: bool = True
    contraction: bool = False
    isometry: bool = False
    rank: Callable[[Any], int] | None = None
    safe_coeff: tuple[float, float] | None = None
    start: float = 0.0
    reads_weight: bool = True
