"""Exact, bounded arithmetic on text that a model wrote.

Never `eval`: `9**9**9` hangs it. Only + - * / and parentheses exist here, on exact rationals, so
`//` and `**` are errors of syntax. Nothing recurses and every size is bounded, so any text at
all is answered in milliseconds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from operator import add, mul, sub

MAX_CHARS = 1_000
"""Longer text is no expression. Four numbers, fully parenthesised, take about 30 characters."""

MAX_DEPTH = 100
"""More open parentheses than this at once is no expression."""

# `\d` would also match the digits of other scripts, which int() reads as numbers. One newline
# at the end is let through because the reference rule's `$` lets it through.
_ALLOWED = re.compile(r"[0-9+\-*/() ]+\n?")
_TOKEN = re.compile(r"[0-9]+|[-+*/()]")
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2, "negate": 3}
_EXACT = {"+": add, "-": sub, "*": mul}


@dataclass(frozen=True)
class Evaluated:
    """The value of an expression, and the numbers written in it from left to right."""

    value: Fraction
    numbers: tuple[int, ...]


def evaluate(text: str) -> Evaluated | None:
    """Value of an arithmetic expression, or None if the text is not one.

    Follows Python's rules where they apply: `*` and `/` before `+` and `-`, left to right, any
    run of unary signs, no leading zeros ("007" is an error, "00" is not). Division is exact;
    by zero it gives None. Time is linear in the text up to MAX_CHARS, constant beyond.

    >>> evaluate("(1 + 2) / 4").value
    Fraction(3, 4)
    >>> evaluate("9**9**9") is None
    True
    """
    if len(text) > MAX_CHARS or not _ALLOWED.fullmatch(text):
        return None
    tokens = _TOKEN.findall(text)
    numbers = [token for token in tokens if token[0].isdigit()]
    if any(token[0] == "0" and token.strip("0") for token in numbers):
        return None
    value = _value(tokens)
    return None if value is None else Evaluated(value, tuple(map(int, numbers)))


def _value(tokens: list[str]) -> Fraction | None:
    """Operator precedence with two explicit stacks (Dijkstra's shunting yard)."""
    values: list[Fraction] = []
    operators: list[str] = []
    depth = 0
    operand_next = True
    for token in tokens:
        if operand_next:
            if token == "(":
                depth += 1
                if depth > MAX_DEPTH:
                    return None
                operators.append(token)
            elif token == "-":
                operators.append("negate")
            elif token.isdigit():
                values.append(Fraction(int(token)))
                operand_next = False
            elif token != "+":
                return None
        elif token == ")":
            if depth == 0:
                return None
            depth -= 1
            while operators[-1] != "(":
                if not _apply(operators.pop(), values):
                    return None
            operators.pop()
        elif token in _PRECEDENCE:
            while operators and _PRECEDENCE.get(operators[-1], 0) >= _PRECEDENCE[token]:
                if not _apply(operators.pop(), values):
                    return None
            operators.append(token)
            operand_next = True
        else:
            return None
    if operand_next or depth:
        return None
    while operators:
        if not _apply(operators.pop(), values):
            return None
    return values[0]


def _apply(operator: str, values: list[Fraction]) -> bool:
    """Replace the operands on the stack by the result; False on division by zero."""
    right = values.pop()
    if operator == "negate":
        values.append(-right)
    elif operator != "/":
        values.append(_EXACT[operator](values.pop(), right))
    elif right:
        values.append(values.pop() / right)
    else:
        return False
    return True
