"""Pure functions on tensors, without state: what several methods compute, each once, with the source of its formula.

maps.py: products, gains, bounded parameters. rotations.py: Cayley transforms, block rotations, reflections. spectrum.py:
singular vectors and eigenvectors, exact and fast (lanczos.py). Products with activations run in the dtype of the activations,
factorisations and norms in float32 or better; gradients are exact. A variant's author may take everything that is named here.
"""

from .maps import (
    add_lin,
    add_low_rank,
    add_products,
    box,
    chain,
    length,
    lin,
    low_rank,
    per_value,
    stretched,
    unit,
    wide,
    without_bias,
)
from .rotations import block_product, block_turn, bounded, cayley_shift, reflections, skew
from .spectrum import left_svd, orth, top_eigenvectors

__all__ = [
    "add_lin",
    "add_low_rank",
    "add_products",
    "block_product",
    "block_turn",
    "bounded",
    "box",
    "cayley_shift",
    "chain",
    "left_svd",
    "length",
    "lin",
    "low_rank",
    "orth",
    "per_value",
    "reflections",
    "skew",
    "stretched",
    "top_eigenvectors",
    "unit",
    "wide",
    "without_bias",
]
