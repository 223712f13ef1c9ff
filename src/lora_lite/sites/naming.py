"""Which modules the names in a method stand for: itself, what it holds at any depth, aliases and the turns of loops."""

import ast

Path = tuple[str, ...]
"""Names from a module down to another; ANY stands for every child."""
ANY = "*"
DEEP = 6  # names of a path that is followed
NUMBERS = ("weight", "bias")


class Names:
    """Which modules the names of a method stand for."""

    def __init__(self, me: str):
        self.known: dict[str, set[Path]] = {me: {()}}
        self.taken: set[int] = set()  # expressions that only give a module another name

    def paths(self, node: ast.AST) -> set[Path]:
        """The modules that an expression may stand for."""
        if isinstance(node, ast.Name):
            return self.known.get(node.id, set())
        if isinstance(node, ast.Attribute) and node.attr not in NUMBERS:
            return {(*path, node.attr) for path in self.paths(node.value) if len(path) < DEEP}
        if isinstance(node, ast.Subscript):
            at = node.slice.value if isinstance(node.slice, ast.Constant) else None
            name = str(at) if isinstance(at, (int, str)) else ANY
            return {(*path, name) for path in self.paths(node.value) if len(path) < DEEP}
        if isinstance(node, ast.IfExp):
            return self.paths(node.body) | self.paths(node.orelse)
        return set()

    def learn(self, node: ast.AST) -> None:
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            self.give(node.targets[0], node.value, ())
        elif isinstance(node, (ast.For, ast.comprehension)):
            self.each(node.target, node.iter)

    def give(self, target: ast.expr, value: ast.expr, more: Path) -> None:
        if isinstance(target, ast.Name) and (paths := self.paths(value)):
            self.known[target.id] = self.known.get(target.id, set()) | {(*path, *more) for path in paths if len(path) < DEEP}
            self.taken |= {id(part) for part in ([value.body, value.orelse] if isinstance(value, ast.IfExp) else [])} | {
                id(value)
            }
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and not more:
            for one, other in zip(target.elts, value.elts):
                self.give(one, other, ())

    def each(self, target: ast.expr, source: ast.expr) -> None:
        """The names of one turn of a loop."""
        if not isinstance(source, ast.Call):
            self.give(target, source, (ANY,))
            return
        parts = target.elts if isinstance(target, ast.Tuple) else [target]
        word = getattr(source.func, "id", getattr(source.func, "attr", ""))
        if word in ("values", "children", "items", "named_children") and isinstance(source.func, ast.Attribute):
            self.taken.add(id(source.func))
            self.give(parts[-1], source.func.value, (ANY,))
        elif word == "enumerate" and source.args:
            self.each(parts[-1], source.args[0])
        elif word in ("reversed", "list", "tuple", "iter") and source.args:
            self.each(target, source.args[0])
        elif word == "zip":
            for part, given in zip(parts, source.args):
                self.each(part, given)
