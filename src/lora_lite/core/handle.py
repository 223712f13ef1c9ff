"""Attached and AttachedSet: the handles that attach and load return."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ..contract.adapter import Adapter
from ..contract.config import AdapterConfig
from ..errors import LoraLiteError, some
from . import coefficients, finding
from .atomic import changing
from .checkpoint import contents
from .coverage import Coverage, coverage
from .detach import detach
from .repairs import reasons
from .restore import redrawn, restore
from .save import save


@dataclass(repr=False)
class Attached:
    """Handle of one attach; as a context manager it detaches on leaving.

    model    the model that was adapted                  name    of this adapter
    config   its frozen config                           layers  {path: adapter module}
    skipped  {path: reason} for what "all-linear", or targets that fit it, left out
    lowered  {path: "r=1"} for layers too narrow for the config, which took the largest lawful rank or block
    """

    model: nn.Module
    name: str
    config: AdapterConfig
    layers: dict[str, Adapter]
    skipped: dict[str, str]
    lowered: dict[str, str] = field(default_factory=dict)

    @property
    def covered(self) -> Coverage:
        """The share of the model's numbers in adapted layers, and what lies outside, by kind."""
        return coverage(self.model, self.layers)

    @property
    def coverage(self) -> float:
        """Parameters in adapted layers over all parameters of the model, each counted once."""
        return self.covered.share

    def __repr__(self) -> str:
        variant = next(iter(self.layers.values())).variant
        lines = [f"Attached({self.name!r}: {variant} on {len(self.layers)} layers)", f"  layers   {grouped(self.layers)}"]
        lines.append(f"  covers   {self.covered}")
        if self.skipped:
            lines.append(f"  skipped  {reasons(self.skipped)}")
        if self.lowered:
            lines.append(f"  lowered  {reasons(self.lowered)}")
        return "\n".join(line if len(line) <= MOST else f"{line[: MOST - 4]} ..." for line in lines)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trainable tensors of this adapter, in the model's order."""
        for adapter in self.layers.values():
            yield from adapter.parameters()

    def save(self, path: str | Path) -> None:
        self.refuse_detached()
        save(self.model, path, name=self.name)

    def restore(self, path: str | Path) -> None:
        """Copy the tensors of a file into the very same parameters, as an optimizer that goes on needs it.

        Raises LoraLiteError for a file of another variant, other layers or other shapes; then nothing is copied.
        """
        self.refuse_detached()
        file = contents(path)
        held = file.adapters.get(self.name) or (next(iter(file.adapters.values())) if len(file.adapters) == 1 else None)
        variant = next(iter(self.layers.values())).variant
        if held is None or held.variant != variant or set(held.layers) != set(self.layers):
            raise LoraLiteError(
                f"{path} does not hold adapter {self.name!r}, {variant} on {len(self.layers)} layers.",
                found=f"It has {some(f'{n}: {one.variant} on {len(one.layers)} layers' for n, one in file.adapters.items())}.",
                fix="ll.load(model, path)",
            )
        known = redrawn(path, self.layers, self.config.seed, held.drawn)
        own = [tensor for adapter in self.layers.values() for tensor in adapter.tensors().values()]
        changing(self.model, own, lambda: restore(path, self.layers, held.tensors, known))

    def scale(self, coeff: float | torch.Tensor | Mapping[str, float]) -> coefficients.Scaling:
        self.refuse_detached()
        return coefficients.scale(self.model, coeff, name=self.name)

    def detach(self) -> None:
        self.refuse_detached()
        detach(self.model, name=self.name)

    def is_attached(self) -> bool:
        """Whether the model still carries these very adapters, not others that took their name."""
        mine = {id(adapter) for adapter in self.layers.values()}
        return any(id(found.adapter) in mine for found in finding.adapters(self.model))

    def refuse_detached(self) -> None:
        if not self.is_attached():
            raise LoraLiteError(f"This adapter {self.name!r} was detached.", fix="handle = ll.attach(model, handle.config)")

    def __enter__(self) -> "Attached":
        return self

    def __exit__(self, *error: object) -> None:
        if self.is_attached():
            self.detach()


MOST = 600  # letters of a line of a handle's text


def grouped(paths: Mapping[str, object]) -> str:
    """'model.layers.*.self_attn.q_proj x6, ...'"""
    return reasons(dict.fromkeys(paths, "")).removesuffix(": .")


class AttachedSet(Mapping[str, Attached]):
    """The handles of several adapters that one file brought back, by name; its methods act on all of them."""

    def __init__(self, handles: dict[str, Attached]):
        self.handles = handles

    def __getitem__(self, name: str) -> Attached:
        return self.handles[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.handles)

    def __len__(self) -> int:
        return len(self.handles)

    @property
    def layers(self) -> dict[str, list[Adapter]]:
        """{path: its adapters}."""
        found: dict[str, list[Adapter]] = {}
        for handle in self.handles.values():
            for path, adapter in handle.layers.items():
                found.setdefault(path, []).append(adapter)
        return found

    def __repr__(self) -> str:
        return "\n".join(map(repr, self.handles.values()))

    def parameters(self) -> Iterator[nn.Parameter]:
        for handle in self.handles.values():
            yield from handle.parameters()

    def save(self, path: str | Path) -> None:
        """Write all adapters of the model to one file. Raises LoraLiteError where it has others beside these."""
        model = next(iter(self.handles.values())).model
        if others := [name for name in finding.adapter_names(model) if name not in self.handles]:
            raise LoraLiteError(
                f"The model also has {some(others)}.",
                expected="These adapters alone.",
                fix="ll.save(model, path)  # all of them",
            )
        save(model, path)

    def restore(self, path: str | Path) -> None:
        for handle in self.handles.values():
            handle.restore(path)

    def scale(self, coeff: float | torch.Tensor | Mapping[str, float]) -> coefficients.Scaling:
        model = next(iter(self.handles.values())).model
        return coefficients.Scaling(model, [new for name in self.handles for new in coefficients.settings(model, coeff, name)])

    def detach(self) -> None:
        for handle in self.handles.values():
            handle.detach()

    def __enter__(self) -> "AttachedSet":
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles.values():
            handle.__exit__(*error)
