"""Read the configs that MMEngine dumps, without running them.

MMEngine's configs are Python programs, and its own reader runs them. What a run leaves in its folder and in its
checkpoints is a program, too, but one that only assigns literals: that much is read here, and anything else is refused.
"""

from __future__ import annotations

import ast
import math
from typing import Any

#: How ``repr`` writes the numbers that have no literal.
_NAMES = {"inf": math.inf, "nan": math.nan}


def read_dumped_config(text: str, source: str) -> dict[str, Any]:
    """Read assignments of literals, ``name = dict(key=[1, 'a', (2.0, None)])``; no name is looked up, none is called.

    Args:
        text: as ``mmengine.Config.dump`` writes it.
        source: how errors name the text.

    Raises:
        ValueError: if the text is anything else, naming the line.
    """
    try:
        statements = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{source} is not a config that a run dumped: {error}") from error
    found = {}
    for statement in statements:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        if len(targets) != 1 or not isinstance(targets[0], ast.Name):
            raise _refusal(statement, source)
        try:
            found[targets[0].id] = _literal(statement.value, source)
        except (RecursionError, TypeError) as error:  # nested without end, or a list as the key of a dictionary
            raise _refusal(statement, source) from error
    return found


def _literal(node: ast.expr, source: str) -> Any:
    """Evaluate a literal, and ``dict(...)`` of literals."""
    match node:
        case ast.Constant(value=None | bool() | int() | float() | str()):
            return node.value
        case ast.Name() if node.id in _NAMES:
            return _NAMES[node.id]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = _literal(operand, source)
            if isinstance(value, int | float):
                return -value
        case ast.List() | ast.Tuple() | ast.Set():
            kind = {ast.List: list, ast.Tuple: tuple, ast.Set: set}[type(node)]
            return kind(_literal(item, source) for item in node.elts)
        case ast.Dict(keys=keys, values=values) if None not in keys:
            return {_literal(key, source): _literal(value, source) for key, value in zip(keys, values, strict=True)}
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords) if all(word.arg for word in keywords):
            return {word.arg: _literal(word.value, source) for word in keywords}
    raise _refusal(node, source)


def _refusal(node: ast.AST, source: str) -> ValueError:
    code = " ".join(ast.unparse(node).split())
    return ValueError(
        f"{source}, line {node.lineno}: {code[:80]} is code, which is not run; a run's own config holds values only. "
        f"To use a config file that you trust, name it as config=FILE (--config)"
    )
