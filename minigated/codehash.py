"""A hash of what a Python file does: comments, docstrings and line breaks do not count, so they age no record."""

import ast
import hashlib
from pathlib import Path

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def _walk(node) -> str:
    """The tree as text. Empty fields are left out, because Python's versions differ in which they have."""
    if isinstance(node, list):
        return "[" + ",".join(_walk(item) for item in node) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = {name: value for name, value in ast.iter_fields(node) if value is not None and value != []}
    if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
        fields["body"] = node.body[1:]
    return type(node).__name__ + "(" + ",".join(f"{name}={_walk(value)}" for name, value in fields.items()) + ")"


def code_hash(path: str | Path) -> str:
    """sha256 of the file's code. The same under Python 3.11 and later."""
    return hashlib.sha256(_walk(ast.parse(Path(path).read_text(encoding="utf-8"))).encode()).hexdigest()
