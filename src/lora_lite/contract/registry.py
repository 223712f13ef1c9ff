"""The only list of methods: classes register themselves; those of `sources` are found on first use, those of
entry points where all are asked for, or one that is not among the others."""

import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import inspect
import pkgutil
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from ..errors import LoraLiteError, LoraLiteWarning, closest
from .adapter import Adapter
from .config import AdapterConfig
from .strict import SHOWN, shown

ENTRY_POINTS = "lora_lite.variants"
CONTRACT = {
    "param_specs": ["d_in", "d_out", "cfg"],
    "needs": ["cfg"],
    "wants": ["cfg"],
    "ranks": ["adapters", "stats", "cfg"],
    "init": ["self", "W"],
    "group_init": ["adapters", "stats", "cfg"],
    "forward": ["self", "x", "y", "base"],
    "forward_input": ["self", "x"],
}
CARD_FIELDS = ("paper", "code", "formula", "start", "coeff", "identity", "invariant", "cost", "rate", "differs")
T = TypeVar("T", bound=type[Adapter])

sources: list[str] = []
"""Packages whose modules are imported on first use; the library tells its own, so that nothing here points to a method."""

_classes: dict[str, type[Adapter]] = {}


def register(cls: T | None = None, *, name: str | None = None) -> T | Callable[[T], T]:
    """Class decorator: add a variant under `name`, by default the class's name in lower case.

    Raises LoraLiteError where the class is no Adapter, has no frozen keyword-only Config, lacks `param_specs` or both
    forwards, gives a contract method other arguments, declares statistics without `group_init`, or takes a name in use.
    """
    if cls is None:
        return functools.partial(register, name=name)  # type: ignore[return-value]
    if not (isinstance(cls, type) and issubclass(cls, Adapter)):
        raise LoraLiteError(f"{cls!r} cannot be registered.", expected="A variant is a subclass of lora_lite.Adapter.")
    cls.variant = name or cls.__name__.lower()
    validate(cls)
    cls.citation = cls.__dict__.get("citation") or card(cls).get("paper", "")
    known = _classes.get(cls.variant)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise LoraLiteError(
            f"{cls.__module__}.{cls.__qualname__} cannot be registered as {cls.variant!r}.",
            found=f"{known.__module__}.{known.__qualname__} has that name.",
            fix=f'@register(name="{cls.variant}_2")',
        )
    _classes[cls.variant] = cls
    return cls


@contextlib.contextmanager
def borrowed(cls: type[Adapter]) -> Iterator[None]:
    """Registered for the time of the block; how the suite tests a class that nobody registered."""
    discover()
    if cls in _classes.values():
        yield
        return
    register(cls)
    try:
        yield
    finally:
        _classes.pop(cls.variant, None)


def validate(cls: type[Adapter]) -> None:
    """Raise LoraLiteError for the first part of the variant contract that the class breaks."""

    def refuse(fault: str, expected: str, fix: str) -> None:
        raise LoraLiteError(f"{cls.__module__}: {cls.__name__} cannot be registered: {fault}.", expected=expected, fix=fix)

    if not re.fullmatch(r"[a-z][a-z0-9_]*", cls.variant):
        refuse(f"the name {cls.variant!r}", "Lower-case letters, digits and underscores.", '@register(name="mine")')
    config: Any = getattr(cls, "Config", None)
    if not (isinstance(config, type) and issubclass(config, AdapterConfig)):
        refuse(f"Config is {config!r}", "A subclass of AdapterConfig.", f"Config = {cls.__name__}Config")
    params = vars(config).get("__dataclass_params__")
    if params is None or not params.frozen or any(not f.kw_only for f in dataclasses.fields(config)):
        refuse(f"{config.__name__} is not a frozen keyword-only dataclass", "", "@dataclass(frozen=True, kw_only=True)")
    owner = next((c for c in _classes.values() if c.Config is config and c.variant != cls.variant), None)
    if owner is not None:
        refuse(
            f"{config.__name__} belongs to {owner.variant!r}",
            "A config tells which variant is meant, so every variant has its own.",
            f"class {cls.__name__}Config({config.__name__}): ...",
        )
    if cls.param_specs is Adapter.param_specs:
        refuse("param_specs is missing", "Every tensor is declared.", "def param_specs(d_in, d_out, cfg): ...")
    if not (cls.changes_input() or cls.changes_output()):
        refuse(
            "neither forward nor forward_input is there",
            "forward(self, x, y, base) or forward_input(self, x).",
            "def forward(self, x, y, base): ...",
        )
    for method, expected in CONTRACT.items():
        given = arguments(cls, method)
        if given != expected:
            missing = [a for a in expected if a not in given]
            refuse(
                f"{method}({', '.join(given)})",
                f"The contract is {method}({', '.join(expected)})." + (f" Missing: {', '.join(missing)}." if missing else ""),
                f"def {method}({', '.join(expected)}): ...",
            )
    declares = any(getattr(cls, m) is not getattr(Adapter, m) for m in ("needs", "wants"))
    if declares and cls.group_init is Adapter.group_init:
        refuse("it names statistics and has no group_init", "", "def group_init(adapters, stats, cfg): ...")


def arguments(cls: type[Adapter], method: str) -> list[str]:
    """Argument names as written, without the cls of a class method."""
    found = inspect.getattr_static(cls, method)
    names = list(inspect.signature(getattr(found, "__func__", found)).parameters)
    return names[1:] if isinstance(found, classmethod) else names


@functools.cache
def discover() -> None:
    """Import the modules of `sources`."""
    for package in map(importlib.import_module, sources):
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")


@functools.cache
def plugins() -> None:
    """Load the entry points, which run other packages' code: where all names are asked for, and for one that nobody else has.

    A plugin that fails is named in a warning and left out.
    """
    discover()
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:
            warnings.warn(f"variant plugin {entry.name} ({entry.value}) was left out: {error}", LoraLiteWarning, stacklevel=2)


def names() -> list[str]:
    """Names of all registered variants, sorted."""
    plugins()
    return sorted(name for name, cls in _classes.items() if cls.listed)


def get(name: str) -> type[Adapter]:
    """The variant class of that name. Raises LoraLiteError with the closest name."""
    discover()
    if name not in _classes:
        plugins()
    if name not in _classes:
        raise LoraLiteError(f"There is no variant {shown(name)}.", found=closest(str(name)[:SHOWN], names()), fix="ll.names()")
    return _classes[name]


def config(name: str, **fields: object) -> AdapterConfig:
    """The config of variant `name`: `ll.config(name, r=16)`. Raises LoraLiteError for unknown names and fields."""
    return get(name).Config(**fields)  # type: ignore[arg-type]


def config_classes() -> dict[str, type[AdapterConfig]]:
    """{class name: config class} of all registered variants."""
    plugins()
    return {cls.Config.__name__: cls.Config for cls in _classes.values() if cls.listed}


def config_class(name: str) -> type[AdapterConfig]:
    """The config class called `name`; AttributeError otherwise, as Python's import machinery expects."""
    if not name.endswith("Config"):
        raise AttributeError(f"module 'lora_lite' has no attribute {name!r}")
    classes = config_classes()
    if name not in classes:
        raise AttributeError(f"lora_lite has no {name}. {closest(name, classes)}")
    return classes[name]


def variant_of(cfg: AdapterConfig) -> type[Adapter]:
    """The variant a config belongs to."""
    discover()
    for cls in _classes.values():
        if type(cfg) is cls.Config:
            return cls
    raise LoraLiteError(
        f"{type(cfg).__name__} belongs to no registered variant.",
        expected="A config made by ll.config(name, ...) or the Config class of a registered variant.",
        fix="ll.config(variant, r=8)  # variant: one of ll.names()",
    )


def card(cls: type[Adapter]) -> dict[str, str]:
    """The fields of a variant's docstring (its module's, else its own): title, paper, formula, ... as one-line texts."""
    text = inspect.getdoc(sys.modules.get(cls.__module__)) or ""
    if "formula" not in text:
        text = inspect.getdoc(cls) or ""
    lines = text.splitlines()
    fields, current = {"title": lines[0] if lines else ""}, None
    for line in lines[1:]:
        start = re.match(r"(\w+)\s+(\S.*)", line)
        if start and start[1] in CARD_FIELDS:
            current, line = start[1], start[2]
            fields[current] = ""
        if current and line.strip():
            # paper and code may share a line
            head, _, code = line.strip().partition("   code   ") if current == "paper" else (line.strip(), "", "")
            fields[current] = f"{fields[current]} {head.strip()}".strip()
            if code:
                fields["code"] = code.strip()
    return fields
