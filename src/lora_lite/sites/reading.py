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
from typing import Any, NamedTuple

from torch import nn

from .naming import ANY, NUMBERS, Names, Path

ABOUT = ("dtype", "device", "shape", "size", "ndim", "requires_grad", "is_meta", "SCB", "quant_state")
"""What is asked of a weight without using its numbers."""
ASKING = ("isinstance", "hasattr", "getattr", "len", "bool", "callable")
"""Calls that a condition may make and that change nothing."""


class Readings(NamedTuple):
    """Of the modules that a module holds, at any depth: read and never called; read in one branch and called in another; read
    and called in one go.
    """

    never: frozenset[Path]
    branch: frozenset[Path]
    beside: frozenset[Path]


class Uses(NamedTuple):
    """Places whose weight or bias is used as numbers, those of them where no branch decides it, and places used otherwise."""

    read: frozenset[Path]
    always: frozenset[Path]
    used: frozenset[Path]

    def covers(self, path: Path) -> bool:
        """Whether the module there, or one that holds it, is used otherwise."""
        return any(all(ANY in (a, b) or a == b for a, b in zip(used, path)) for used in self.used)


NOTHING = Uses(frozenset(), frozenset(), frozenset())


def readings(owner: nn.Module) -> Readings:
    """What a module does with the modules below it.

    Followed are forward, public methods that call a child, and what they call of themselves; names that stand for a module, as
    in `l = self.l` and `for l in self.layers`. Nothing is told where one hands itself to somebody else, or its source is not
    to be had.
    """
    children = frozenset(owner._modules)
    uses = at_first_sight(type(owner), children)
    if any(map(uses.covers, uses.read)):
        if sources(type(owner))["forward"][1].__module__.startswith("torch.nn"):  # takes its short cuts without hooks only
            uses = uses._replace(read=frozenset(p for p in uses.read if not uses.covers(p)))
        else:
            uses = follow(sources(type(owner)), children, owner)
    places = {place for path in uses.read for place in below(owner, path)}
    always = {place for path in uses.always for place in below(owner, path)}
    never = frozenset(place for place in places if not uses.covers(place))
    return Readings(never, frozenset(places - never - always), frozenset(places & always - never))


def below(owner: nn.Module, path: Path) -> Iterator[Path]:
    """The paths of modules that a path with ANY in it means."""
    if not path:
        yield ()
        return
    for name, child in owner._modules.items():
        if child is not None and path[0] in (name, ANY):
            yield from ((name, *rest) for rest in below(child, path[1:]))


@functools.cache
def at_first_sight(kind: type[nn.Module], children: frozenset[str]) -> Uses:
    """What `follow` says of every branch, once for a class."""
    return follow(sources(kind), children, None) if "forward" in sources(kind) else NOTHING


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


def follow(methods: dict[str, tuple[ast.FunctionDef, FunctionType]], children: frozenset[str], owner: nn.Module | None) -> Uses:
    """What the methods do with the modules below their own; where an owner is given, in branches that it can reach."""
    calling = [name for name, (tree, _) in methods.items() if not name.startswith("_") and children & called(tree)]
    todo, seen, found = ["forward", *calling], set(), NOTHING
    while todo:
        name = todo.pop()
        if name in seen or name not in methods:
            continue
        seen.add(name)
        tree, function = methods[name]
        known = constants(tree, function, owner) if owner is not None else None
        nodes = [node for statement in tree.body for node in reached(statement, known)]
        calls = [node for node in nodes if isinstance(node, ast.Call)]
        me = first_argument(tree)
        if any(isinstance(given, ast.Name) and given.id == me for call in calls for given in call.args):
            return NOTHING
        todo += [word for call in calls if (word := of_self(call.func, me))]
        own = uses_in(nodes, me, {id(node) for statement in tree.body for node in conditional(statement)})
        found = Uses(*(a | b for a, b in zip(found, own)))
    return found


def uses_in(nodes: list[ast.AST], me: str, in_branches: set[int]) -> Uses:
    names = Names(me)
    for _ in range(2):  # a name may be given after the loop that uses it
        for node in nodes:
            names.learn(node)
    about = [node for node in nodes if isinstance(node, ast.Attribute) and (node.attr in ABOUT or node.attr.endswith("_"))]
    asked = names.taken | {id(node.value) for node in about}  # weight.div_(2) writes
    for call in nodes:
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in ASKING:
            asked |= {id(given) for given in call.args}
    read, always, used = set(), set(), set()
    for node in nodes:
        if isinstance(node, ast.Attribute) and node.attr in NUMBERS:
            asked.add(id(node.value))
            if isinstance(node.ctx, ast.Load) and id(node) not in asked:
                read |= (paths := names.paths(node.value))
                always |= set() if id(node) in in_branches else paths
        elif isinstance(node, (ast.Attribute, ast.Subscript)) and names.paths(node):
            asked.add(id(node.value))
    for node in nodes:
        used |= set() if id(node) in asked or isinstance(getattr(node, "ctx", None), ast.Store) else names.paths(node)
    return Uses(*(frozenset(paths - {()}) for paths in (read, always, used)))


def first_argument(tree: ast.FunctionDef) -> str:
    """What a method calls its own module."""
    given = [*tree.args.posonlyargs, *tree.args.args]
    return given[0].arg if given else ""


def conditional(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes below one that stand in a branch."""
    for below in ast.iter_child_nodes(node):
        branch = isinstance(node, (ast.If, ast.IfExp)) and below is not node.test
        yield from ast.walk(below) if branch else conditional(below)


def called(tree: ast.FunctionDef) -> set[str]:
    """Names that a function calls of itself: x of `self.x(...)`."""
    me = first_argument(tree)
    return {of_self(node.func, me) for node in ast.walk(tree) if isinstance(node, ast.Call)}


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
    me = first_argument(tree)
    unknown = stored | {p.name for p in given if p.name not in known}
    return {name: value for name, value in (function.__globals__ | known | {me: owner}).items() if name not in unknown - {me}}


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
        any(isinstance(node, ast.Attribute) and node.attr == "training" for node in nodes)
        or not all(name in known or name in ASKING for name in names)
        or not all(isinstance(call, ast.Name) and call.id in ASKING for call in calls)
    ):
        return None
    try:
        return bool(eval(compile(ast.Expression(test), "<condition>", "eval"), dict(known)))
    except Exception:  # whatever a stranger's attribute raises
        return None


def of_self(node: ast.AST, me: str) -> str:
    """x of `self.x`, else ""."""
    mine = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == me
    return node.attr if mine else ""  # type: ignore[attr-defined]
