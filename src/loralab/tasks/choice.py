"""Multiple choice: eight commonsense sets in the form of LLM-Adapters (arXiv:2304.01933).

The prompt lists the options and their labels; the answer is the last label in the completion:
"answer1 looks right at first, but the correct answer is answer3" answers answer3. Naming the
options is no answer: labels in a row ("answer1/answer2/answer3") and headings of several options
("Answer1: ... Answer2: ...") do not count, or copying the prompt would be right where the right
option is the last one.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

from loralab.data.sources import Row
from loralab.errors import UserError
from loralab.tasks.base import Example, Message, Prompt, Score, Split
from loralab.tasks.splits import cut, draw_shots, rows_of_split, text_field

_log = logging.getLogger(__name__)

Name = Literal[
    "boolq",
    "piqa",
    "social_i_qa",
    "hellaswag",
    "winogrande",
    "ARC-Easy",
    "ARC-Challenge",
    "openbookqa",
]

_LONGEST = 20_000
_MOST_SHOTS = 32
_ENUMERATED = re.compile(r"[\s/,;|&\-*()\"'`.]*(?:(?:or|and)[\s/,;|&\-*()\"'`.]*)?", re.IGNORECASE)
_HEADING = re.compile(r"[*\"'`]{0,3}\s?[:)]")


class Choice:
    """One of the sets, from a folder of the LLM-Adapters repository (`dataset/`).

    dataset: which set. path: its folder, the folder that holds it under its name, a file, or a hub
        name, of which the set is a configuration; rows of `instruction`, `output` and `answer`.
        HellaSwag's own rows (`ctx`, `endings`, `label`) are put into that form.
    shots: solved training questions in each prompt, the same ones for all (seeded).
    test_share, seed: where a set has only one file, this share of its rows, chosen by the seed, is
        the test split and the others are for training. Scores on it do not compare with published
        ones, and the log says so.
    examples: at most this many of each split, the first ones.
    """

    reward_floor = 0.0
    full_marks = 1.0

    def __init__(
        self,
        *,
        dataset: Name,
        path: str,
        shots: int = 0,
        test_share: float = 0.5,
        seed: int = 0,
        examples: int | None = None,
    ) -> None:
        if not 0 < test_share < 1:
            raise UserError(f"choice: test_share is {test_share}, expected between 0 and 1")
        if not 0 <= shots <= _MOST_SHOTS:
            raise UserError(f"choice: shots is {shots}, expected 0 to {_MOST_SHOTS}")
        if examples is not None and examples < 1:
            raise UserError(f"choice: examples is {examples}, expected 1 or more")
        self.name = f"choice-{dataset}"
        self.path = path
        self.shots = shots
        self.test_share = test_share
        self.seed = seed
        self.count = examples
        self._set = dataset

    def examples(self, split: Split) -> Sequence[Example]:
        """Data holds `instruction`, `output`, `answer` and `labels`."""
        return self._splits[split][: self.count]

    def prompt(self, example: Example) -> Prompt:
        """The instruction as it stands in the set: question, options, answer format; behind the
        shots. An example is never its own shot."""
        shown = [shot for shot in self._drawn if shot.id != example.id][: self.shots]
        solved = [f"{shot.data['instruction']}\n\n{shot.data['output']}" for shot in shown]
        text = "\n\n".join([*solved, example.data["instruction"]])
        return [Message(role="user", content=text)]

    def score(self, example: Example, completion: str) -> Score:
        """1 if the last label in the completion is the right one, else 0."""
        found = last_label(completion[-_LONGEST:], example.data["labels"])
        right = found == example.data["answer"]
        parts = {"answer": float(right), "answered": float(found is not None)}
        return Score(float(right), right, parts)

    def answer(self, example: Example, completion: str) -> str | None:
        """The last label, to vote by."""
        return last_label(completion[-_LONGEST:], example.data["labels"])

    def answer_options(self, example: Example) -> Sequence[str]:
        """The labels of the question."""
        labels: Sequence[str] = example.data["labels"]
        return labels

    def gold(self, example: Example) -> str | None:
        """As the set writes it: "the correct answer is answer3"."""
        return str(example.data["output"])

    @cached_property
    def _drawn(self) -> list[Example]:
        train = self._splits["train"] if self.shots else []
        return draw_shots(self.name, train, self.shots, self.seed, self.path)

    @cached_property
    def _splits(self) -> dict[Split, list[Example]]:
        folder = Path(self.path).expanduser()
        if folder.name != self._set and (folder / self._set).is_dir():
            folder = folder / self._set
        at = str(folder) if folder.exists() else self.path
        found: dict[Split, list[Row]] = {
            "train": rows_of_split(at, "train", subset=self._set),
            "test": rows_of_split(at, "test", subset=self._set),
        }
        one = found["train"] or found["test"]
        if not one:
            raise UserError(f"choice: {folder} holds no train or test file")
        if not (found["train"] and found["test"]):
            found = cut(one, self.test_share, self.seed)
            _log.warning(
                "%s: %s has one file alone; %d of its %d rows, chosen by seed %d, are the test "
                "split: its scores do not compare with published ones",
                self.name, folder, len(found["test"]), len(one), self.seed,
            )  # fmt: skip
        return {
            split: [_example(f"{split}-{i}", row) for i, row in enumerate(rows)]
            for split, rows in found.items()
        }


def last_label(text: str, labels: Sequence[str]) -> str | None:
    """The last label that is given as an answer, or None.

    labels: those of the question, such as ("answer1", "answer2"). A label of the same kind that is
    not among them ("answer9") is an answer too, and a wrong one.
    """
    text = text.lower()
    stems = sorted({re.sub(r"[0-9]+$", "", label) for label in labels})
    numbered = any(label[-1].isdigit() for label in labels)
    pattern = rf"(?<!\w)(?:{'|'.join(map(re.escape, stems))}){'[0-9]+' if numbered else ''}(?!\w)"
    mentions = list(re.finditer(pattern, text))
    if not mentions:
        return None
    headings = {m.group() for m in mentions if _HEADING.match(text, m.end())}
    if len(headings) > 1:
        mentions = [m for m in mentions if not _HEADING.match(text, m.end())]
    if not mentions:
        return None
    last = mentions[-1]
    if len(mentions) > 1 and mentions[-2].group() != last.group():
        between = text[mentions[-2].end() : last.start()]
        if _ENUMERATED.fullmatch(between):
            return None
    return last.group()


def _example(identity: str, row: Row) -> Example:
    data = _from_hellaswag(row) if "endings" in row.data else row
    instruction, output = text_field(data, "instruction"), text_field(data, "output")
    answer = text_field(data, "answer").strip().lower()
    listed = instruction.lower().rpartition("answer format:")[2].strip()
    labels = tuple(label.strip() for label in listed.split("/") if label.strip())
    if answer not in labels:
        raise UserError(
            f"{row.place}: answer {answer!r} is not in the answer format {'/'.join(labels)!r}"
        )
    return Example(
        identity,
        {"instruction": instruction, "output": output, "answer": answer, "labels": labels},
    )


def _from_hellaswag(row: Row) -> Row:
    endings, label = row.data.get("endings"), row.data.get("label")
    number = int(label) if isinstance(label, int | str) and str(label).isdigit() else None
    if not isinstance(endings, list) or number is None or number >= len(endings):
        raise UserError(f"{row.place}: expected `endings` and the `label` of one of them")
    names = [f"ending{i}" for i in range(1, len(endings) + 1)]
    options = " ".join(f"Ending{i}: {ending}" for i, ending in enumerate(endings, 1))
    activity = row.data.get("activity_label")
    start = f"{activity}: " if isinstance(activity, str) else ""
    instruction = (
        "Please choose the correct ending to complete the given sentence: "
        f"{start}{text_field(row, 'ctx')}\n\n{options}\n\nAnswer format: {'/'.join(names)}"
    )
    answer = names[number]
    output = f"the correct answer is {answer}"
    return Row({"instruction": instruction, "output": output, "answer": answer}, row.place)


NAMES: tuple[str, ...] = get_args(Name)
