"""HeadDiversity: attention heads of one layer should not all look at the same tokens. From Surface Tension Transformers."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...errors import LoraLiteError
from ..attention import Call, causal, maps
from .base import Objective
from .formulas import head_similarity

if TYPE_CHECKING:
    from ..seen import Forward


@dataclass(frozen=True, kw_only=True)
class HeadDiversity(Objective):
    """Mean over sequences, layers and ordered head pairs i != j of cos(vec P_i, vec P_j), P the T x T attention map.

    Self-attention counts, other calls do not; of a model with encoder and decoder that of the decoder, whose mask is read.
    Maps are formed layer by layer, and again in backward: one layer's are held at a time.

    weight  factor in the loss
    """

    name: ClassVar[str] = "diversity"
    requires: ClassVar[frozenset[str]] = frozenset({"attention", "mask"})

    weight: float = 0.02

    def of(self, forward: "Forward") -> Tensor:
        return torch.cat([similarity.to(forward.calls[0].q.device) for similarity in similarities(forward, self.name)]).mean()


def similarities(forward: "Forward", name: str, masked: bool = True) -> list[Tensor]:
    """Mean head similarity (N,) of every sequence with a valid token, for each self-attention call of the pass.

    masked  False counts padding like tokens
    Raises LoraLiteError where there is no such call, or no sequence has two valid tokens.
    """
    calls = causal(forward.calls) if forward.of_decoder else forward.calls
    calls = [call for call in calls if call.q.ndim == 4 and call.q.shape[-2] == call.k.shape[-2]]
    if not calls:
        raise LoraLiteError(
            f"{name!r} needs self-attention over (batch, heads, time, width).",
            found=f"Queries and keys of the first call: {tuple(forward.calls[0].q.shape)}, {tuple(forward.calls[0].k.shape)}.",
            fix="model(**batch, use_cache=False)",
        )
    shapes = [(call.q.shape[0], call.q.shape[-2]) for call in calls]
    masks = [forward.mask_for(shape, "attention maps") if masked else torch.ones(shape, dtype=torch.bool) for shape in shapes]
    longest = max(int(mask.sum(1).max()) for mask in masks)
    if longest < 2:
        raise LoraLiteError(
            f"The objective {name!r} met a batch whose longest sequence has {longest} valid tokens.",
            expected="At least 2 in one sequence.",
            fix="attention_mask = input_ids != pad_token_id  # 1 for tokens, 0 for padding",
        )

    def similarity(call: Call, mask: Tensor) -> Tensor:
        return head_similarity(maps(call), mask.to(call.q.device))

    return [checkpoint(similarity, *pair, use_reentrant=False, preserve_rng_state=False) for pair in zip(calls, masks)]
