"""Options of a benchmark as a frozen dataclass, read from key=value words and held to the kind of their defaults."""

import ast
import dataclasses
import math
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from rich.console import Console

import lora_lite as ll
from lora_lite.errors import closest

O = TypeVar("O", bound="Options")


def value_of(word: str) -> Any:
    """A Python literal, a comma-separated list of words as a tuple, or the word itself."""
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return tuple(word.split(",")) if "," in word else word


def shown(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """A subclass declares fields with defaults: numbers (above 0 but for `seed`), words, and tuples of either.

    Raises LoraLiteError for a value of another kind.
    """

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, kind = getattr(self, f.name), type(f.default)
            if isinstance(f.default, tuple):
                kind = type(f.default[0])
                value = tuple(value) if isinstance(value, (tuple, list)) else (value,)
                fine = bool(value) and all(type(v) in (int, kind) and (kind is str or math.isfinite(v)) for v in value)
                value = tuple(map(kind, value)) if fine else value
                expected = f"One or more {'words' if kind is str else f'numbers of type {kind.__name__}'}."
            else:
                value = float(value) if kind is float and type(value) is int else value
                fine = type(value) is kind and (kind is str or f.name == "seed" or value > 0)
                expected = f"A value like {f.default!r}."
            if not fine:
                raise ll.LoraLiteError(f"{f.name}={value!r}", expected=expected, fix=f"{f.name}={shown(f.default)}")
            object.__setattr__(self, f.name, value)

    @classmethod
    def parse(cls: type[O], words: list[str], usage: str, also: Iterable[str] = ()) -> O:
        """The options of key=value words. Raises LoraLiteError for an unknown key; `usage` is the fix it shows, and `also` are
        keys that the caller reads itself."""
        known = {f.name: f for f in dataclasses.fields(cls)}
        given: dict[str, Any] = {}
        for word in words:
            key, equals, value = word.partition("=")
            if not equals or key not in known:
                raise ll.LoraLiteError(
                    f"{word!r} is no option here.",
                    expected="Options are written key=value.",
                    found=closest(key, {*known, *also}),
                    fix=usage,
                )
            given[key] = value if type(known[key].default) is str else value_of(value)
        return cls(**given)


def folder(out: str) -> Path:
    """The folder `out`, made where it is missing. Raises LoraLiteError where nothing can be written to it."""
    path = Path(out)
    try:
        path.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(path, os.W_OK | os.X_OK) else "it is read-only"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise ll.LoraLiteError(f"out={out} cannot be written to: {reason}.", expected="A folder.", fix="out=benchmarks/runs")
    return path


def usable(device: str) -> None:
    """Raises LoraLiteError for a device that torch does not know or this machine does not have."""
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ll.LoraLiteError(f"device={device} cannot be used: {reason}", fix="device=cpu") from error


def command(words: list[str], usage: str | None, work: Callable[[list[str], Console], object], stopped: str) -> None:
    """Run a benchmark from its words; help, wrong options and Ctrl-C end without a traceback."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console = Console()
    if {"-h", "--help"} & set(words):
        console.print(usage, markup=False, highlight=False)
        return
    try:
        work(words, console)
    except ll.LoraLiteError as error:
        console.print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        console.print(f"stopped; {stopped}")
        sys.exit(130)
