"""A griffe extension: settings declared by `_help(default, text)` show their text as a docstring, and their default."""

from __future__ import annotations

import ast
from typing import Any

from griffe import Attribute, Docstring, ExprCall, Extension, ObjectNode


class Settings(Extension):
    """Reads what dataclass fields keep in their metadata, where a static reader sees a call only."""

    def on_attribute_instance(self, *, node: ast.AST | ObjectNode, attr: Attribute, **_: Any) -> None:
        value = getattr(node, "value", None)
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "_help":
            assert isinstance(attr.value, ExprCall)
            attr.docstring = Docstring(ast.literal_eval(value.args[1]), parent=attr)
            attr.value = attr.value.arguments[0]
