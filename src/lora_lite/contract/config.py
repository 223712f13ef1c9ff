"""AdapterConfig: the frozen options every variant shares, checked when built, JSON both ways."""

import dataclasses
import json
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import torch

from ..errors import LoraLiteError, closest
from .kinds import DTYPES, accepts, bounds, normalised, readable
from .meant import meant
from .pattern import exactly, fault, longest, several, spellings
from .strict import SHOWN, parsed, refuse_boundless, shown

C = TypeVar("C", bound="AdapterConfig")
O = TypeVar("O", bound="Options")
PATTERNS = ("targets", "exclude", "rank_pattern")
"""Fields that hold patterns."""


class Options:
    """Parent of frozen dataclasses whose fields are checked by name and kind when one is built; `home`: where users find them.

    Raises LoraLiteError for an unknown field and a value of the wrong kind.
    """

    home: ClassVar[str] = "lora_lite"

    def __new__(cls: type[O], /, **fields: Any) -> O:
        known = {f.name for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
        for name in fields.keys() - known:
            raise LoraLiteError(
                f"{cls.__name__} has no field {shown(name)}.",
                found=closest(name[:SHOWN], known),
                fix=f"help({cls.home}.{cls.__name__})",
            )
        return object.__new__(cls)

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for name in (f.name for f in dataclasses.fields(self) if f.init):  # type: ignore[arg-type]
            hint = hints[name]
            value = normalised(getattr(self, name), hint)
            object.__setattr__(self, name, value)
            if not accepts(value, hint):
                unused = hint is types.NoneType
                raise LoraLiteError(
                    f"{type(self).__name__}({name}={shown(value)}) cannot be built.",
                    expected=f"This method has no {name}: the value would be ignored."
                    if unused
                    else f"{name}: {readable(hint)}.",
                    fix=f"{type(self).__name__}()  # without {name}" if unused else meant(name, value, hint, self.usual(name)),
                )
            if broken := bounds(value, name):
                self.refuse(name, value, broken, f"{name}={self.usual(name)!r}")

    def usual(self, name: str) -> Any:
        """The default of a field."""
        own = next(f for f in dataclasses.fields(self) if f.name == name)  # type: ignore[arg-type]
        return own.default if own.default_factory is dataclasses.MISSING else own.default_factory()

    def refuse(self, name: str, value: object, expected: str, fix: str = "") -> typing.NoReturn:
        """Raise the error for one field; for `__post_init__` of subclasses."""
        raise LoraLiteError(
            f"{type(self).__name__}({name}={shown(value)}) cannot be built.", expected=f"{name} is {expected}.", fix=fix
        )

    def refuse_no_patterns(self, name: str, patterns: Iterable[str]) -> None:
        """Raise the error for the first of the texts of a field that is no pattern (see contract/pattern.py)."""
        for pattern in patterns:
            if wrong := fault(pattern):
                known = "whole names of a path, ranges and *, or re: with an expression"
                self.refuse(name, pattern, f"{known}; {wrong}", several(name, patterns) or spellings(pattern))


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(Options):
    """Options of every variant; a subclass adds its own and may narrow these (`alpha: None = None`: has no alpha).

    r             rank, at least 1
    alpha         numerator of the scale s = alpha / r; None: alpha = r, so s = 1
    rslora        s = alpha / sqrt(r) instead (Kalajdzievski 2023, arXiv:2312.03732)
    targets       patterns of the layers' paths (contract/pattern.py): "q_proj", "layers.0-7", "re:..."; "all-linear" takes
                  every Linear-like layer of the base model that can be adapted, less output embeddings and routers
    exclude       patterns of layers to leave out
    layers        indices in the model's list of blocks; None takes all
    roles         keep only layers that read from or write to the residual stream; a layer of unknown role stays, with a warning
    rank_pattern  pattern -> r for the layers it fits; the longest counts, and 0 leaves the layer out
    dtype         of the adapter's own tensors; lowered to the activations' dtype inside each product
    buffer_dtype  of frozen matrices; None: the dtype of the base weight, or `dtype` where that is quantised
    seed          of random starts, together with layer path and tensor name
    coeff         runtime coefficient at attach; 0 is the base model
    lr            learning rate to start a sweep from; read by `param_groups`

    Raises LoraLiteError for an unknown field, a value of the wrong kind and a value out of range.
    """

    r: int = 8
    alpha: float | None = None
    rslora: bool = False
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    exclude: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    roles: tuple[Literal["reader", "writer"], ...] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    buffer_dtype: torch.dtype | None = None
    seed: int = 0
    coeff: float = 1.0
    lr: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("r", "alpha", "lr"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                self.refuse(name, value, "a number above 0", f"{name}={self.usual(name)!r}")
        for name in ("dtype", "buffer_dtype"):
            if (value := getattr(self, name)) not in (None, *DTYPES.values()):
                self.refuse(name, value, f"one of {', '.join(DTYPES)}", f"{name}=torch.float32")
        for pattern, rank in self.rank_pattern.items():
            if rank < 0:
                fix = f"rank_pattern={self.rank_pattern | {pattern: 0}}"
                self.refuse(f"rank_pattern[{pattern!r}]", rank, "a rank, or 0 for no adapter", fix)
        for name, patterns in self.patterns().items():
            self.refuse_no_patterns(name, self.rank_pattern if name == "rank_pattern" else patterns)
        if self.targets == ():
            self.refuse("targets", (), 'at least one pattern, or "all-linear"', "targets='all-linear'")

    @property
    def s(self) -> float:
        """The scale alpha / r, or alpha / sqrt(r) with rslora."""
        if self.r is None:
            return 1.0
        alpha = self.r if self.alpha is None else self.alpha
        return alpha / (self.r**0.5 if self.rslora else self.r)

    def rank_at(self, path: str) -> int:
        """The rank that `rank_pattern` gives the layer at `path`, else r."""
        return longest(self.rank_pattern, path, self.r)

    def patterns(self) -> dict[str, tuple[str, ...]]:
        """{field: its patterns}."""
        found = {name: getattr(self, name) for name in PATTERNS}
        return {name: () if value == "all-linear" else tuple(value) for name, value in found.items()}

    def without_patterns(self: C) -> C:
        """This config choosing nothing: what one layer needs, whose place and rank are known."""
        return dataclasses.replace(self, targets="all-linear", exclude=(), rank_pattern={})

    def for_layer(self: C, path: str) -> C:
        """This config with the rank of the layer at `path`."""
        rank = self.rank_at(path)
        return self if rank == self.r else dataclasses.replace(self, r=rank)

    def possible_at(self: C, path: str) -> list[C]:
        """The configs that `for_layer(path)` may give, one for each rank there is; no pattern is searched."""
        ranks = [rank for rank in self.rank_pattern.values() if rank not in (0, self.r)]
        alone = [{}, *({exactly(path): rank} for rank in dict.fromkeys(ranks))]
        return [dataclasses.replace(self.without_patterns(), rank_pattern=p).for_layer(path).without_patterns() for p in alone]

    def lasting(self: C) -> C:
        """This config with None for what only serves the start and is no data: fields with `metadata={"transient": True}`."""
        passing = [f.name for f in dataclasses.fields(self) if f.metadata.get("transient") and getattr(self, f.name)]
        return dataclasses.replace(self, **dict.fromkeys(passing)) if passing else self

    def to_json(self) -> str:
        values = {f.name: getattr(self.lasting(), f.name) for f in dataclasses.fields(self)}
        return json.dumps(values, default=lambda dtype: str(dtype).removeprefix("torch."))

    @classmethod
    def from_json(cls: type[C], text: str) -> C:
        hints = typing.get_type_hints(cls)
        return cls(**{name: normalised(value, hints.get(name)) for name, value in cls.fields_of(text).items()})

    @classmethod
    def fields_of(cls, text: str) -> dict[str, Any]:
        """{field: value} of a JSON text. Raises LoraLiteError for one that holds no table."""
        found = parsed(text, f"The text for {cls.__name__}", "cfg.to_json()")
        if not isinstance(found, dict):
            raise LoraLiteError(f"{shown(text)} holds no fields of {cls.__name__}.", fix="cfg.to_json()")
        refuse_boundless(found, f"The text for {cls.__name__}")
        return found

    @classmethod
    def before(cls) -> dict[str, Any]:
        """{option: what files older than it mean}: fields with `metadata={"before": value}`."""
        return {f.name: f.metadata["before"] for f in dataclasses.fields(cls) if "before" in f.metadata}

    @classmethod
    def from_file(cls: type[C], text: str, prefix: str = "") -> C:
        """As `from_json`, with patterns kept as they stand in the file, unchecked: whoever reads a file never searches them.

        prefix  put before each pattern, for files whose patterns are of another grammar
        """
        values = cls.before() | cls.fields_of(text)
        hints, patterns = typing.get_type_hints(cls), [name for name in PATTERNS if name in values]
        kept = {name: normalised(values.pop(name), hints[name]) for name in patterns}
        cfg = cls.from_json(json.dumps(values))
        for name, value in kept.items():
            if not accepts(value, hints[name]):
                raise LoraLiteError(f"{name}={shown(value)} is no {readable(hints[name])}.", expected="What ll.save wrote.")
            if broken := bounds(value, name):
                raise LoraLiteError(f"{name} of the file is {shown(value)}.", expected=f"{name} is {broken}.")
            if isinstance(value, dict):
                value = {prefix + pattern: rank for pattern, rank in value.items()}
            elif value != "all-linear":
                value = tuple(prefix + pattern for pattern in value)
            object.__setattr__(cfg, name, value)
        return cfg


@dataclass(frozen=True, kw_only=True)
class RanklessConfig(AdapterConfig):
    """For methods without a rank: r, alpha and rslora exist and refuse every value."""

    r: None = None  # type: ignore[assignment]
    alpha: None = None
    rslora: Literal[False] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank_pattern:
            self.refuse("rank_pattern", self.rank_pattern, "empty: this method has no rank")
