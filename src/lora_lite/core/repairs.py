"""The words of selection: reasons grouped, what there is, and repairs that are the user's whole config as code."""

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ..contract.config import AdapterConfig
from ..contract.pattern import exactly, fault, fits
from ..contract.registry import variant_of
from ..errors import closest, some

TIED = "tied: shares its weight with "


def nearest(pattern: str, leaves: Iterable[str]) -> str:
    """The leaf name that is closest to a pattern; "" where none is near."""
    found = closest(pattern.removeprefix("re:").strip("^$").rpartition(".")[2], leaves)
    return found.removeprefix("Closest name: ").removesuffix(".") if found.startswith("Closest") else ""


def patterns_for(paths: Iterable[str], known: Iterable[str]) -> tuple[str, ...]:
    """Patterns that fit these paths and no other known one: numbers become * where that is so, equal ones are said once."""
    paths = list(paths)
    others = set(known) - set(paths)
    found = []
    for path in paths:
        general = ".".join("*" if name.isdecimal() else name for name in path.split("."))
        lawful = [pattern for pattern in (general, path) if not fault(pattern)]
        found.append(next((p for p in lawful if not any(fits(p, other) for other in others)), exactly(path)))
    return tuple(dict.fromkeys(found))


def renaming(wanted: Collection[str], present: Collection[str]) -> dict[str, str]:
    """{start of the wanted paths: start of the paths here} under which all of them are present; {} where there is none."""
    first = next(iter(wanted)).split(".")
    for path in present:
        here = path.split(".")
        same = next((k for k, (a, b) in enumerate(zip(reversed(first), reversed(here))) if a != b), min(len(first), len(here)))
        old, new = (".".join(names[: len(names) - same]) for names in (first, here))
        moved = [f"{new}.{p.removeprefix(old).lstrip('.')}".strip(".") for p in wanted if not old or p.startswith(f"{old}.")]
        if same and len(moved) == len(wanted) and set(moved) <= set(present):
            return {old: new}
    return {}


def options(cfg: AdapterConfig) -> str:
    return f"targets={cfg.targets!r}, exclude={cfg.exclude!r}, layers={cfg.layers!r}, roles={cfg.roles!r}"


def repair(cfg: AdapterConfig, **changes: Any) -> str:
    """The user's own config with some options changed, as code."""
    fields = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)} | changes
    blank = type(cfg)()
    said = {name: value for name, value in fields.items() if value != getattr(blank, name)}
    words = ", ".join([repr(variant_of(cfg).variant), *(f"{name}={value!r}" for name, value in said.items())])
    return f"cfg = ll.config({words})"


def reasons(skipped: Mapping[str, str]) -> str:
    """'attention: a parameter that is read (layers.*.attn.in_proj_weight x6). ...', one phrase for each reason."""
    by: dict[str, list[str]] = {}
    for path, why in skipped.items():
        by.setdefault(why, []).append(path)
    parts = []
    for why, paths in by.items():
        alike: dict[str, list[str]] = {}
        for path in paths:
            alike.setdefault(".".join("*" if name.isdecimal() else name for name in path.split(".")), []).append(path)
        parts.append(f"{some(f'{place} x{len(p)}' if len(p) > 1 else p[0] for place, p in alike.items())}: {why}")
    return "; ".join(parts) + "." if parts else ""


def inventory(present: Iterable[str], of: str = "Linears in this model") -> str:
    """'Linears in this model: q_proj x6, v_proj x6.'"""
    counts = Counter(path.rpartition(".")[2] for path in present)
    return f"{of}: " + some([f"{leaf} x{n}" for leaf, n in counts.items()], most=12) + "."


def order(path: str) -> list[Any]:
    """Blocks by number, names by letter."""
    return [(0, int(name), "") if name.isdecimal() else (1, 0, name) for name in path.split(".")]
