"""Exact arithmetic against Python's own parser, then what must be no expression at all."""

from __future__ import annotations

import ast
from fractions import Fraction
from time import perf_counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loralab.tasks.arithmetic import MAX_CHARS, MAX_DEPTH, evaluate

_OPERATIONS = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.UAdd: lambda a: a,
    ast.USub: lambda a: -a,
}


def reference(text: str) -> Fraction | None:
    """Python's grammar on rationals; None for whatever is not + - * / on integers."""

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        if isinstance(node, ast.UnaryOp):
            return _OPERATIONS[type(node.op)](value(node.operand))
        if isinstance(node, ast.BinOp):
            return _OPERATIONS[type(node.op)](value(node.left), value(node.right))
        raise KeyError(node)

    try:
        return value(ast.parse(text.strip(" "), mode="eval").body)
    except (SyntaxError, KeyError, ZeroDivisionError):
        return None


@settings(max_examples=1500, deadline=None)
@given(st.lists(st.sampled_from([*"0123456789+-*/() ", "12", " (", ")*", "+-"]), max_size=14))
def test_agrees_with_python_on_any_text_of_the_alphabet(parts: list[str]) -> None:
    text = "".join(parts)
    found = evaluate(text)
    assert (None if found is None else found.value) == reference(text)


@settings(max_examples=300, deadline=None)
@given(
    st.recursive(
        st.integers(0, 999).map(str),
        lambda inner: st.one_of(
            st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda t: f"({''.join(t)})"),
            st.tuples(inner, st.sampled_from("+-*/"), inner).map(" ".join),
            inner.map(lambda t: f"-{t}"),
        ),
        max_leaves=12,
    )
)
def test_agrees_with_python_on_expressions(text: str) -> None:
    found = evaluate(text)
    assert (None if found is None else found.value) == reference(text)


def test_exact_where_floats_are_not() -> None:
    assert evaluate("1/3 + 1/3 + 1/3").value == 1
    assert evaluate("(99999999 * 99999999 + 1) - 99999999 * 99999999").value == 1
    assert evaluate(" 8 / (3 - 8/3)").numbers == (8, 3, 8, 3)


ATTACKS = {
    "power tower": "44**35**19",
    "nines": "9**9**9",
    "floor division by zero": "1//0",
    "floor division": "7//2",
    "division by zero": "1/(2-2)",
    "open parentheses": "(" * 10_000,
    "parentheses": "(" * 10_000 + "1" + ")" * 10_000,
    "closed parentheses": ")" * 10_000,
    "deep within the length": "(" * (MAX_DEPTH + 1) + "1" + ")" * (MAX_DEPTH + 1),
    "minuses": "-" * 1_000_000 + "1",
    "digits": "9" * 1_000_000,
    "sum": "1+" * 500_000 + "1",
    "spaces": " " * 1_000_000,
    "product at the limit": "9" * 499 + "*" + "9" * 500 + "*",
    "fractions over the limit": "+".join(f"1/{n}" for n in range(2, 300)),
    "arabic digits": "١+٢",
    "fullwidth digits": "１+２",
    "digits of two scripts": "1٢+3",
    "superscript": "2²",
    "letters": "__import__('os')",
    "exponent": "1e9",
    "underscore": "1_0",
    "leading zero": "007",
    "call": "(44)(19)",
    "neighbours": "44 19",
    "empty": "",
    "empty parentheses": "()",
    "newlines": "1\n+2",
    "tab": "1\t+2",
    "comma": "1,2",
    "trailing operator": "1+",
    "leading operator": "*1",
    "equation": "1+2=3",
    "null byte": "1\x00",
    "lone surrogate": "\ud800",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_are_no_expression_and_take_under_10_ms(name: str) -> None:
    text = ATTACKS[name]
    times = []
    for _ in range(3):
        start = perf_counter()
        assert evaluate(text) is None
        times.append(perf_counter() - start)
    assert min(times) < 0.010


def test_the_longest_honest_sum_is_fast_too() -> None:
    text = "+".join(f"1/{n}" for n in range(2, 170))
    assert len(text) <= MAX_CHARS
    times = []
    for _ in range(3):
        start = perf_counter()
        assert evaluate(text).value == sum(Fraction(1, n) for n in range(2, 170))
        times.append(perf_counter() - start)
    assert min(times) < 0.010


def test_signs_as_python_reads_them() -> None:
    assert evaluate("-3 * -2").value == 6
    assert evaluate("--3").value == 3
    assert evaluate("+-+3 - -4").value == 1
    assert evaluate("-(2 + 3) / 5").value == -1
    assert evaluate("10 - 3 - 2").value == 5
    assert evaluate("12 / 3 / 2").value == 2
