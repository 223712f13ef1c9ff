"""PEFT's type OFT: its exact Cayley transform has the other sign, its truncated series is a rotation where it converged."""

import torch

from ...errors import LoraLiteError
from ...mathematics.rotations import cayley_shift, skew
from ..layout import Key, Layout, Options, Sizes, Stored, block_size, repeated

WEIGHT = "oft_R.weight"


def series(X: torch.Tensor, terms: int) -> torch.Tensor:
    """I + 2 X + 2 X^2 + ... + X^(terms - 1), the last term once; PEFT takes four terms where it is asked for three."""
    R, power, last = torch.eye(X.shape[-1], dtype=X.dtype).expand_as(X), X, max(terms, 4) - 1 if terms > 2 else terms - 1
    for k in range(1, last + 1):
        R, power = R + (1 if k == last > 1 else 2) * power, power @ X
    return R


def rotations(stored: Stored) -> dict[str, torch.Tensor]:
    """{path: rows of numbers above a diagonal}; what has another shape is left to the check of shapes."""
    found = {path: tensors[WEIGHT] for path, tensors in stored.items() if WEIGHT in tensors}
    return {path: q for path, q in found.items() if q.ndim == 2 and (b := block_size(q.shape[1])) * (b - 1) == 2 * q.shape[1]}


def prepare(options: Options, stored: Stored, sizes: Sizes) -> Stored:
    rows = rotations(stored)
    if options.get("use_cayley_neumann", True):
        for path, q in rows.items():
            X = skew(q.double(), block_size(q.shape[1]))
            eye, terms = torch.eye(X.shape[-1]), options.get("num_cayley_neumann_terms", 5)
            if not (off := float((series(X, terms) - eye - cayley_shift(X)).abs().max())) < 1e-6:
                raise LoraLiteError(
                    f"use_cayley_neumann=True: at {path} the truncated series is {off:.1e} away from a rotation.",
                    expected="Here R is orthogonal, so only a series that has converged to 1e-6 can be represented.",
                    fix="OFTConfig(use_cayley_neumann=False)  # in PEFT, and train again",
                )
        rows = {path: -q for path, q in rows.items()}
    whole = {path: {WEIGHT: repeated(q, sizes[path][0] // block_size(q.shape[1]))} for path, q in rows.items()}
    return {path: tensors | whole.get(path, {}) for path, tensors in stored.items()}


def deduced(options: Options, stored: Stored) -> dict[str, int | None]:
    found = {block_size(q.shape[1]) for q in rotations(stored).values()}
    return {"block_size": found.pop() if len(found) == 1 else None}


LAYOUT = Layout(
    peft_type="OFT",
    tensors={"q": Key(WEIGHT, write=torch.neg, read=torch.neg)},
    unread=tuple("r oft_block_size eps block_share use_cayley_neumann num_cayley_neumann_terms init_weights".split()),
    derived=lambda adapter: {"r": 0, "oft_block_size": adapter.d_in // len(adapter.q), "use_cayley_neumann": False},
    deduced=deduced,
    prepare=prepare,
)
