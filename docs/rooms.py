"""The rooms of src/lora_lite and who imports whom, read from the imports; `just table` writes docs/rooms.md.

`faults` is the rule that tests/whole/test_rooms.py holds: an import goes to a lower floor or stays in its room, never up, and
no files import each other in a circle.
"""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "lora_lite"
FLOORS = {
    8: ("lora_lite",),
    7: ("cli", "observe"),
    6: ("variants", "algebra", "peft", "testing", "templates"),
    5: ("core", "families"),
    4: ("calibration",),
    3: ("contract",),
    2: ("sites", "mathematics"),
    1: ("errors", "version"),
}
"""Rooms from the top floor to the ground; `lora_lite` is the package's own page with the names that users have."""

ALIASES = ("annotations", "attention", "geometry", "linalg", "objectives", "spec", "targets")
"""Names of modules that users have had since before there were rooms: one file each, which imports and says nothing."""

TOP = ("__init__", "__main__", *ALIASES)
VARIANT = ("contract", "mathematics", "families", "calibration", "errors")
"""What a variant file may import."""

floor_of = {room: floor for floor, rooms in FLOORS.items() for room in rooms}


def modules(source: Path) -> dict[str, Path]:
    """{dotted name below the package, "" for itself: file}."""
    found = {}
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room_of(module: str) -> str:
    """The room of a module; files that may stand at the top belong to the package's own page."""
    first = module.partition(".")[0]
    return "lora_lite" if first in ("", *TOP) else first


def imports(source: Path) -> dict[str, dict[str, int]]:
    """{module: {module of this package that it imports, anywhere in the file: line}}."""
    known = modules(source)
    return {module: dict(imported(module, path, known)) for module, path in known.items()}


def imported(module: str, path: Path, known: dict[str, Path]) -> Iterator[tuple[str, int]]:
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [(alias.name.split("."), []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".") if package else []
            start = ["lora_lite", *up[: len(up) - node.level + 1]] if node.level else []
            targets = [([*start, *(node.module or "").split(".")], [alias.name]) for alias in node.names]
        else:
            continue
        for parts, name in targets:
            if parts[0] != "lora_lite":
                continue
            base = ".".join(part for part in parts[1:] if part)
            whole = ".".join(filter(None, (base, *name)))
            if whole in known and whole != module:
                yield whole, node.lineno
            elif base in known and base != module:
                yield base, node.lineno


def faults(source: Path) -> list[str]:
    """One sentence for every file outside the rooms, every import that goes up or sideways, and every circle."""
    told = []
    edges = imports(source)
    for module in edges:
        if room_of(module) not in floor_of:
            told.append(
                f"{module} stands in no room. Rooms: {', '.join(floor_of)}; docs/contribute.md says which is for what, and "
                "docs/rooms.py lists them."
            )
    for module, targets in edges.items():
        here = room_of(module)
        for target, line in targets.items():
            there = room_of(target)
            if here == there or here not in floor_of or there not in floor_of:
                continue
            where = f"{module or '__init__'} (line {line}) imports {target or 'the package itself'}"
            if floor_of[there] >= floor_of[here]:
                up, down = floor_of[there], floor_of[here]
                told.append(
                    f"{where}: {there} is on floor {up}, {here} on floor {down}. An import goes down: move what is needed to "
                    f"floor {down - 1} or below, or this code to floor {up + 1} or above."
                )
            elif here == "variants" and there not in VARIANT:
                told.append(f"{where}: a variant's file imports {', '.join(VARIANT)} and nothing else.")
    return told + [f"These import each other in a circle: {' -> '.join(circle)}." for circle in circles(edges)]


def circles(edges: dict[str, dict[str, int]]) -> list[list[str]]:
    """The first circle of files, a package's own page aside, which imports its files."""
    inner = {m: [t for t in targets if not is_door(t, edges)] for m, targets in edges.items() if not is_door(m, edges)}
    try:
        TopologicalSorter(inner).prepare()
    except CycleError as error:
        return [error.args[1]]
    return []


def is_door(module: str, edges: dict[str, dict[str, int]]) -> bool:
    return module == "" or any(other.startswith(f"{module}.") for other in edges)


def headline(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(text.split("\n\n")[0].split())


def page() -> str:
    """docs/rooms.md."""
    edges = imports(SOURCE)
    known = modules(SOURCE)
    below: dict[str, set[str]] = {}
    for module, targets in edges.items():
        below.setdefault(room_of(module), set()).update(room_of(target) for target in targets)
    width = max(len(room) for room in floor_of)
    lines = ["floor  room" + " " * (width - 2) + "imports"]
    for floor, rooms in FLOORS.items():
        for room in rooms:
            lower = [r for r in floor_of if r in below.get(room, ()) and r != room and r != "lora_lite"]
            lines.append(f"{floor:>5}  {room:<{width}}  {' '.join(lower) or '-'}".rstrip())
    text = [
        "# The rooms",
        "",
        "The source, `src/lora_lite`, is a house: each folder is a room on a floor. An import goes down or stays in its room",
        "(`tests/whole/test_rooms.py`). The list says which rooms each room imports; read upwards to see who notices a change.",
        "[Contribute](contribute.md#where-code-belongs) says which room is for what. `just table` writes this page from the",
        "imports and the first sentences of the files.",
        "",
        "```",
        *lines,
        "```",
    ]
    for rooms in FLOORS.values():
        for room in rooms:
            members = {m: p for m, p in known.items() if m and room_of(m) == room}
            files = {m: p for m, p in members.items() if not is_door(m, edges) and room not in ("errors", "version")}
            door = known.get("" if room == "lora_lite" else room)
            if room in ("variants", "templates") or door is None:
                files = {}
            text += ["", f"## {room}", ""]
            if room == "templates":
                text += ["What `just new-variant NAME` fills in: a variant file, its test, its review page."]
                continue
            if door is not None:
                text += [headline(door)]
            if room == "variants":
                text += ["", "[The table](variants.md) lists them, [writing a variant](writing-a-variant.md) adds one."]
            if files:
                text += ["", "| file | what it holds |", "|---|---|"]
                rows = {m.replace(".", "/"): headline(p).replace("|", "\\|") for m, p in files.items()}
                text += [f"| `{name}.py` | {line} |" for name, line in rows.items()]
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    print(page(), end="")
