"""Real text that every CPython carries: English prose (docstrings, the language reference) and Python source code.

A document is one module (or one topic of the reference). Which documents are held out follows from a hash of the name
alone, so the split depends neither on order nor on the machine, and a module held out for code is held out for prose too.
"""

import ast
import contextlib
import functools
import hashlib
import importlib.util
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

# Tests repeat their subject, lib2to3 and idlelib carry generated tables, encodings are character maps,
# _sysconfigdata differs from machine to machine, pydoc_data is the reference itself.
SKIPPED = ("test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "site-packages", "__pycache__")
HELD_OUT_SHARE = 0.1
VALIDATION_SHARE = 0.05
SHORTEST_PARAGRAPH = 40


Part = Literal["train", "validation", "test"]


def part_of(name: str) -> Part:
    """The part a document belongs to, decided by SHA-256 of its name alone."""
    place = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32
    if place < HELD_OUT_SHARE:
        return "test"
    return "validation" if place < HELD_OUT_SHARE + VALIDATION_SHARE else "train"


def is_held_out(name: str) -> bool:
    """Whether the document belongs to the tenth that nothing is trained on or chosen by."""
    return part_of(name) == "test"


def standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def modules(root: Path) -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of every module below `root`, in the order of the names."""
    found = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if not set(parts) & set(SKIPPED) and not parts[-1].startswith("_sysconfigdata"):
            found[".".join(parts)] = path
    yield from sorted(found.items())


@functools.cache
def code(*parts: Part) -> dict[str, str]:
    """Source text of the standard library's modules in these parts."""
    chosen = ((name, path) for name, path in modules(standard_library()) if part_of(name) in parts)
    return {name: path.read_text("utf-8", errors="replace") for name, path in chosen}


def docstrings(source: str) -> str:
    """The docstrings of a module and of its classes and functions, joined by blank lines."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        tree = ast.parse(source)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(text for text in texts if text and len(text) >= SHORTEST_PARAGRAPH)


@functools.cache
def prose(held_out: bool) -> dict[str, str]:
    """The language reference and the docstrings of the standard library on one side of the split."""
    from pydoc_data.topics import topics

    documents = {f"topic {name}": text for name, text in topics.items() if is_held_out(f"topic {name}") == held_out}
    sources = code("test") if held_out else code("train", "validation")
    documents |= {name: docstrings(source) for name, source in sources.items()}
    return {name: text for name, text in documents.items() if text}


def library_prose(packages: tuple[str, ...]) -> dict[str, str]:
    """Docstrings of installed packages: more prose for pretraining, never used to measure."""
    documents = {}
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"{package} is not installed: pip install {package}")
        for name, path in modules(Path(spec.origin).parent):
            with contextlib.suppress(SyntaxError):  # a file written for a newer Python
                documents[f"{package}.{name}"] = docstrings(path.read_text("utf-8", errors="replace"))
    return {name: text for name, text in documents.items() if text}


def without_paragraphs(documents: dict[str, str], known: set[str]) -> dict[str, str]:
    """The documents less every longer paragraph that is in `known` or stood earlier; `known` grows by what is kept.

    Libraries copy docstrings between files, and a held-out sentence must not be met in training.
    """
    kept = {}
    for name, text in documents.items():
        fresh = []
        for paragraph in text.split("\n\n"):
            key = " ".join(paragraph.split())
            if len(key) < SHORTEST_PARAGRAPH or key not in known:
                fresh.append(paragraph)
                known.add(key)
        kept[name] = "\n\n".join(fresh).strip("\n")
    return {name: text for name, text in kept.items() if text}


def joined(documents: dict[str, str]) -> bytes:
    return "\n\n\n".join(documents.values()).encode()


def digest(data: bytes) -> str:
    """Identifies the data in a record: another Python version carries other text."""
    return hashlib.sha256(data).hexdigest()[:16]
