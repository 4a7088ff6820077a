"""What the modules of a script say of each other: definitions nobody uses, names nobody shares.

A word counts as used wherever it stands as a name, an attribute, an argument, an import or a part
of a string, in any module and whatever it means there: too much is kept rather than too little.
"""

import ast
import re
from collections.abc import Collection, Mapping

_Definition = ast.FunctionDef | ast.ClassDef


def drop_unused(trees: Mapping[str, ast.Module], roots: Collection[str]) -> None:
    """Take out of `trees`, in place, what no statement to be kept uses, and every docstring.

    Statements that define one plain name (functions and classes, decorated functions aside, and
    assignments) are kept for their use, all others for themselves.

    Args:
        trees: modules by name.
        roots: names used from outside.
    """
    for tree in trees.values():
        _drop_docstrings(tree)
    known = set(roots)
    waiting = [statement for tree in trees.values() for statement in tree.body]
    kept: set[int] = set()
    while True:
        found = [s for s in waiting if (name := _defined(s)) is None or name in known]
        if not found:
            break
        kept.update(map(id, found))
        known.update(*map(words, found))
        waiting = [statement for statement in waiting if id(statement) not in kept]
    for tree in trees.values():
        tree.body = [statement for statement in tree.body if id(statement) in kept]


def private_names(trees: Mapping[str, ast.Module], roots: Collection[str]) -> dict[str, set[str]]:
    """Functions and variables of each module that no other module has a word for.

    Args:
        trees: modules by name.
        roots: names used from outside.
    """
    spoken = {module: words(tree) | names(tree) for module, tree in trees.items()}
    private: dict[str, set[str]] = {}
    for module, tree in trees.items():
        others = set(roots).union(*(spoken[other] for other in trees if other != module))
        private[module] = {
            name
            for statement in tree.body
            if (name := _defined(statement)) is not None and not isinstance(statement, ast.ClassDef)
        } - others
    return private


def words(tree: ast.AST) -> set[str]:
    """Every word that might refer to something."""
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=text) | ast.Attribute(attr=text) | ast.arg(arg=text):
                found.add(text)
            case ast.alias(name=text) | ast.keyword(arg=str(text)) | ast.Constant(value=str(text)):
                found.update(re.findall(r"\w+", text))
            case _:
                pass
    return found


def names(tree: ast.AST) -> set[str]:
    """Every name that is bound or read, arguments and attributes aside."""
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=text) | ast.FunctionDef(name=text) | ast.ClassDef(name=text):
                found.add(text)
            case ast.alias(name=text, asname=other):
                found.add(other or text.split(".")[0])
            case _:
                pass
    return found


def _defined(statement: ast.stmt) -> str | None:
    """The name for whose sake alone a statement exists."""
    match statement:
        case ast.FunctionDef(name=name, decorator_list=[]) | ast.ClassDef(name=name):
            return name
        case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
            return name
        case _:
            return None


def _drop_docstrings(tree: ast.Module) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | _Definition):
            node.body = [s for s in node.body if not _is_string(s)] or [ast.Pass()]


def _is_string(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
