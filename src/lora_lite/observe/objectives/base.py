"""Objective: a weighted term of a training loss that is computed from what `ll.capture` recorded; terms add up.

formula   loss = task loss + sum_i weight_i * value_i

An objective is a frozen config with its own generator, so that training with and without it sees the same random numbers.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ...calibration.calls import full_precision
from ...contract.config import Options
from ...errors import LoraLiteError

if TYPE_CHECKING:
    from ..seen import Forward, Seen

NEEDS = frozenset({"hidden", "attention", "mask", "delta"})
"""What can be asked for: hidden states, recorded attention calls, the token mask, and the weight changes of the adapters."""

Masks = Tensor | Sequence[Tensor] | Callable[[Any], Tensor] | None


def mask_of(mask: Masks, k: int, batch: Any) -> Tensor | None:
    """The mask of batch k for `ll.capture`: (B, T), 1 for tokens, of the rows that attention sees.

    mask  one tensor for every batch, a list with one for each, or a function of a batch; None: what the model is called with

    Raises LoraLiteError where a list is shorter than the batches.
    """
    if mask is None or isinstance(mask, Tensor):
        return mask
    if callable(mask):
        return mask(batch)
    if k >= len(mask):
        raise LoraLiteError(
            f"{len(mask)} masks for more than {k} batches.",
            expected="One mask for each batch.",
            fix="objective.calibrate(model, batches, mask=lambda batch: batch.ne(0))",
        )
    return mask[k]


class Summand:
    """What one objective and a sum of several have in common, in terms of `terms`."""

    terms: "tuple[Objective, ...]"
    parts: dict[str, Tensor]
    """{name: unweighted value of the last call}, detached; terms of weight 0 are not measured."""

    @property
    def named(self) -> "dict[str, Objective]":
        """{name: term}; the second of a kind is called NAME.2, and so on."""
        found: dict[str, Objective] = {}
        for term in self.terms:
            number = 1 + sum(type(other) is type(term) for other in found.values())
            found[term.name if number == 1 else f"{term.name}.{number}"] = term
        return found

    @property
    def needs(self) -> frozenset[str]:
        """What `capture` has to record, a subset of NEEDS; empty where every weight is 0."""
        return frozenset().union(*(term.requires for term in self.terms if term.weight != 0))

    def __call__(self, seen: "Seen") -> Tensor:
        """sum_i weight_i * value_i, a scalar; call it inside or after the capture block, and `backward` after it."""
        self.parts.clear()
        values = {name: (term.weight, term.value(seen)) for name, term in self.named.items() if term.weight != 0}
        self.parts.update({name: value.detach() for name, (_, value) in values.items()})
        if not values:
            return torch.zeros((), dtype=torch.int64)  # an integer: adding it changes neither bits nor dtype of a loss
        return torch.stack([weight * value for weight, value in values.values()]).sum()

    def __add__(self, other: "Summand") -> "Sum":
        return Sum((*self.terms, *other.terms)) if isinstance(other, Summand) else NotImplemented

    def state_dict(self) -> dict[str, Tensor]:
        """{name: state} of the terms that have one, which belongs into training checkpoints."""
        return {name: state for name, term in self.named.items() if (state := term.state()) is not None}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where `state_dict` was taken. Raises LoraLiteError for a state of other objectives."""
        if state.keys() != (here := self.state_dict()).keys():
            raise LoraLiteError(
                f"The state belongs to other objectives: {sorted(state)}.",
                expected=f"Here {sorted(here)} have a state.",
                fix="objective.load_state_dict(objective.state_dict())",
            )
        for name, kept in state.items():
            self.named[name].restore(kept.cpu())

    def calibrate(self, model: nn.Module, batches: Iterable[Any], *, mask: Masks = None) -> None:
        """Settle before training what a term takes from the base's behaviour, such as alpha="auto"; most take nothing.

        batches  as for calibration_data; a list where several terms read it
        mask     for a model that takes none: see `mask_of`
        """
        for term in self.terms:
            term.calibrate(model, batches, mask=mask)

    def evaluating(self, seed: int = 0) -> "Summand":
        """A copy with fresh generators of this seed: measuring with it never shifts training."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Objective(Summand, Options):
    """One term; a subclass says what it `requires` and gives `of`.

    weight  factor in the loss; at 0 nothing is captured or computed and the loss is bit-equal

    Raises LoraLiteError for an unknown field, a value of the wrong kind and a value out of range.
    """

    home: ClassVar[str] = "lora_lite.objectives"
    name: ClassVar[str]
    requires: ClassVar[frozenset[str]]

    weight: float = 1.0
    parts: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.weight):
            self.refuse("weight", self.weight, "a finite number")

    @property
    def terms(self) -> "tuple[Objective, ...]":  # type: ignore[override]
        return (self,)

    def state(self) -> Tensor | None:
        """What training has to carry on with; None for most."""
        return None

    def restore(self, state: Tensor) -> None:
        """Take up a `state`."""

    def calibrate(self, model: nn.Module, batches: Iterable[Any], *, mask: Masks = None) -> None:
        """Nothing to settle."""

    def of(self, forward: "Forward") -> Tensor:
        """The unweighted value, a scalar in float32 or better, of one recorded forward pass."""
        raise NotImplementedError

    def value(self, seen: "Seen") -> Tensor:
        """The unweighted value, the mean over the forward passes that `seen` recorded; outside autocast."""
        seen.require(self.name, self.requires)
        values = []
        for forward in seen.forwards:
            with full_precision(seen.device), torch.set_grad_enabled(torch.is_grad_enabled() and forward.with_grad):
                values.append(self.of(forward))
        return torch.stack(values).mean()

    def evaluating(self, seed: int = 0) -> "Objective":
        return dataclasses.replace(self)


@dataclass(frozen=True, kw_only=True)
class Random(Objective):
    """An objective that draws; seed: of its generator, which nothing else uses."""

    seed: int = 0
    drawn: torch.Generator = field(default_factory=torch.Generator, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.seed < 2**63:
            self.refuse("seed", self.seed, "0 to 2**63 - 1")
        self.drawn.manual_seed(self.seed)

    def state(self) -> Tensor:
        return self.drawn.get_state()

    def restore(self, state: Tensor) -> None:
        self.drawn.set_state(state)

    def evaluating(self, seed: int = 0) -> "Random":
        return dataclasses.replace(self, seed=seed)


class Sum(Summand):
    """Several objectives as one; without any it adds nothing."""

    def __init__(self, terms: "Sequence[Objective]" = ()):
        self.terms = tuple(terms)
        self.parts = {}

    def evaluating(self, seed: int = 0) -> "Sum":
        return Sum([term.evaluating(seed) for term in self.terms])

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Sum) and self.terms == other.terms

    def __hash__(self) -> int:
        return hash(self.terms)

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.terms)) or "Sum()"
