"""Attached: the handle that attach and load return."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..contract.adapter import Adapter
from ..contract.config import AdapterConfig
from ..errors import LoraLiteError
from ..sites.model import linears
from . import finding, runtime
from .detach import detach
from .save import save
from .selection import role, selected


@dataclass
class Attached:
    """Handle of one attach; as a context manager it detaches on leaving.

    model    the model that was adapted                  name    of this adapter
    config   its frozen config                           layers  {path: adapter module}
    skipped  {path: reason} for layers that targets matched and roles or a rank of 0 left out
    """

    model: nn.Module
    name: str
    config: AdapterConfig
    layers: dict[str, Adapter]
    skipped: dict[str, str]

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trainable tensors of this adapter, in the model's order."""
        for adapter in self.layers.values():
            yield from adapter.parameters()

    def save(self, path: str | Path) -> None:
        self.refuse_detached()
        save(self.model, path, name=self.name)

    def scale(self, coeff: float | torch.Tensor | Mapping[str, float]) -> runtime.Scaling | runtime.GroupScaling:
        self.refuse_detached()
        return runtime.scale(self.model, coeff, name=self.name)

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


def handle(model: nn.Module, name: str, cfg: AdapterConfig, adapters: dict[str, Adapter]) -> Attached:
    skipped = {
        path: "rank 0" if cfg.rank_at(path) == 0 else f"a {role(path)}; roles={cfg.roles}"
        for path in linears(model)
        if path not in adapters and selected(path, cfg) and (cfg.roles or cfg.rank_at(path) == 0)
    }
    return Attached(model, name, cfg, adapters, skipped)
