"""Objectives on the weight changes of the adapters: DeltaNorm, DeltaCosine against earlier phases of a training.

For D the change of a layer and D0 its present value, held fixed,

    |D|^2 = 2 <D, D0> - |D0|^2        in value and in gradient,
    <D, L R> = sum_j <D r_j, l_j>,    r_j the rows of R (k, d_in), l_j the columns of L (d_out, k),

so a change of low rank costs k runs of the adapter's own map on vectors, and no gradient of shape (d_out, d_in). All of it in
float64, since the map is the difference of the adapted and the bare layer, and again in backward, so that no copy of W is held.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...algebra.snapshot import Snapshot, rebuilt
from ...core import finding
from ...core.delta import Change, DenseBase, change, float64, run
from ...core.merge import refuse_unmergeable
from ...errors import LoraLiteError, some
from .base import Objective

if TYPE_CHECKING:
    from ..seen import Seen

SMALL = 1e-6
"""A change below this share of what it is compared with has no direction: the rest is rounding."""


def product(first: Change, second: Change) -> Tensor:
    """<first, second>, by Gram matrices of the factors where both have some."""
    if first.right is None or second.right is None:
        return (first.dense() * second.dense()).sum()
    return ((first.left.T @ second.left) * (first.right @ second.right.T)).sum()


def trained_products(f: finding.Found, fixed: list[Change]) -> Tensor:
    """<D, change> for each fixed change, (n,), D the change of one adapter on its layer, with a gradient to its parameters."""

    def products() -> Tensor:
        W, _ = float64(f.layer)
        base, origin = DenseBase(W, None), W.new_zeros(1, W.shape[1])

        def D(z: Tensor) -> Tensor:
            """(n, d_in) -> (n, d_out)"""
            return run([f.adapter], base, z) - run([f.adapter], base, origin) - base(z)

        rights = [part.right for part in fixed if part.right is not None]
        if len(rights) == len(fixed):
            images = D(torch.cat(rights)).split([len(right) for right in rights])
            return torch.stack([(image * part.left.T).sum() for image, part in zip(images, fixed)])
        dense = D(torch.eye(W.shape[1]).to(W)).T
        return torch.stack([(dense * part.dense()).sum() for part in fixed])

    return checkpoint(products, use_reentrant=False, preserve_rng_state=False)


def trained(model: nn.Module, name: str | None, objective: str) -> list[finding.Found]:
    """The adapters of that name, or all.

    Raises LoraLiteError, naming the objective, for none, merged ones, maps that are not linear, and coefficients per sample.
    """
    try:
        found = finding.present(model, name)
        finding.refuse_sharded(found)
        refuse_unmergeable(found)
    except LoraLiteError as error:
        raise LoraLiteError(f"The objective {objective!r} needs the change of weight of an adapter. {error}") from None
    return found


def present_change(f: finding.Found) -> Change:
    """The change of one adapter on its layer, held fixed. Raises LoraLiteError where the adapter has diverged."""
    if not all(tensor.isfinite().all() for tensor in f.adapter.parameters()):
        raise LoraLiteError(f"Adapter {f.name!r} holds numbers at {f.path} that are not finite.", fix="a smaller learning rate")
    return change(f.layer, f.adapter)


def as_wide_as(value: Tensor, f: finding.Found) -> Tensor:
    """In the dtype of the adapter, float32 or better: a float64 term would make the whole loss one."""
    return value.to(torch.promote_types(next(iter(f.adapter.tensors().values())).dtype, torch.float32))


@dataclass(frozen=True, kw_only=True)
class DeltaNorm(Objective):
    """sum over adapted layers of |dW|_F^2 at the coefficients of the moment: keeps the adapter near the base.

    weight   factor in the loss
    adapter  name of the adapter; None: all of them
    """

    name: ClassVar[str] = "delta_norm"
    requires: ClassVar[frozenset[str]] = frozenset({"delta"})

    adapter: str | None = None

    def value(self, seen: "Seen") -> Tensor:
        seen.require(self.name, self.requires)
        found = trained(seen.model, self.adapter, self.name)
        squares = [square_norm(f).to(seen.device) for f in found]
        return as_wide_as(torch.stack(squares).sum(), found[0])


def square_norm(f: finding.Found) -> Tensor:
    """|D|^2 of one adapter on its layer, with a gradient."""
    now = present_change(f)
    return 2 * trained_products(f, [now])[0] - product(now, now)


@dataclass(frozen=True, kw_only=True)
class DeltaCosine(Objective):
    """Mean over layers and earlier phases of cos(dW - dW_last, dW_phase): keeps what is learnt now apart from what was before.

    against  snapshots of one training in their order. Each phase is the increment over the snapshot before, the first one all
             of it. dW_last is the last of them where the adapter goes on with that training, and 0 where it is another one
    adapter  name of the adapter that is trained; None: the only one
    weight   factor in the loss

    In [-1, 1]: minimised it does not stop at 0. A layer whose dW has not left dW_last has no direction yet, counts
    as 0 and has no gradient.
    """

    name: ClassVar[str] = "delta_cosine"
    requires: ClassVar[frozenset[str]] = frozenset({"delta"})

    against: Snapshot | Sequence[Snapshot]
    adapter: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        chain = self.snapshots
        if not chain or not all(isinstance(taken, Snapshot) for taken in chain):
            self.refuse("against", self.against, "a snapshot, or several", "DeltaCosine(against=ll.snapshot(model))")
        if len({(taken.lineage.id, tuple(taken.layers)) for taken in chain}) > 1:
            fix = "DeltaCosine(against=a) + DeltaCosine(against=b)"
            self.refuse("against", self.against, "a chain of one training on the same layers", fix)

    @property
    def snapshots(self) -> tuple[Snapshot, ...]:
        return (self.against,) if isinstance(self.against, Snapshot) else tuple(self.against)

    @functools.cached_property
    def chain(self) -> list[dict[str, Change]]:
        """{path: change of weight at coefficient 1} of each snapshot."""
        return [{path: change(taken.layers[path], a) for path, a in rebuilt(taken).items()} for taken in self.snapshots]

    @functools.cached_property
    def phases(self) -> dict[str, list[Change]]:
        """{path: increments of the phases}, without those that are 0. Raises LoraLiteError where all of them are."""
        found: dict[str, list[Change]] = {}
        for path, first in self.chain[0].items():
            steps = [first, *(minus(b[path], a[path]) for a, b in itertools.pairwise(self.chain))]
            largest = max(float(product(taken[path], taken[path])) for taken in self.chain)
            if moved := [step for step in steps if product(step, step) > SMALL**2 * largest]:
                found[path] = moved
        if not found:
            raise LoraLiteError(
                f"The objective {self.name!r} has nothing to compare with.",
                found=f"No change of weight in {some(map(repr, self.snapshots))}.",
                fix="DeltaCosine(against=ll.snapshot(model))  # after training",
            )
        return found

    def value(self, seen: "Seen") -> Tensor:
        seen.require(self.name, self.requires)
        found = trained(seen.model, finding.the_name(seen.model, self.adapter), self.name)
        here = [f for f in found if f.path in self.phases]
        if not here:
            raise LoraLiteError(
                f"The objective {self.name!r} compares layers that adapter {found[0].name!r} does not have.",
                expected=f"One of {some(self.phases)}.",
                found=f"Adapted: {some(f.path for f in found)}.",
                fix="DeltaCosine(against=against, adapter=name)",
            )
        goes_on = found[0].adapter.group.lineage.id == self.snapshots[-1].lineage.id
        cosines = [layer_cosines(f, self.chain[-1][f.path] if goes_on else None, self.phases[f.path]) for f in here]
        return as_wide_as(torch.cat([c.to(seen.device) for c in cosines]).mean(), found[0])


def layer_cosines(f: finding.Found, last: Change | None, phases: list[Change]) -> Tensor:
    """cos(D - last, phase) for each phase, (n,), D being the change of one adapter on its layer."""
    now = present_change(f)
    start = zero(now) if last is None else last
    with_now, with_start, *with_phases = trained_products(f, [now, start, *phases])
    square = 2 * with_now - product(now, now) - 2 * with_start + product(start, start)
    if square <= SMALL**2 * max(product(now, now), product(start, start)):
        return square.new_zeros(len(phases))
    return torch.stack(
        [(inner - product(start, phase)) / (square * product(phase, phase)).sqrt() for inner, phase in zip(with_phases, phases)]
    )


def zero(like: Change) -> Change:
    return Change(*(None if part is None else torch.zeros_like(part) for part in like))  # type: ignore[arg-type]


def minus(first: Change, second: Change) -> Change:
    """first - second: factors side by side, or one dense matrix where one has none."""
    bias = first.bias - second.bias
    if first.right is None or second.right is None:
        return Change(first.dense() - second.dense(), None, bias)
    return Change(torch.cat([first.left, -second.left], 1), torch.cat([first.right, second.right]), bias)
