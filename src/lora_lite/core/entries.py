"""The entries of a checkpoint's header, checked one by one: names, numbers, hashes and tables of what they are to hold."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..contract.config import PATTERNS
from ..contract.strict import NAME, is_count, is_name, parsed, printable, refuse_boundless, shown

OF_ADAPTER = {"variant": str, "config": dict, "layers": dict, "groups": dict, "lineage": dict, "drawn": dict}
MOST_RANK = 2**16


@dataclass(frozen=True)
class Stored:
    """One adapter of a file.

    config   JSON text; prefix stands before each of its patterns, which are of an older grammar
    layers   {path: its place}, or None where the file is older than places
    tensors  {"<layer path>.<name>": tensor}
    """

    variant: str
    config: str
    layers: dict[str, dict[str, Any] | None]
    tensors: dict[str, Tensor]
    lineage: dict[str, Any] = field(default_factory=dict)
    drawn: dict[str, str] = field(default_factory=dict)
    prefix: str = ""


def adapter_of(name: str, one: Any, base: dict[str, Any]) -> Stored:
    """One adapter, without its tensors. Raises ValueError that names the entry."""
    refuse_no_name(name, "an adapter's name")
    for entry, kind in OF_ADAPTER.items():
        if not isinstance(one, dict) or not isinstance(one.get(entry), kind):
            raise ValueError(f"{entry} of adapter {name!r} is no {kind.__name__}")
    if not one["layers"]:
        raise ValueError(f"adapter {name!r} has no layers")
    for place, said in one["layers"].items():
        refuse_no_place(place, said, name, base)
    return stored(one["variant"], one["config"], one["layers"], {}, one["lineage"], one["drawn"], f" of adapter {name!r}")


def refuse_no_place(place: str, said: Any, name: str, base: dict[str, Any]) -> None:
    where = f"{printable(place[:NAME])} of adapter {name!r}"
    if place not in base or not isinstance(said, dict) or "rank" not in said:
        raise ValueError(f"{where} has no fingerprint or no rank")
    for entry in ("rank", "experts"):
        if said.get(entry) is not None and not is_count(said[entry], 1, MOST_RANK):
            raise ValueError(f"{entry} of {where} is {shown(said[entry])}, no number from 1 to {MOST_RANK}")
    options = said.get("options", {})
    if not isinstance(options, dict) or (options := options.keys() & {"r", "coeff", *PATTERNS}):
        raise ValueError(f"options of {where} are no table, or say what stands elsewhere: {shown(options)}")
    refuse_boundless(said, f"what is said of {where}")


def stored(variant: Any, config: Any, layers: Any, tensors: Any, lineage: Any, drawn: Any, of: str, prefix: str = "") -> Stored:
    """The parts of one adapter, checked one by one. Raises ValueError that names the entry."""
    refuse_no_name(variant, f"variant{of}")
    refuse_boundless(config, f"config{of}")
    if lineage.keys() - {"id", "step"}:
        raise ValueError(f"lineage has more than id and step{of}")
    if not is_name(lineage.get("id", "")) or not is_count(lineage.get("step", 0)):
        raise ValueError(f"lineage{of} is {shown(lineage)}")
    for name, found in drawn.items():
        refuse_no_name(name, f"a name in drawn{of}")
        refuse_no_hash(found, f"drawn {name!r}{of}")
    return Stored(variant, json.dumps(config), layers, tensors, lineage, drawn, prefix)


def base_of(found: dict[str, Any], version: int) -> dict[str, dict[str, Any]]:
    """The fingerprints {path: {shape, dtype, sha256, bias}}; files before version 4 have no bias."""
    for path, said in found.items():
        if not is_name(path):
            raise ValueError(f"{shown(path)} in base is no path")
        if not isinstance(said, dict):
            raise ValueError(f"base of {path} is no table")
        shape, dtype = said.get("shape"), said.get("dtype")
        if not isinstance(shape, list) or not all(map(is_count, shape)) or not is_name(dtype):
            raise ValueError(f"base of {path} has no shape or no dtype")
        refuse_no_hash(said.get("sha256"), f"sha256 of {path} in base")
        if said.get("bias") is not None:
            refuse_no_hash(said["bias"], f"bias of {path} in base")
    return found


def versions_of(found: dict[str, Any]) -> dict[str, str]:
    if not all(is_name(text) for pair in found.items() for text in pair):
        raise ValueError("versions is no table of names")
    return found


def table(header: Mapping[str, str], entry: str) -> dict[str, Any]:
    found = parsed(header[entry], entry)
    if not isinstance(found, dict):
        raise ValueError(f"{entry} is no table")
    return found


def refuse_no_name(value: Any, what: str) -> None:
    if not is_name(value) or not value.strip():
        raise ValueError(f"{what} is {shown(value)}, no name of at most {NAME} letters that are printed")


def refuse_no_hash(value: Any, what: str) -> None:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{32,64}", value):
        raise ValueError(f"{what} is {shown(value)}, no hash")
