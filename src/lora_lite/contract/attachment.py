"""What an adapter knows of its attach: the group it came with, its training, and the weights that a merge keeps aside."""

import uuid
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..sites.layer import Layer
from .config import AdapterConfig


class Original(NamedTuple):
    """What a merge exchanges on a layer; kind is its class, which changes where a packed layer becomes a dense one."""

    weight: Any
    bias: Any
    kind: type[Layer]


@dataclass
class Lineage:
    """One training: its id is new at attach and travels with snapshots and checkpoints; step counts the snapshots taken."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    step: int = 0


@dataclass
class Group:
    """What the adapters of one attach share: name, config, the base's requires_grad before any attach, their lineage, the hooks
    that keep quantised layers of the model trainable, and the layers' paths."""

    name: str
    cfg: AdapterConfig
    base_flags: dict[str, bool]
    lineage: Lineage = field(default_factory=Lineage)
    handles: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list)
    paths: set[str] = field(default_factory=set)


NOWHERE = Group("", AdapterConfig(), {})
"""The group of an adapter that is not installed."""
