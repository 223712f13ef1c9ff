"""What the library's default does to an architecture, as text for people: expected.md holds one entry for each."""

import re
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from torch import nn

import lora_lite as ll

from .models import FAMILIES, FAMILY, ZOO, forward

FILE = Path(__file__).with_name("expected.md")
HEAD = """# What "all-linear" takes

For every architecture of the zoo: what `ll.attach(model, ll.config("lora", r=2))` adapts, what it skips and why, and what lies
outside both.
Written by `python -m tests.zoo.write`, held by tests/zoo/test_selection.py: read the difference before you commit it.
`*` stands for a number in a path. "not called" is what this batch did not reach.
"""


REFUSED = "refused: "


def starred(paths: Iterable[str]) -> str:
    """'model.layers.*.mlp.down_proj x2, lm_head' of paths."""
    counts = Counter(map(without_numbers, paths))
    return ", ".join(path + (f" x{n}" if n > 1 else "") for path, n in counts.items())


def without_numbers(text: str) -> str:
    """'layers.*.mlp' of 'layers.3.mlp'; numbers that are no component of a path stay."""
    return re.sub(r"(?<=[\w*]\.)\d+\b|\b\d+(?=\.\w)", "*", text)


def entry(name: str) -> str:
    """The text below the heading of one architecture. A refusal stands there as one."""
    row = ZOO[name]
    model = row.build()
    title = f"{type(model).__name__}, batch of {row.kind_of_batch}"
    outside = owners(model)
    try:
        handle, warned = default(model)
    except ll.LoraLiteError as error:
        return f"{REFUSED}{str(error).splitlines()[0]}"
    forward(model, row.batch())
    lines = [f"- adapted: {leaves(handle.layers)}"]
    reasons = {path: without_numbers(why) for path, why in handle.skipped.items()}
    for reason in dict.fromkeys(reasons.values()):
        lines.append(f"- skipped: {starred(path for path, why in reasons.items() if why == reason)}: {reason}")
    if rest := share(outside, {*handle.layers, *handle.skipped}):
        lines.append(f"- outside: {rest}")
    lines += [f"- warned: {without_numbers(text)}" for text in warned]
    if dead := ll.status(model).dead:
        lines.append(f"- not called: {starred(dead)}")
    return "\n".join([f"{title}. Layers: {len(handle.layers)}, coverage {handle.coverage:.3f}", "", *lines])


def default(model: nn.Module) -> tuple[ll.Attached, list[str]]:
    """Attach with defaults, and the library's warnings; those of others stay errors."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ll.LoraLiteWarning)
        handle = ll.attach(model, ll.config("lora", r=2))
    assert {warning.category for warning in caught} <= {ll.LoraLiteWarning}
    return handle, [str(warning.message) for warning in caught]


def leaves(paths: Iterable[str]) -> str:
    """'q_proj x2, mlp.* x4' of paths: the last name and the numbers behind it."""
    return starred(found[0] for path in paths if (found := re.search(r"[^.]+(?:\.\d+)*$", path)))


def owners(model: nn.Module) -> dict[str, tuple[str, int]]:
    """{path of a parameter: (kind of the module that owns it, its numbers)}, each parameter once."""
    return {
        path: (type(model.get_submodule(path.rpartition(".")[0])).__name__, parameter.numel())
        for path, parameter in model.named_parameters()
    }


def share(parameters: dict[str, tuple[str, int]], told: set[str]) -> str:
    """'Embedding 14.2 %, LayerNorm 0.9 %' of the parameters that lie under no path that was told."""
    total = sum(n for _, n in parameters.values())
    kinds: Counter[str] = Counter()
    for path, (kind, n) in parameters.items():
        if path not in told and path.rpartition(".")[0] not in told:
            kinds[kind] += n
    return ", ".join(f"{kind} {100 * n / total:.1f} %" for kind, n in kinds.most_common())


def read() -> dict[str, str]:
    """{name: entry} of the file."""
    parts = re.split(r"^### (\w+)\n\n", FILE.read_text(), flags=re.MULTILINE)[1:]
    return {name: re.sub(r"\n+## .*", "", text, flags=re.DOTALL).strip() for name, text in zip(parts[::2], parts[1::2])}


def page(entries: dict[str, str]) -> str:
    sections = [
        f"## {family}\n\n" + "\n\n".join(f"### {row.name}\n\n{entries[row.name]}" for row in rows)
        for family, rows in FAMILIES.items()
    ]
    assert entries.keys() == FAMILY.keys()
    return HEAD + "\n" + "\n\n".join(sections) + "\n"
