"""Policies from text: `parse("H2O(0.25, recent=32) | KIVI(bits=2)")`, for command lines and configuration strings.

A small part of Python, read from its syntax tree; nothing is evaluated. There are calls of the policies in
`kvbench.policies` with literals or policies as arguments, `|`, and `KIVI(2).keys & FP8().values`. What `str` makes of a
stack is read back as the same stack.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from kvbench.policies import POLICIES, Full, Mixed, Policy, Quantizer, Stack
from kvbench.policies.interface import Side

_CALLABLE: dict[str, type[Policy]] = {**POLICIES, "Mixed": Mixed}


class PolicyTextError(ValueError):
    """A text that names no stack of policies; the message is one line."""


def parse(text: str) -> Stack:
    """The stack that the expression `text` makes; `Full()` adds nothing to one. Raises PolicyTextError."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError) as error:
        raise PolicyTextError(f"cannot read the policy {text!r}: write it as {_EXAMPLE}") from error
    policy = _policy(tree.body)
    return Stack(tuple(p for p in Stack((policy,)).policies if not isinstance(p, Full)))


_EXAMPLE = '"H2O(0.25, recent=32) | KIVI(bits=2)" or "KIVI(2).keys & FP8().values"'


def _policy(node: ast.expr) -> Policy:
    value = _value(node)
    if not isinstance(value, Policy):
        raise PolicyTextError(f"{ast.unparse(node)} is not a policy: write it as {_EXAMPLE}")
    return value


def _value(node: ast.expr) -> Any:
    """A policy, the side of one, or a literal."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _policy(node.left) | _policy(node.right)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd):
        return _made(lambda: _side(node.left) & _side(node.right), "&")
    if isinstance(node, ast.Attribute):
        return _side(node)
    if isinstance(node, ast.Call):
        return _call(node)
    if isinstance(node, ast.Name):
        _known(node.id)
        raise PolicyTextError(f"write {node.id}(), with its settings in the parentheses, instead of {node.id}")
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise PolicyTextError(f"{ast.unparse(node)} is neither a policy nor a literal: use {_EXAMPLE}") from error


def _call(node: ast.Call) -> Policy:
    if not isinstance(node.func, ast.Name):
        raise PolicyTextError(f"{ast.unparse(node.func)} is not the name of a policy: write it as {_EXAMPLE}")
    made = _known(node.func.id)
    settings = [f.name for f in fields(made) if f.init]  # type: ignore[arg-type]
    named: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg not in settings:
            raise PolicyTextError(f"{made.__name__} has no setting {keyword.arg!r}; there are: {', '.join(settings)}")
        named[keyword.arg] = _value(keyword.value)
    values = [_value(argument) for argument in node.args]
    return _made(lambda: made(*values, **named), made.__name__)


def _side(node: ast.expr) -> Side:
    if not isinstance(node, ast.Attribute) or node.attr not in ("keys", "values"):
        raise PolicyTextError(f"{ast.unparse(node)} is not one side of a quantizer: write KIVI(2).keys & FP8().values")
    of = _policy(node.value)
    if not isinstance(of, Quantizer):
        raise PolicyTextError(f"{of} is not a quantizer, so it has no .{node.attr}")
    return Side(of, 0 if node.attr == "keys" else 1)


def _known(name: str) -> type[Policy]:
    if name not in _CALLABLE:
        raise PolicyTextError(f"no policy named {name!r} in kvbench.policies; there are: {', '.join(_CALLABLE)}")
    return _CALLABLE[name]


def _made(make: Callable[[], Any], name: str) -> Any:
    """What `make()` gives; what the policies have against their settings, as PolicyTextError."""
    try:
        return make()
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split()).removeprefix(f"{name}.__init__() ")
        raise PolicyTextError(reason if reason.startswith(name) else f"{name}: {reason}") from error
