"""capture: record what a forward pass shows, for objectives and geometry, without changing the model.

Inside the block hooks of our own stand on the model; they only keep references, and are gone when the block is left. All
arithmetic happens afterwards, so that checkpointing repeats nothing and autocast decides nothing.
"""

from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .errors import LoraLiteError

Layers = int | str | Iterable[int | str] | None


@dataclass
class Forward:
    """One forward pass: hidden states (B, T, D), one per layer, attention calls in order, and the token mask as given."""

    given: Tensor | None
    hidden: list[Tensor] = field(default_factory=list)
    calls: list[Any] = field(default_factory=list)

    def mask_for(self, shape: torch.Size | tuple[int, ...], what: str) -> Tensor:
        """The token mask (B, T) as booleans for tensors whose leading axes are `shape`; all True where none was given.

        Raises LoraLiteError where the mask has another shape; `what` names the tensors.
        """
        if self.given is None:
            return torch.ones(shape, dtype=torch.bool)
        if tuple(self.given.shape) != tuple(shape):
            raise LoraLiteError(
                f"The mask has shape {tuple(self.given.shape)} and does not fit {what} of {tuple(shape)} tokens.",
                expected="(batch, time), 1 for tokens and 0 for padding.",
                fix="ll.capture(model, objective, mask=mask)",
            )
        return self.given

    @property
    def mask(self) -> Tensor:
        """The token mask (B, T), booleans; all True where the batch has none."""
        if self.given is not None:
            return self.given
        if self.hidden:
            return self.mask_for(self.hidden[0].shape[:-1], "hidden states").to(self.hidden[0].device)
        q = self.calls[0].q
        return self.mask_for((q.shape[0], q.shape[-2]), "attention").to(q.device)

    @property
    def mask_given(self) -> bool:
        return self.given is not None

    def rows(self) -> list[Tensor]:
        """X (n, D) of every layer: the hidden rows of valid tokens in batch-major order, in float32 or better."""
        return [
            h[self.mask_for(h.shape[:-1], "hidden states").to(h.device)].to(torch.promote_types(h.dtype, torch.float32))
            for h in self.hidden
        ]


@dataclass
class Seen:
    """What a capture block recorded; `mask`, `hidden` and `calls` are those of its only forward pass."""

    model: nn.Module
    needs: frozenset[str]
    asked: str = "the capture"
    forwards: list[Forward] = field(default_factory=list)

    @property
    def only(self) -> Forward:
        if len(self.forwards) != 1:
            raise LoraLiteError(
                f"{len(self.forwards)} forward passes were recorded.",
                expected="mask, hidden and calls belong to one.",
                fix="for forward in seen.forwards: forward.hidden",
            )
        return self.forwards[0]

    @property
    def mask(self) -> Tensor:
        return self.only.mask

    @property
    def mask_given(self) -> bool:
        return self.only.mask_given

    @property
    def hidden(self) -> list[Tensor]:
        return self.only.hidden

    @property
    def calls(self) -> list[Any]:
        return self.only.calls

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def require(self, name: str, needs: Set[str]) -> None:
        """Raise LoraLiteError where objective `name` needs what was not asked for, or nothing was recorded."""
        if lacking := needs - self.needs:
            raise LoraLiteError(
                f"The objective {name!r} needs {', '.join(sorted(lacking))}.",
                found=f"The capture was asked for {', '.join(sorted(self.needs)) or 'nothing'}.",
                fix="with ll.capture(model, objective) as seen: ...  # the objective that is called afterwards",
            )
