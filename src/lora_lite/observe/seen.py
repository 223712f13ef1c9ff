"""What a capture block shows: forward passes with their token mask, hidden states and attention calls, and their checks."""

import functools
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core import finding
from ..errors import LoraLiteError
from .attention import Call

CAPTURE = "with ll.capture(model, objective) as seen: out = model(**batch)"


def token_mask(mask: Any) -> Tensor:
    """(B, T) booleans. Raises LoraLiteError for another shape and for other numbers than 0 and 1."""
    if not isinstance(mask, Tensor) or mask.ndim > 2:
        raise LoraLiteError(
            f"The mask is {f'of shape {tuple(mask.shape)}' if isinstance(mask, Tensor) else f'a {type(mask).__name__}'}.",
            expected="One number per token, (batch, time): 1 for tokens, 0 for padding.",
            fix="ll.capture(model, objective, mask=mask)",
        )
    if not ((mask == 0) | (mask == 1)).all():
        raise LoraLiteError(
            "The mask holds other numbers than 0 and 1.",
            expected="1 for tokens, 0 for padding.",
            fix="attention_mask = input_ids != pad_token_id",
        )
    return mask.bool()


@dataclass
class Forward:
    """One forward pass.

    raw        token mask as the batch or the caller gave it, or None
    hidden     hidden states (B, T, D), one per layer, or those that `layers` chose, in the order they came
    versions   of these tensors when they were recorded, see `version`
    calls      attention calls, in the order they came
    with_grad  gradients were enabled for the pass; without  for what was recorded while they were off in the middle of it
    of_decoder the model has an encoder too, and what covers its tokens is another mask
    base_calls runs the pass once more with the adapters off: its attention calls
    """

    raw: Any
    with_grad: bool = True
    hidden: list[Tensor] = field(default_factory=list)
    versions: list[int | None] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    without: bool = False
    of_decoder: bool = False
    base_calls: Callable[[], list[Call]] = list

    @functools.cached_property
    def given(self) -> Tensor | None:
        """The token mask (B, T), booleans, or None. Not read in the forward: torch.compile breaks off at such a branch."""
        return None if self.raw is None else token_mask(self.raw)

    def mask_for(self, shape: tuple[int, ...], what: str) -> Tensor:
        """The token mask, booleans, for tensors with these leading axes (B, T); all True where none was given.

        Raises LoraLiteError where the mask has another shape; `what` names the tensors.
        """
        if self.given is None:
            return torch.ones(shape, dtype=torch.bool)
        if tuple(self.given.shape) != tuple(shape):
            raise LoraLiteError(
                f"The mask has shape {tuple(self.given.shape)}, {what} have {tuple(shape)}.",
                expected="A mask of (batch, time), 1 for tokens and 0 for padding, that covers the same tokens.",
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
        if not self.calls:
            raise LoraLiteError("The batch has no mask, and nothing was captured to take its shape from.", fix=CAPTURE)
        q = self.calls[0].q
        return self.mask_for((q.shape[0], q.shape[-2]), "attention maps").to(q.device)

    @property
    def mask_given(self) -> bool:
        return self.given is not None

    def rows(self, pick: Callable[[int], Tensor] | None = None) -> list[Tensor]:
        """X (n, D) of every layer: the hidden rows of valid tokens in batch-major order, in float32 or better.

        pick  (n) -> which of the n rows to take, before any of them is copied
        """
        found = []
        for h in self.hidden:
            tokens = self.mask_for(h.shape[:-1], "hidden states").flatten().nonzero()[:, 0]
            taken = tokens if pick is None else tokens[pick(len(tokens)).to(tokens.device)]
            found.append(h.flatten(0, -2)[taken.to(h.device)].to(torch.promote_types(h.dtype, torch.float32)))
        return found


@dataclass
class Seen:
    """What a capture block recorded. `mask`, `hidden` and `calls` are those of its only forward pass.

    asked  {need: who asked for it}, for messages
    """

    model: nn.Module
    asked: dict[str, str]
    forwards: list[Forward] = field(default_factory=list)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(self.asked)

    @property
    def only(self) -> Forward:
        if len(self.forwards) != 1:
            raise LoraLiteError(
                f"{len(self.forwards)} forward passes were recorded.",
                expected="mask, hidden and calls are those of one.",
                fix="for forward in seen.forwards: forward.hidden" if self.forwards else CAPTURE,
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
    def calls(self) -> list[Call]:
        return self.only.calls

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def require(self, name: str, needs: Set[str]) -> None:
        """Raise LoraLiteError where objective `name` needs what was not asked for, or what was recorded cannot serve it."""
        if lacking := needs - self.needs:
            raise LoraLiteError(
                f"The objective {name!r} needs {', '.join(sorted(lacking))}.",
                found=f"The capture was asked for {', '.join(sorted(self.needs)) or 'nothing'}.",
                fix="with ll.capture(model, objective) as seen: ...  # the objective that is called afterwards",
            )
        self.check_recorded()

    def check(self) -> None:
        """Raise LoraLiteError, naming who asked, for what is missing, does not fit the mask or passes no gradient, and for
        adapters whose hooks are gone."""
        finding.refuse_lost(finding.adapters(self.model))
        self.check_recorded()

    def check_recorded(self) -> None:
        recorded = self.needs - {"delta"}
        if recorded and not self.forwards:
            raise LoraLiteError(
                f"{self.asked[min(recorded)]} needs a forward pass of the model inside the capture block.",
                found="There was none.",
                fix=CAPTURE,
            )
        for forward in self.forwards:
            for need, check in (("hidden", check_hidden), ("attention", check_attention)):
                if need in self.asked:
                    check(forward, self.asked[need])


def version(tensor: Tensor) -> int | None:
    """How often the tensor was written to in place; None where that is not counted: inference mode, code being compiled."""
    return None if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def check_hidden(forward: Forward, who: str) -> None:
    if not forward.hidden:
        raise LoraLiteError(
            f"{who} needs hidden states, and the modules that show them were not called in the forward pass.",
            expected="The output head, or the modules that `layers` names.",
            fix="ll.capture(model, objective, layers=(0, 1))  # block indices or paths of modules",
        )
    if any(before is not None and version(h) != before for h, before in zip(forward.hidden, forward.versions)):
        raise LoraLiteError(
            f"{who} recorded hidden states that the model wrote over afterwards, in place.",
            expected="Modules whose output is left alone.",
            fix="ll.capture(model, objective)  # in front of the output head, or other layers",
        )
    for h in forward.hidden:
        forward.mask_for(h.shape[:-1], "hidden states")
    if forward.with_grad and not any(h.requires_grad for h in forward.hidden):
        raise no_gradient(who, "hidden states", forward.without)


def check_attention(forward: Forward, who: str) -> None:
    if not forward.calls:
        raise LoraLiteError(
            f"{who} needs attention maps, and the model made no call of scaled_dot_product_attention.",
            found="Eager attention, nn.MultiheadAttention and kernels of other packages do not call it.",
            fix='model.set_attn_implementation("sdpa")  # for models of transformers',
        )
    if forward.with_grad and not any(call.q.requires_grad or call.v.requires_grad for call in forward.calls):
        raise no_gradient(who, "attention calls", any(not call.with_grad for call in forward.calls))


def no_gradient(who: str, what: str, off: bool) -> LoraLiteError:
    if off:
        return LoraLiteError(
            f"{who} recorded {what} without a gradient: the model turned gradients off in the middle of its forward.",
            expected="Reentrant checkpointing does; the other kind works.",
            fix='model.activation_checkpointing_enable({"use_reentrant": False})',
        )
    return LoraLiteError(
        f"{who} recorded {what} without a gradient, with gradients enabled.",
        expected="Something trained in front of them; behind reentrant checkpointing nothing has a gradient either.",
        fix="with torch.no_grad(): ...  # to measure without training",
    )
