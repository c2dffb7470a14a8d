"""Boolean functions of library cells: the expression syntax of Liberty, as trees and as truth tables."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from bitwright.core.errors import InputError

_TOKEN = re.compile(r"\s*(?:([A-Za-z_][\w\[\]$.]*)|([01])|([!'^&*|+()]))")


@dataclass(frozen=True)
class Expression:
    """A node: a variable (`name`), a constant (`"0"`, `"1"`), or an operator over `arguments`."""

    operator: Literal["var", "const", "not", "and", "or", "xor"]
    name: str = ""
    arguments: tuple[Expression, ...] = ()

    def variables(self) -> tuple[str, ...]:
        """Names of the variables, in the order of their first appearance."""
        if self.operator == "var":
            return (self.name,)
        return tuple(dict.fromkeys(name for argument in self.arguments for name in argument.variables()))


@cache
def parse_function(text: str) -> Expression:
    """Read a Liberty function such as `"!(A B) + C'"`.

    Operators by falling precedence: `!` before and `'` after an operand, `^`, then `&`, `*` or nothing between two
    operands, then `|` or `+` (Liberty User Guide, attribute "function"). Raises InputError when it cannot be read.
    """
    tokens: list[str] = []
    position = 0
    while position < len(text.rstrip()):
        match = _TOKEN.match(text, position)
        if match is None:
            raise InputError(f"Cannot read the function {text!r}: unexpected {text[position:].strip()[:1]!r}.")
        tokens.append(match.group(1) or match.group(2) or match.group(3))
        position = match.end()
    tokens.append("")
    tree, end = _disjunction(tokens, 0, text)
    if tokens[end]:
        raise InputError(f"Cannot read the function {text!r}: unexpected {tokens[end]!r}.")
    return tree


def _disjunction(tokens: list[str], at: int, text: str) -> tuple[Expression, int]:
    tree, at = _conjunction(tokens, at, text)
    while tokens[at] in ("|", "+"):
        right, at = _conjunction(tokens, at + 1, text)
        tree = Expression("or", arguments=(tree, right))
    return tree, at


def _conjunction(tokens: list[str], at: int, text: str) -> tuple[Expression, int]:
    tree, at = _exclusive(tokens, at, text)
    while tokens[at] not in ("", ")", "|", "+"):
        right, at = _exclusive(tokens, at + (tokens[at] in ("&", "*")), text)
        tree = Expression("and", arguments=(tree, right))
    return tree, at


def _exclusive(tokens: list[str], at: int, text: str) -> tuple[Expression, int]:
    tree, at = _operand(tokens, at, text)
    while tokens[at] == "^":
        right, at = _operand(tokens, at + 1, text)
        tree = Expression("xor", arguments=(tree, right))
    return tree, at


def _operand(tokens: list[str], at: int, text: str) -> tuple[Expression, int]:
    token = tokens[at]
    if token == "!":
        inner, at = _operand(tokens, at + 1, text)
        return Expression("not", arguments=(inner,)), at
    if token == "(":
        tree, at = _disjunction(tokens, at + 1, text)
        if tokens[at] != ")":
            raise InputError(f"Cannot read the function {text!r}: a parenthesis is not closed.")
        at += 1
    elif token in ("0", "1"):
        tree, at = Expression("const", name=token), at + 1
    elif token and token not in "'^&*|+)":
        tree, at = Expression("var", name=token), at + 1
    else:
        raise InputError(f"Cannot read the function {text!r}: an operand is missing.")
    while tokens[at] == "'":
        tree, at = Expression("not", arguments=(tree,)), at + 1
    return tree, at


def truth_table(tree: Expression, variables: Sequence[str]) -> int:
    """Truth table as an integer: bit `i` is the value where variable `j` has bit `j` of `i`.

    Raises InputError when the expression uses a variable that is not listed.
    """
    rows = 1 << len(variables)
    full = (1 << rows) - 1
    columns = {}
    for j, name in enumerate(variables):
        block = 1 << j  # `block` zeros, `block` ones, repeated
        columns[name] = sum(((1 << block) - 1) << start for start in range(block, rows, 2 * block))
    return _evaluate(tree, columns, full)


def _evaluate(tree: Expression, columns: dict[str, int], full: int) -> int:
    if tree.operator == "var":
        if tree.name not in columns:
            raise InputError(f"The function uses {tree.name!r}, which is not an input. Inputs: {', '.join(columns)}.")
        return columns[tree.name]
    if tree.operator == "const":
        return full if tree.name == "1" else 0
    values = [_evaluate(argument, columns, full) for argument in tree.arguments]
    if tree.operator == "not":
        return full ^ values[0]
    left, right = values
    return left & right if tree.operator == "and" else left | right if tree.operator == "or" else left ^ right
