"""Whether a module calls the layers it holds or reads their weights as numbers, from the source of its forward.

A branch counts where it can be reached: its condition is worked out from the module's own attributes, the defaults of forward's
arguments and the constants of its file, wherever these are known.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from types import FunctionType
from typing import Any

from torch import nn

ABOUT = ("dtype", "device", "shape", "size", "ndim", "requires_grad", "is_meta")
"""What is asked of a weight without using its numbers."""
ASKING = ("isinstance", "hasattr", "getattr", "len", "bool", "callable")
"""Calls that a condition may make and that change nothing."""


def readings(owner: nn.Module) -> tuple[frozenset[str], frozenset[str]]:
    """(children that are read and never called, children that are read in one branch and called in another).

    Followed are forward, public methods that call a child, and what they call of themselves. Nothing is told where one hands
    itself to somebody else, or its source is not to be had.
    """
    methods, children = sources(type(owner)), frozenset(owner._modules)
    read, used = at_first_sight(type(owner), children)
    if read & used and not type(owner).__module__.startswith("torch.nn"):  # these take their short cuts without hooks only
        read, used = follow(methods, children, owner)
        return read - used, read & used
    return read - used, frozenset()


@functools.cache
def at_first_sight(kind: type[nn.Module], children: frozenset[str]) -> tuple[frozenset[str], frozenset[str]]:
    """What `follow` says of every branch, once for a class."""
    return follow(sources(kind), children, None)


@functools.cache
def sources(kind: type[nn.Module]) -> dict[str, tuple[ast.FunctionDef, FunctionType]]:
    """{name: (its syntax, the function)} of the methods of a class and its bases that are modules; {} where one is hidden."""
    found = {}
    for base in reversed(kind.__mro__):
        if base in (nn.Module, object) or not issubclass(base, nn.Module) or "modules.container" in base.__module__:
            continue
        try:
            own = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        except (OSError, TypeError, SyntaxError):
            return {}
        for part in getattr(own, "body", []):
            if isinstance(part, ast.FunctionDef):
                found[part.name] = part, inspect.unwrap(vars(base).get(part.name, found))
    return found


def follow(
    methods: dict[str, tuple[ast.FunctionDef, FunctionType]], children: frozenset[str], owner: nn.Module | None
) -> tuple[frozenset[str], frozenset[str]]:
    """(children whose weight or bias is used as numbers, children that are used otherwise)."""
    calling = [name for name, (tree, _) in methods.items() if not name.startswith("_") and children & called(tree)]
    todo, seen, read, used = ["forward", *calling], set(), set(), set()
    while todo:
        name = todo.pop()
        if name in seen or name not in methods:
            continue
        seen.add(name)
        tree, function = methods[name]
        known = constants(tree, function, owner) if owner is not None else None
        nodes = [node for statement in tree.body for node in reached(statement, known)]
        calls = [node for node in nodes if isinstance(node, ast.Call)]
        if any(isinstance(given, ast.Name) and given.id == "self" for call in calls for given in call.args):
            return frozenset(), frozenset()
        todo += [found for call in calls if (found := of_self(call.func))]
        asked = {id(node.value) for node in nodes if isinstance(node, ast.Attribute) and node.attr in ABOUT}
        asked |= {
            id(given) for call in calls if isinstance(call.func, ast.Name) and call.func.id in ASKING for given in call.args
        }
        weights = [node for node in nodes if isinstance(node, ast.Attribute) and node.attr in ("weight", "bias")]
        inner = {id(node.value) for node in weights}
        read |= {of_self(n.value) for n in weights if isinstance(n.ctx, ast.Load) and id(n) not in asked}
        used |= {of_self(node) for node in nodes if id(node) not in inner}
    return frozenset(read & children), frozenset(used & children)


def called(tree: ast.AST) -> set[str]:
    """Names that a function calls of itself: x of `self.x(...)`."""
    return {of_self(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def reached(node: ast.AST, known: dict[str, Any] | None) -> Iterator[ast.AST]:
    """Nodes below one, without the branches whose condition is known to fail; all of them where nothing is known."""
    yield node
    if isinstance(node, (ast.If, ast.IfExp)) and known is not None:
        taken = truth(node.test, known)
        parts = [node.test, *((node.body, node.orelse) if taken is None else (node.body,) if taken else (node.orelse,))]
        for part in parts:
            for below in part if isinstance(part, list) else [part]:
                yield from reached(below, known)
        return
    for below in ast.iter_child_nodes(node):
        yield from reached(below, known)


def constants(tree: ast.FunctionDef, function: FunctionType, owner: nn.Module) -> dict[str, Any]:
    """What a method's conditions may speak of: itself, the defaults of arguments that it keeps, its file's own names."""
    stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    given = inspect.signature(function).parameters.values()
    known = {p.name: p.default for p in given if p.default is not p.empty and tree.name == "forward"}
    unknown = stored | {p.name for p in given if p.name not in known}
    return {
        name: value
        for name, value in (function.__globals__ | known | {"self": owner}).items()
        if name not in unknown - {"self"}
    }


def truth(test: ast.expr, known: dict[str, Any]) -> bool | None:
    """Whether a condition holds; None where it depends on what is not known. self.training is not: both are used."""
    if isinstance(test, ast.BoolOp):
        parts, deciding = [truth(part, known) for part in test.values], isinstance(test.op, ast.Or)
        return deciding if deciding in parts else None if None in parts else not deciding
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        inner = truth(test.operand, known)
        return None if inner is None else not inner
    nodes = list(ast.walk(test))
    names = [node.id for node in nodes if isinstance(node, ast.Name)]
    calls = [node.func for node in nodes if isinstance(node, ast.Call)]
    if (
        "training" in [of_self(node) for node in nodes]
        or not all(name in known or name in ASKING for name in names)
        or not all(isinstance(call, ast.Name) and call.id in ASKING for call in calls)
    ):
        return None
    try:
        return bool(eval(compile(ast.Expression(test), "<condition>", "eval"), dict(known)))
    except Exception:  # whatever a stranger's attribute raises
        return None


def of_self(node: ast.AST) -> str:
    """x of `self.x`, else ""."""
    mine = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return node.attr if mine else ""  # type: ignore[attr-defined]
