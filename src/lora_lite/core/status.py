"""status: what is attached where, and in which state."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .finding import adapters, missing


@dataclass(frozen=True)
class LayerStatus:
    """One adapter on one layer. frozen counts a tensor that several layers share where it stands first.

    fired     its hook ran at least once             dead      it did not, though another layer of this adapter ran
    hooked    its hooks are on the layer now         replaced  another module stands in the layer's place
    merged    the weight holds the change            grad_off  none of its tensors requires a gradient
    """

    name: str
    path: str
    variant: str
    trainable: int
    frozen: int
    dtype: torch.dtype
    coeff: float | Tensor
    fired: bool
    dead: bool
    hooked: bool
    replaced: bool
    merged: bool
    grad_off: bool
    report: dict[str, float]

    @property
    def state(self) -> str:
        """replaced, hook_lost, merged, fired, dead or not run yet, the first that holds; grad_off may stand beside it."""
        holding = {
            "replaced": self.replaced,
            "hook_lost": not self.hooked,
            "merged": self.merged,
            "fired": self.fired,
            "dead": self.dead,
            "not run yet": True,
        }
        return next(state for state, holds in holding.items() if holds) + (", grad_off" if self.grad_off else "")


@dataclass(frozen=True)
class Status:
    """Rows of `status`, one per adapter and layer; prints as a table."""

    layers: tuple[LayerStatus, ...]

    @property
    def trainable(self) -> int:
        return sum(row.trainable for row in self.layers)

    @property
    def frozen(self) -> int:
        return sum(row.frozen for row in self.layers)

    @property
    def dead(self) -> list[str]:
        """Paths whose hook has not run although another layer of the same adapter has."""
        return [row.path for row in self.layers if row.dead]

    @property
    def lost(self) -> list[str]:
        """Paths whose hooks somebody removed (`repair` puts them back) or whose layer was replaced."""
        return [row.path for row in self.layers if row.replaced or not row.hooked]

    def __str__(self) -> str:
        if not self.layers:
            return "no adapters"
        head = ("adapter", "layer", "variant", "trainable", "frozen", "dtype", "coeff", "state", "report")
        rows = [
            (
                r.name,
                r.path,
                r.variant,
                f"{r.trainable:,}",
                f"{r.frozen:,}",
                str(r.dtype).removeprefix("torch."),
                short(r.coeff),
                r.state,
                " ".join(f"{key}={value:.3g}" for key, value in r.report.items()),
            )
            for r in self.layers
        ]
        rows.append(("total", f"{len(self.layers)} layers", "", f"{self.trainable:,}", f"{self.frozen:,}", "", "", "", ""))
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in (head, *rows))


def short(coeff: float | Tensor) -> str:
    return f"tensor {tuple(coeff.shape)}" if isinstance(coeff, Tensor) else f"{coeff:g}"


def status(model: nn.Module) -> Status:
    """What is attached where, in which state: per adapter and layer the variant, numbers, dtype, coefficient, fired or dead."""
    found = adapters(model)
    first = {id(holder): f.adapter for f in reversed(found) for holder in f.adapter.shared.values()}
    alive = {f.name for f in found if f.adapter.fired}
    rows = [
        LayerStatus(
            name=name,
            path=path,
            variant=adapter.variant,
            trainable=sum(p.numel() for p in adapter.parameters()),
            frozen=sum(b.numel() for key, b in adapter.named_buffers() if key not in adapter.shared)
            + sum(holder.tensor.numel() for holder in adapter.shared.values() if first[id(holder)] is adapter),
            dtype=next(iter(adapter.tensors().values())).dtype,
            coeff=adapter.coeff,
            fired=adapter.fired,
            dead=not adapter.fired and name in alive,
            hooked=adapter.hooked(layer),
            replaced=False,
            merged=adapter.original is not None,
            grad_off=not any(p.requires_grad for p in adapter.parameters()),
            report=dict(adapter.report),
        )
        for path, layer, name, adapter in found
    ]
    kin = {row.name: row for row in rows}
    empty = {"trainable": 0, "frozen": 0, "fired": False, "dead": False, "hooked": False, "replaced": True, "report": {}}
    for name, paths in missing(found).items():
        rows += [replace(kin[name], path=path, **empty) for path in sorted(paths)]
    return Status(tuple(rows))
