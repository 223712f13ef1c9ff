"""Layout: how PEFT stores one method in a folder, as data. One file each in layouts/, called like the variant it belongs to."""

import functools
import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraLiteError
from .selecting import listed

Options = Mapping[str, Any]
"""The content of adapter_config.json."""
Stored = dict[str, dict[str, Tensor]]
"""{layer path: {PEFT's name: tensor}}; what all layers share is under the path ""."""
Sizes = dict[str, tuple[int, int]]
"""{layer path: (d_in, d_out)}."""

INERT = (None, False, 0, "", "none", [], {})
"""Values at which an option of PEFT asks for nothing."""


def same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Key:
    """PEFT's name of a tensor, behind `base_model.model.<layer path>.`, and the conversion between its numbers and ours.

    write  ours -> PEFT's shape and numbers     read  PEFT's numbers -> ours; the shape follows from the variant's specs
    """

    name: str
    write: Callable[[Tensor], Tensor] = same
    read: Callable[[Tensor], Tensor] = same


def unchanged(options: Options, stored: Stored, sizes: Sizes) -> Stored:
    return stored


@dataclass(frozen=True)
class Layout:
    """PEFT's form of a variant.

    peft_type  of adapter_config.json
    tensors    {our name: Key}; a frozen tensor that is left out comes from the weight, by the variant's own `init`
    shared     {our name: Key} of tensors that all layers hold together; their keys have no layer path
    when       PEFT's options that make it this variant and no other of the same type; import needs them, export writes them
    only       our options that PEFT's form fixes; import sets them, export needs them
    options    {our option: PEFT's} with equal values; for alpha the scale alpha / r is what is kept
    patterns   PEFT can give layers ranks of their own
    unread     PEFT's options that never reach an output: starts and what `prepare` has dealt with
    allowed    {PEFT's option: values} that import can represent, beside the inert ones
    scaled     our tensor that takes a factor of the scale which our config cannot express
    conv1d     PEFT has it for Conv1D too
    derived    adapter -> PEFT's options that stand in the tensors or the path; over the layers lists add up
    deduced    options, stored -> our options that stand in the tensors
    covers     options, path -> whether this layer is stored in this layout, where a folder holds several
    prepare    options, stored, sizes -> stored, before tensors are read; raises LoraLiteError for what has no counterpart here
    """

    peft_type: str
    tensors: dict[str, Key]
    shared: dict[str, Key] = field(default_factory=dict)
    when: dict[str, Any] = field(default_factory=dict)
    only: dict[str, Any] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)
    patterns: bool = False
    unread: tuple[str, ...] = ()
    allowed: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    scaled: str = ""
    conv1d: bool = False
    derived: Callable[[Any], dict[str, Any]] = lambda adapter: {}
    deduced: Callable[[Options, Stored], dict[str, Any]] = lambda options, stored: {}
    covers: Callable[[Options, str], bool] = lambda options, path: True
    prepare: Callable[[Options, Stored, Sizes], Stored] = unchanged


@functools.cache
def layouts() -> dict[str, Layout]:
    """{variant: layout} of the variants that PEFT has too."""
    package = importlib.import_module(f"{__package__}.layouts")
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    return {name: importlib.import_module(f"{package.__name__}.{name}").LAYOUT for name in names}


def exactly(paths: list[str], others: list[str]) -> list[str] | str:
    """target_modules that select these paths and none of the others: the names, or a regular expression where those clash."""
    if any(listed(paths, other) for other in others):
        return "|".join(re.escape(path) for path in paths)
    return paths


def block_size(count: int) -> int:
    """b of b (b - 1) / 2 = count, the numbers of a skew matrix."""
    return round((1 + (1 + 8 * count) ** 0.5) / 2)


def refuse_option(name: str, value: object, reason: str, fix: str = "") -> None:
    raise LoraLiteError(f"{name}={value!r} has no counterpart here.", expected=reason, fix=fix)


def repeated(row: Tensor, times: int) -> Tensor:
    return row.expand(times, *row.shape[1:]) if len(row) == 1 else row


def kaiming_uniform(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """PEFT's draw: uniform in +-sqrt(6 / fan in)."""
    bound = (6 / shape[1]) ** 0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
