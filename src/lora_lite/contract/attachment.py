"""What an adapter knows of its attach: the group it came with, its training, and the weights that a merge keeps aside."""

import copy
import itertools
import re
import uuid
import zlib
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from ..sites.layer import Layer
from .config import AdapterConfig


class Original(NamedTuple):
    """What a merge exchanges on a layer; kind is its class, which changes where a packed layer becomes a dense one.

    merged  the weight that stands in the place of this one, and its version
    """

    weight: Any
    bias: Any
    kind: type[Layer]
    merged: tuple[Any, int]


@dataclass
class Lineage:
    """One training: its id is new at attach and travels with snapshots and checkpoints; step counts the snapshots taken."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    step: int = 0


@dataclass
class Untouched:
    """The base as the first attach found it, shared by all attaches until the last detach.

    flags     {name: requires_grad} of every parameter      buffers   {name: copy} of every buffer
    samples   {name: dtype and hash of a sample} of the base model's parameters
    versions  {name: (id, version)} of every parameter: what wrote into it since
    """

    flags: dict[str, bool] = field(default_factory=dict)
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    samples: dict[str, str] = field(default_factory=dict)
    versions: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass
class Group:
    """What the adapters of one attach share.

    name     as the user gave it; `child` is the name of the module that hangs under a layer
    cfg      the config of the attach                        base     the model as it was before any attach
    lineage  the training                                    paths    of the layers
    handles  hooks on the model: quantised layers stay trainable, and the model says that it ran
    skipped  {path: reason} of what selection left out       ran      whether the model's own forward ran since
    key      by which a thread's blocks know it: one number for all layers, so that compiled code serves them all
    """

    name: str
    cfg: AdapterConfig
    base: Untouched = field(default_factory=Untouched)
    lineage: Lineage = field(default_factory=Lineage)
    handles: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list)
    paths: set[str] = field(default_factory=set)
    skipped: dict[str, str] = field(default_factory=dict)
    ran: bool = False
    key: int = field(default_factory=itertools.count(1).__next__)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Group":
        """Of a copied model: with a key of its own, which no open block knows."""
        memo[id(self)] = new = copy.copy(self)
        vars(new).update({**copy.deepcopy(vars(self), memo), "key": Group("", self.cfg).key})
        return new

    @property
    def child(self) -> str:
        """The adapter's name as a name that a module may have."""
        word = re.sub(r"\W", "_", self.name, flags=re.ASCII)
        return word if word.isidentifier() and word == self.name else f"adapter_{word}_{zlib.crc32(self.name.encode()):08x}"

    def note(self, model: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the model: it ran, so that a layer which was not called is dead."""
        self.ran = True  # without asking: torch.compile would compile once for each answer


NOWHERE = Group("", AdapterConfig())
"""The group of an adapter that is not installed."""
