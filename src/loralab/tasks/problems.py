"""Countdown problems: numbers and a target. Read from rows, made from a seed, solved by search."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from loralab.errors import UserError
from loralab.tasks.arithmetic import evaluate

TOLERANCE = Fraction(1, 100_000)
"""How near the target a value must be (strictly), as in the reference rule."""

_DECIMAL = re.compile(r"\s*[+-]?[0-9]{1,40}(\.[0-9]{0,40})?\s*")
_LARGEST = 10**12
_MOST_NUMBERS = 10
_MOST_SOLVED = 4

Key = tuple[tuple[int, ...], Fraction]


@dataclass(frozen=True)
class Problem:
    """Reach `target` with each of `numbers` exactly once and + - * /.

    solution: an expression known to reach it, where one is known.
    """

    numbers: tuple[int, ...]
    target: Fraction
    solution: str | None = None

    @property
    def key(self) -> Key:
        """Equal for two problems that differ in the order of the numbers only."""
        return tuple(sorted(self.numbers)), self.target

    def solved_by(self, expression: str) -> bool:
        """Whether the text is an expression that uses each number exactly once and is near
        enough to the target. Bounded in time for any text."""
        found = evaluate(expression)
        return (
            found is not None
            and sorted(found.numbers) == sorted(self.numbers)
            and abs(found.value - self.target) < TOLERANCE
        )


def problem_from_row(row: Mapping[str, Any], place: str) -> Problem:
    """The problem in a row with `numbers` or `nums`, `target`, and maybe `solution`.

    The target may be an integer, a float, or decimal text ("27.4").

    Raises:
        UserError: a field is missing or is not what it should be; names the place.
    """
    numbers = row.get("numbers", row.get("nums"))
    if not isinstance(numbers, Sequence) or isinstance(numbers, str):
        raise UserError(f"{place}: `numbers` (or `nums`) is {numbers!r}, expected a list")
    if not 1 <= len(numbers) <= _MOST_NUMBERS:
        raise UserError(f"{place}: {len(numbers)} numbers, expected 1 to {_MOST_NUMBERS}")
    for number in numbers:
        whole = isinstance(number, int) and not isinstance(number, bool)
        if not whole or not 0 <= number < _LARGEST:
            raise UserError(
                f"{place}: number {number!r}, expected an integer from 0 to below {_LARGEST:,}"
            )
    solution = row.get("solution")
    if solution is not None and not isinstance(solution, str):
        raise UserError(f"{place}: solution {solution!r}, expected text or null")
    return Problem(tuple(numbers), _target(row.get("target"), place), solution)


def _target(value: Any, place: str) -> Fraction:
    if isinstance(value, int) and not isinstance(value, bool):
        return Fraction(value)
    if isinstance(value, float) and math.isfinite(value):
        return Fraction(str(value))
    if isinstance(value, str) and _DECIMAL.fullmatch(value):
        return Fraction(value)
    raise UserError(f"{place}: target {value!r}, expected a number")


def generate(
    count: int,
    *,
    seed: int,
    sizes: Sequence[int] = (3, 4),
    max_number: int = 99,
    max_target: int = 100,
    excluded: Iterable[Key] = (),
) -> list[Problem]:
    """Different problems, each with a solution that built it.

    Numbers are drawn from 1 to `max_number` and joined two at a time by a random operation. Every
    value on the way is a positive integer, the last one is the target, from 1 to `max_target`.
    `sizes` take turns, so that each is equally frequent in any stretch.

    Raises:
        UserError: the ranges hold too few different problems.
    """
    rng = random.Random(seed)
    seen = set(excluded)
    problems: list[Problem] = []
    misses = 0
    while len(problems) < count:
        problem = _draw(rng, sizes[len(problems) % len(sizes)], max_number, max_target)
        if problem is None or problem.key in seen:
            misses += 1
            if misses > 10_000:
                raise UserError(
                    f"only {len(problems)} of {count} different problems found with numbers up to "
                    f"{max_number} and targets up to {max_target}: widen them or ask for fewer"
                )
            continue
        misses = 0
        seen.add(problem.key)
        problems.append(problem)
    return problems


def _draw(rng: random.Random, size: int, max_number: int, max_target: int) -> Problem | None:
    numbers = tuple(rng.randint(1, max_number) for _ in range(size))
    terms = [(number, str(number)) for number in numbers]
    while len(terms) > 1:
        rng.shuffle(terms)
        (a, left), (b, right) = terms.pop(), terms.pop()
        choices = {"+": a + b, "*": a * b}
        if a > b:
            choices["-"] = a - b
        if a % b == 0:
            choices["/"] = a // b
        operator = rng.choice(sorted(choices))
        terms.append((choices[operator], f"({left} {operator} {right})"))
    target, solution = terms[0]
    if not 1 <= target <= max_target:
        return None
    return Problem(numbers, Fraction(target), solution[1:-1] if size > 1 else solution)


def solve(problem: Problem) -> str | None:
    """An expression that reaches the target, by exhaustive search; None if there is none.

    Searches up to four numbers (some milliseconds) and answers None beyond.
    """
    if len(problem.numbers) > _MOST_SOLVED:
        return None
    found = _search([(Fraction(n), str(n)) for n in problem.numbers], problem.target)
    return found[1:-1] if found and found.startswith("(") else found


def _search(terms: list[tuple[Fraction, str]], target: Fraction) -> str | None:
    if len(terms) == 1:
        value, text = terms[0]
        return text if abs(value - target) < TOLERANCE else None
    for i in range(len(terms)):
        for j in range(i + 1, len(terms)):
            rest = [term for k, term in enumerate(terms) if k not in (i, j)]
            for joined in _joined(terms[i], terms[j]):
                if found := _search([*rest, joined], target):
                    return found
    return None


def _joined(
    first: tuple[Fraction, str], second: tuple[Fraction, str]
) -> list[tuple[Fraction, str]]:
    (a, x), (b, y) = first, second
    ways = [
        (a + b, f"({x} + {y})"),
        (a * b, f"({x} * {y})"),
        (a - b, f"({x} - {y})"),
        (b - a, f"({y} - {x})"),
    ]
    if b:
        ways.append((a / b, f"({x} / {y})"))
    if a:
        ways.append((b / a, f"({y} / {x})"))
    return ways
