"""Export in PEFT's own form of a method, where a layout knows it, or why there is none."""

import re
from typing import Any

from torch import Tensor

from ..contract.adapter import Adapter
from ..core import finding
from ..errors import LoraLiteError, some
from ..sites.layer import is_conv1d
from .folder import PREFIX
from .layout import Layout, layouts


def native_obstacle(found: list[finding.Found]) -> str:
    """Why PEFT has no form of its own for these adapters; '' where it has one."""
    known = layouts()
    for f in found:
        layout, variant = known.get(f.adapter.variant), f.adapter.variant
        if layout is None:
            return f"no form of PEFT's own is known for {variant}"
        if isinstance(f.adapter.coeff, Tensor) or f.adapter.coeff != 1.0:
            return "the coefficient is not 1, and PEFT's own forms have none"
        for option, value in layout.only.items():
            if getattr(f.adapter.cfg, option) != value:
                return f"PEFT's {variant} is {option}={value!r}, here {option}={getattr(f.adapter.cfg, option)!r}"
        if missing := [k for k, _ in f.adapter.named_parameters() if k not in layout.tensors]:
            return f"PEFT's {variant} has no {some(missing)}"
        if is_conv1d(f.layer) and not layout.conv1d:
            return f"PEFT has {variant} for nn.Linear alone, {f.path} is Conv1D"
    if len({known[f.adapter.variant].peft_type for f in found}) > 1 or len({f.path for f in found}) < len(found):
        return "several adapters are exported as one"
    try:
        options, _ = as_native(found)
    except LoraLiteError as error:
        return str(error).partition("\n")[0]
    if odd := [f.path for f in found if not known[f.adapter.variant].covers(options, f.path)]:
        return f"PEFT would take the names of other layers for {some(odd)}"
    return ""


def as_native(found: list[finding.Found]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(options, tensors) in PEFT's own form. Raises LoraLiteError where layers need options that PEFT has once."""
    known, each, tensors = layouts(), {}, {}
    for f in found:
        layout, a = known[f.adapter.variant], f.adapter
        each[f.path] = native_options(layout, a)
        for name, key in layout.tensors.items():
            if name in a.specs():
                tensors[f"{PREFIX}model.{f.path}.{key.name}"] = key.write(getattr(a, name))
        for name, key in layout.shared.items():
            tensors[f"{PREFIX}{key.name}"] = key.write(a.shared[name].tensor)
    layout, first = known[found[0].adapter.variant], found[0].adapter.group.cfg
    options: dict[str, Any] = {"peft_type": layout.peft_type}
    for option in next(iter(each.values())):
        values = {path: row[option] for path, row in each.items()}
        if isinstance(values[found[0].path], list):
            options[option] = [item for value in values.values() for item in value]
            continue
        ranked = option == layout.options.get("r")
        common = first.r if ranked else next(iter(values.values()))
        options[option] = common
        others = {f"^{re.escape(path)}$": value for path, value in values.items() if value != common}
        if others and not (layout.patterns and option in (layout.options.get("r"), layout.options.get("alpha"))):
            raise LoraLiteError(f"layers differ in {option} ({some(sorted({str(v) for v in values.values()}))}), PEFT has one")
        if others:
            options["rank_pattern" if ranked else "alpha_pattern"] = others
    return options, tensors


def native_options(layout: Layout, a: Adapter) -> dict[str, Any]:
    """PEFT's options for one layer; alpha is what gives PEFT our scale."""
    values = {theirs: getattr(a.cfg, ours) for ours, theirs in layout.options.items()}
    if "alpha" in layout.options:
        root = "rslora" in layout.options and a.cfg.rslora
        alpha = a.s * (a.cfg.r**0.5 if root else a.cfg.r)
        values[layout.options["alpha"]] = round(alpha) if abs(alpha - round(alpha)) < 1e-9 * abs(alpha) else alpha
    return {**values, **layout.when, **layout.derived(a)}
