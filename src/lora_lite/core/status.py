"""status: what is attached where, and in which state."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .coverage import Coverage, coverage
from .finding import adapters, dead, missing
from .repairs import reasons


@dataclass(frozen=True)
class LayerStatus:
    """One adapter on one layer. frozen counts a tensor that several layers share where it stands first.

    fired     its hook ran at least once             dead      it did not, though the model ran
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
    """Rows of `status`, one per adapter and layer; prints equal layers as one line, `long()` every layer.

    skipped {path: reason} of what selection left out     covered  which share of the model lies under adapted layers
    """

    layers: tuple[LayerStatus, ...]
    skipped: dict[str, str]
    covered: Coverage

    @property
    def trainable(self) -> int:
        return sum(row.trainable for row in self.layers)

    @property
    def frozen(self) -> int:
        return sum(row.frozen for row in self.layers)

    @property
    def coverage(self) -> float:
        """Parameters in adapted layers over all parameters of the model, each counted once."""
        return self.covered.share

    @property
    def dead(self) -> list[str]:
        """Paths whose hook has not run although the model, or another layer of the same adapter, has."""
        return [row.path for row in self.layers if row.dead]

    @property
    def lost(self) -> list[str]:
        """Paths whose hooks somebody removed (`repair` puts them back) or whose layer was replaced."""
        return [row.path for row in self.layers if row.replaced or not row.hooked]

    def __str__(self) -> str:
        """Layers that differ in their block's number alone are one line."""
        if not self.layers:
            return "no adapters"
        alike: dict[tuple[str, ...], list[LayerStatus]] = {}
        for row in self.layers:
            place = ".".join("*" if name.isdecimal() else name for name in row.path.split("."))
            alike.setdefault((row.name, place, row.variant, str(row.dtype), short(row.coeff), row.state), []).append(row)
        lines = [
            (key[0], f"{key[1]} x{len(rows)}" if len(rows) > 1 else rows[0].path, *said(rows)) for key, rows in alike.items()
        ]
        kept = lines if len(lines) <= MOST else [*lines[:MOST], ("", f"and {len(lines) - MOST} lines more: .long()", *[""] * 7)]
        text = table([*kept, self.total()])
        if self.skipped:
            text += f"\nskipped: {cut(reasons(self.skipped))}"
        return f"{text}\n{cut(str(self.covered))}"

    def long(self) -> str:
        """A line for every layer."""
        return table([*((row.name, row.path, *said([row])) for row in self.layers), self.total()])

    def total(self) -> tuple[str, ...]:
        return "total", f"{len(self.layers)} layers", "", f"{self.trainable:,}", f"{self.frozen:,}", "", "", "", ""

    def __repr__(self) -> str:
        return str(self)


MOST = 24  # lines of a status, so that it fits a screen


def said(rows: list[LayerStatus]) -> tuple[str, ...]:
    """Cells of rows that are alike: sums of numbers, ranges of figures."""
    figures = {key: [row.report[key] for row in rows if key in row.report] for row in rows for key in row.report}
    first = rows[0]
    return (
        first.variant,
        f"{sum(row.trainable for row in rows):,}",
        f"{sum(row.frozen for row in rows):,}",
        str(first.dtype).removeprefix("torch."),
        short(first.coeff),
        first.state,
        " ".join(f"{key}={span(values)}" for key, values in figures.items()),
    )


def span(values: list[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low}..{high}"


def table(rows: list[tuple[str, ...]]) -> str:
    head = ("adapter", "layer", "variant", "trainable", "frozen", "dtype", "coeff", "state", "report")
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in (head, *rows))


def cut(text: str, most: int = 600) -> str:
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def short(coeff: float | Tensor) -> str:
    return f"tensor {tuple(coeff.shape)}" if isinstance(coeff, Tensor) else f"{coeff:g}"


def status(model: nn.Module) -> Status:
    """What is attached where, in which state: per adapter and layer the variant, numbers, dtype, coefficient, fired or dead."""
    found = adapters(model)
    first = {id(holder): f.adapter for f in reversed(found) for holder in f.adapter.shared.values()}
    dead_ones = {id(f.adapter) for f in dead(found)}
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
            dead=id(adapter) in dead_ones,
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
    skipped = {path: why for f in found for path, why in f.adapter.group.skipped.items()}
    adapted = {f.path for f in found}
    left = {path: why for path, why in skipped.items() if path not in adapted}
    return Status(tuple(rows), left, coverage(model, adapted))
