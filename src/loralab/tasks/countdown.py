"""Countdown: reach a target with three or four numbers, thinking first.

Reward = 0.1 x format + answer, the rule of Evolution Strategies at Scale (Qiu et al.,
arXiv:2509.24372), after TinyZero.

format: 1.0 for exactly `<think>...</think>\\n<answer>...</answer>`; otherwise 0.1 for a think
    block plus 0.5 for an answer block.
answer: 1.0 if the last answer block holds an expression that uses each given number exactly
    once and lies within 1e-5 of the target; otherwise 0.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from loralab.data.sources import read_rows
from loralab.errors import UserError
from loralab.tasks.base import Example, Message, Prompt, Score, Split, is_message
from loralab.tasks.problems import Problem, generate, problem_from_row, solve
from loralab.tasks.splits import HUB_NAME, draw_shots, rows_of_split

PromptStyle = Literal["chat", "plain"]

_THINK, _END_THINK = "<think>", "</think>"
_ANSWER, _END_ANSWER = "<answer>", "</answer>"

# What varies comes last, so that every prompt of a batch shares this prefix.
INSTRUCTIONS = """\
Write one arithmetic expression that equals the target. Use each of the numbers exactly once, \
the operations + - * / and parentheses. Think inside <think> </think>, then give the expression \
alone inside <answer> </answer> on the next line. For numbers 2, 5, 9 and target 35 that is:
<think>9 - 2 = 7 and 7 * 5 = 35.</think>
<answer>(9 - 2) * 5</answer>

"""
# The problem solved in the instructions: copying it must never score as an answer.
_SHOWN = Problem((2, 5, 9), Fraction(35))

_MOST_SHOTS = 32
_COLUMNS = ("id", "prompt", "context", "numbers", "nums", "target", "solution")


class Countdown:
    """The task, on problems made from a seed or read from files.

    path: a .json, .jsonl, .jsonl.gz or .parquet file, a folder of them, or a hub name (its train
        split); rows hold `numbers` or `nums`, `target`, and maybe `solution` and a ready `prompt`
        (text or messages) or `context` (text). None generates problems.
    test_path: rows of the test split; then `path` gives the training split alone, less the
        problems that the test split holds too.
    examples: how many different problems to use; of a file that holds more, a seeded choice.
        Each of `path` and `test_path` is limited to it on its own.
    test_share: share of the problems that go to the test split, where there is no `test_path`.
    seed: of generation, choice and split.
    sizes, max_number, max_target: how many numbers a generated problem has, and their ranges.
    prompt_style: "chat" is one user message, "plain" is text ending in "<think>", both with the
        instructions first and the numbers last. None takes a row's own prompt where it has one,
        and "chat" where it has none.
    shots: solved training problems in each prompt, the same ones for all (seeded); rows' own
        prompts are not used then. The instructions hold one example as it is.

    Raises:
        UserError: an option out of range; later, a file that cannot be used.
    """

    name = "countdown"
    reward_floor = 0.0
    full_marks = 1.1

    def __init__(
        self,
        *,
        path: str | None = None,
        test_path: str | None = None,
        examples: int = 2_000,
        test_share: float = 0.2,
        seed: int = 0,
        sizes: tuple[int, ...] = (3, 4),
        max_number: int = 99,
        max_target: int = 100,
        prompt_style: PromptStyle | None = None,
        shots: int = 0,
    ) -> None:
        if test_path is not None and path is None:
            raise UserError("countdown: test_path needs path, the file of the training split")
        if examples < 2:
            raise UserError(f"countdown: examples is {examples}, expected 2 or more")
        if not 0 < test_share < 1:
            raise UserError(f"countdown: test_share is {test_share}, expected between 0 and 1")
        if not sizes or not all(1 <= size <= 6 for size in sizes):
            raise UserError(f"countdown: sizes is {list(sizes)}, expected some of 1 to 6")
        if not 1 <= max_number <= 10**6 or not 1 <= max_target <= 10**9:
            raise UserError(
                f"countdown: max_number is {max_number}, max_target {max_target}: expected 1 to "
                "1,000,000 and 1 to 1,000,000,000"
            )
        if not 0 <= shots <= _MOST_SHOTS:
            raise UserError(f"countdown: shots is {shots}, expected 0 to {_MOST_SHOTS}")
        self.path = path
        self.shots = shots
        self.test_path = test_path
        self.count = examples
        self.test_share = test_share
        self.seed = seed
        self.sizes = sizes
        self.max_number = max_number
        self.max_target = max_target
        self.prompt_style = prompt_style

    def examples(self, split: Split) -> Sequence[Example]:
        """The fixed examples of a split; the two never share a problem, in any order of numbers."""
        return self._splits[split]

    def prompt(self, example: Example) -> Prompt:
        """The instructions and the problem, or the row's own prompt (see `prompt_style`)."""
        own = _own_prompt(example.data, f"countdown example {example.id}")
        if own is not None and self.prompt_style is None and not self.shots:
            return own
        shown = [shot for shot in self._drawn if shot.id != example.id][: self.shots]
        solved = [f"{_posed(shot)}{_THINK}{_solved(shot)}\n\n" for shot in shown]
        text = f"{INSTRUCTIONS}{''.join(solved)}{_posed(example)}"
        if self.prompt_style == "plain":
            return f"{text}{_THINK}"
        return [Message(role="user", content=text.rstrip())]

    def score(self, example: Example, completion: str) -> Score:
        """0.1 x format + answer, from 0 to 1.1; `correct` is whether the answer is right.

        A completion of a prompt that ends in "<think>" continues it, so it is read with that tag
        before it.
        """
        text = _THINK + completion if self._opens_thought(example) else completion
        form = format_score(text)
        expression = last_answer(text)
        right = expression is not None and _problem(example).solved_by(expression)
        answer = 1.0 if right else 0.0
        return Score(0.1 * form + answer, right, {"format": form, "answer": answer})

    def answer(self, example: Example, completion: str) -> str | None:
        """The last expression in answer tags without its spaces, to vote by."""
        found = last_answer(_THINK + completion if self._opens_thought(example) else completion)
        return None if found is None else "".join(found.split()) or None

    def gold(self, example: Example) -> str | None:
        """The row's solution, or one found by search, in the right form; None if there is none."""
        solved = _solved(example)
        if solved is None:
            return None
        return solved if self._opens_thought(example) else f"{_THINK}{solved}"

    def _opens_thought(self, example: Example) -> bool:
        prompt = self.prompt(example)
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        return text.rstrip().endswith(_THINK)

    @cached_property
    def _drawn(self) -> list[Example]:
        if not self.shots:
            return []
        # Enough of them that some are solved, few enough that no search takes long.
        first = self._splits["train"][: 10 * (self.shots + 1)]
        known = [example for example in first if _solved(example) is not None]
        return draw_shots(self.name, known, self.shots, self.seed, self.path)

    @cached_property
    def _splits(self) -> dict[Split, list[Example]]:
        if self.path is None:
            problems = generate(
                self.count,
                seed=self.seed,
                sizes=self.sizes,
                max_number=self.max_number,
                max_target=self.max_target,
                excluded=[_SHOWN.key],
            )
            return self._cut([_example(str(i), problem) for i, problem in enumerate(problems)])
        examples = self._read(self.path)
        if self.test_path is None:
            return self._cut(examples)
        test = self._read(self.test_path)
        held_out = {_problem(example).key for example in test}
        train = [example for example in examples if _problem(example).key not in held_out]
        if not train:
            raise UserError(f"every problem of {self.path} is in {self.test_path} too")
        return {"train": train, "test": test}

    def _cut(self, examples: list[Example]) -> dict[Split, list[Example]]:
        at = len(examples) - round(self.test_share * len(examples))
        if not 0 < at < len(examples):
            raise UserError(
                f"countdown: {len(examples)} problems cannot be split with test_share "
                f"{self.test_share}: both sides need at least one"
            )
        return {"train": examples[:at], "test": examples[at:]}

    def _read(self, path: str) -> list[Example]:
        """Different problems of a file, in seeded order, at most `count` of them."""
        unique: dict[Any, Example] = {}
        local = Path(path).expanduser().exists() or not HUB_NAME.fullmatch(path)
        rows = read_rows(path, _COLUMNS) if local else rows_of_split(path, "train")
        for number, row in enumerate(rows):
            problem = problem_from_row(row.data, row.place)
            own = _own_prompt(row.data, row.place)
            identity = str(row.data.get("id", number))
            unique.setdefault(problem.key, _example(identity, problem, own))
        examples = list(unique.values())
        random.Random(self.seed).shuffle(examples)
        return examples[: self.count]


def format_score(text: str) -> float:
    """1.0 whole, 0.1 think block only, 0.5 answer block only, 0.6 both but not whole, else 0.

    The same as these expressions (dot matches newline), in linear time where a regular expression
    takes quadratic: `^<think>.*?</think>\\n<answer>.*?</answer>$`, `<think>.*?</think>`,
    `<answer>.*?</answer>`. `$` allows one newline after the end.
    """
    if text.startswith(_THINK):
        seam = text.find(f"{_END_THINK}\n{_ANSWER}", len(_THINK))
        if seam >= 0 and text.removesuffix("\n").endswith(_END_ANSWER):
            return 1.0
    think = _has_block(text, _THINK, _END_THINK)
    answer = _has_block(text, _ANSWER, _END_ANSWER)
    return (0.1 if think else 0.0) + (0.5 if answer else 0.0)


def last_answer(text: str) -> str | None:
    """Content of the last answer block, or None.

    Blocks are read from the left and end at the first closing tag, as
    `re.findall("<answer>(.*?)</answer>")` does, but found from the right in linear time.
    """
    opened = text.rfind(_ANSWER, 0, max(text.rfind(_END_ANSWER), 0))
    if opened < 0:
        return None
    closed = text.find(_END_ANSWER, opened)
    before = text.rfind(_END_ANSWER, 0, opened)
    start = text.find(_ANSWER, before + len(_END_ANSWER) if before >= 0 else 0)
    return text[start + len(_ANSWER) : closed]


def _has_block(text: str, opening: str, closing: str) -> bool:
    at = text.find(opening)
    return at >= 0 and text.find(closing, at + len(opening)) >= 0


def _example(identity: str, problem: Problem, prompt: Prompt | None = None) -> Example:
    data: dict[str, Any] = {"numbers": list(problem.numbers), "target": _decimal(problem.target)}
    if problem.solution is not None:
        data["solution"] = problem.solution
    if prompt is not None:
        data["prompt"] = prompt
    return Example(identity, data)


def _posed(example: Example) -> str:
    problem = _problem(example)
    numbers = ", ".join(map(str, problem.numbers))
    return f"Numbers: {numbers}\nTarget: {_decimal(problem.target)}\n"


def _solved(example: Example) -> str | None:
    """What follows the opening tag of a full answer; None if no solution is known or found."""
    problem = _problem(example)
    solution = problem.solution
    if solution is None or not problem.solved_by(solution):
        solution = solve(problem)
    if solution is None:
        return None
    result = _decimal(problem.target)
    return f"{solution} = {result}.{_END_THINK}\n{_ANSWER}{solution}{_END_ANSWER}"


def _problem(example: Example) -> Problem:
    return problem_from_row(example.data, f"countdown example {example.id}")


def _decimal(target: Fraction) -> str:
    """A target as it was written: "98", "27.4"."""
    return str(target) if target.denominator == 1 else _digits(target)


def _digits(value: Fraction) -> str:
    # Targets come from decimal text, so the denominator divides a power of ten.
    places = next(p for p in range(1, 400) if 10**p % value.denominator == 0)
    scaled = abs(value.numerator) * 10**places // value.denominator
    whole, part = divmod(scaled, 10**places)
    return f"{'-' if value < 0 else ''}{whole}.{part:0{places}d}"


def _own_prompt(row: Mapping[str, Any], place: str) -> Prompt | None:
    own = row.get("prompt")
    if own is None:
        own = row.get("context")
    if own is None or isinstance(own, str):
        return own
    if isinstance(own, Sequence) and own and all(is_message(turn) for turn in own):
        return [Message(role=turn["role"], content=turn["content"]) for turn in own]
    raise UserError(
        f"{place}: `prompt` is neither text nor messages, each with `role` and `content` as text"
    )
