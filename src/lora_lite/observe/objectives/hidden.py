"""Objectives on hidden states: L1, Repulsion, Gossip. The hidden rows X (n, D) are those of valid tokens, layer by layer.

They come from Surface Tension Transformers; the formulas stand in formulas.py.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from ...errors import LoraLiteError
from .base import Objective, Random
from .formulas import gossip, l1, repulsion, ring_peers, subset, uniform_peers

if TYPE_CHECKING:
    from ..seen import Forward

PEERS = {"uniform": uniform_peers, "ring": ring_peers}


def refuse_few(name: str, n: int, least: int) -> None:
    if n < least:
        raise LoraLiteError(
            f"The objective {name!r} met a batch of {n} valid tokens.",
            expected=f"At least {least} over all its sequences.",
            fix="attention_mask = input_ids != pad_token_id  # 1 for tokens, 0 for padding",
        )


@dataclass(frozen=True, kw_only=True)
class L1(Objective):
    """Mean of |X|: pulls hidden states towards sparsity.

    weight  factor in the loss
    """

    name: ClassVar[str] = "l1"
    requires: ClassVar[frozenset[str]] = frozenset({"hidden", "mask"})

    weight: float = 0.0005

    def of(self, forward: "Forward") -> Tensor:
        layers = forward.rows()
        for X in layers:
            refuse_few(self.name, len(X), 1)
        return torch.stack([l1(X).to(layers[0].device) for X in layers]).mean()


@dataclass(frozen=True, kw_only=True)
class Pairwise(Random):
    """An objective on pairs of rows: of more than max_vectors rows it takes that many, drawn anew at every call."""

    requires: ClassVar[frozenset[str]] = frozenset({"hidden", "mask"})

    max_vectors: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_vectors < 2:
            self.refuse("max_vectors", self.max_vectors, "at least 2")

    def of(self, forward: "Forward") -> Tensor:
        layers = forward.rows(self.pick)
        return torch.stack([self.of_rows(X).to(layers[0].device) for X in layers]).mean()

    def pick(self, n: int) -> Tensor:
        """Which of n rows form pairs. Raises LoraLiteError for fewer than two."""
        refuse_few(self.name, n, 2)
        return subset(n, self.max_vectors, self.drawn)

    def of_rows(self, X: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Repulsion(Pairwise):
    """Mean over ordered pairs of exp(-|v_i - v_j|^2), v the rows of length 1: pushes directions of tokens apart.

    weight       factor in the loss; .02 shows no effect on the embedded base, published results use 2
    max_vectors  number of rows that form pairs
    seed         of the draw of those rows
    """

    name: ClassVar[str] = "repulsion"

    weight: float = 0.02

    def of_rows(self, X: Tensor) -> Tensor:
        return repulsion(X)


@dataclass(frozen=True, kw_only=True)
class Gossip(Pairwise):
    """Mean over drawn pairs of max(0, cos(x_i, x_p) - tau)^2: pushes apart only those that are closer than tau.

    weight       factor in the loss; published results use 5 with tau .5
    tau          cosine from which a pair pays, in [-1, 1]
    k            peers of each row
    max_vectors  number of rows
    draw         uniform: peers uniform over the other rows; ring: over all rows, and the next row where a row drew itself
    seed         of the draw of rows, then peers
    """

    name: ClassVar[str] = "gossip"

    weight: float = 1.0
    tau: float = 0.85
    k: int = 8
    max_vectors: int = 256
    draw: Literal["uniform", "ring"] = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 <= self.tau <= 1:
            self.refuse("tau", self.tau, "a cosine, in [-1, 1]")
        if self.k < 1:
            self.refuse("k", self.k, "at least 1")

    def of_rows(self, X: Tensor) -> Tensor:
        return gossip(X, PEERS[self.draw](len(X), self.k, self.drawn).to(X.device), self.tau)
