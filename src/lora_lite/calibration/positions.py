"""Positions: rows that begin with padding must not sit at other positions than the same rows alone.

Whether a model's positions follow its attention_mask is measured, on one row: alone, behind its padding, and with position_ids
that count the tokens which the mask keeps. Nothing is done where no row begins with padding.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoraLiteWarning
from .calls import call, field, parameters
from .tokens import leading

CLOSE = 1e-2  # of the largest output: beyond what low precision makes of other places of the same numbers


class Positions:
    """Made for one measurement: `complete` gives each batch the position_ids that it needs.

    bound: whether batches may be called by name instead of by position
    """

    def __init__(self, model: nn.Module, bound: bool = True):
        self.model, self.bound = model, bound
        self.needed: bool | None = None

    @torch.no_grad()
    def complete(self, given: Any, batch: Any, mask: Any) -> Any:
        """The batch as `given`, or its named values with position_ids."""
        if (
            not isinstance(batch, Mapping)
            or not isinstance(mask, Tensor)
            or mask.ndim != 2
            or "position_ids" in batch
            or not behind(mask).any()
        ):
            return given
        words = next((name for name in ("input_ids", "inputs_embeds") if batch.get(name) is not None), None)
        if words is None or batch[words].shape[:2] != mask.shape:
            return given
        taken = "position_ids" in parameters(self.model) and (self.bound or given is batch)
        if self.needed is None:
            self.needed = self.measured(batch, mask, taken)
        return {**batch, "position_ids": counted(mask)} if self.needed else given

    def measured(self, batch: Mapping[str, Any], mask: Tensor, taken: bool) -> bool:
        """Whether position_ids make the output behind padding that of the row alone, which it is not without them."""
        row = int(behind(mask).long().argmax())
        start = int(mask[row].argmax())
        one = {k: v[row : row + 1] if isinstance(v, Tensor) and v.shape[:1] == mask.shape[:1] else v for k, v in batch.items()}
        alone = {
            k: v[:, start:] if isinstance(v, Tensor) and leading(k, v)[:2] == (1, mask.shape[1]) else v for k, v in one.items()
        }
        want = shown(call(self.model, alone))
        if want is None:
            return False

        def differs(given: Mapping[str, Any]) -> float:
            got = shown(call(self.model, given))
            if got is None:
                return 0.0
            got = got[:, start:] if got.ndim > 2 and got.shape[1] == mask.shape[1] else got
            kept = mask[row, start:].bool()
            a, b = (t[:, kept] if t.ndim > 2 and t.shape[1] == len(kept) else t for t in (got, want))
            return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) if a.shape == b.shape else 0.0

        plain = differs(one)
        if plain <= CLOSE:
            return False
        if taken and differs({**one, "position_ids": counted(mask[row : row + 1])}) < plain / 10:
            return True
        warnings.warn(
            f"Behind padding the same row gives {type(self.model).__name__} another output ({plain:.1g} of the largest): its "
            "positions or its attention do not follow attention_mask. Pad calibration data on the right.",
            LoraLiteWarning,
            stacklevel=2,
        )
        return False


def behind(mask: Tensor) -> Tensor:
    """Which rows begin with padding, and hold a token."""
    return (mask[:, 0] == 0) & mask.any(1)


def counted(mask: Tensor) -> Tensor:
    """The position of each kept token among those of its row."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def shown(output: Any) -> Tensor | None:
    """The tensor of an output to compare, in float32."""
    for name in ("logits", "last_hidden_state"):
        if isinstance(found := field(output, name), Tensor):
            return found.float()
    return output.float() if isinstance(output, Tensor) else None
