"""SAMSum: messenger dialogues and their summaries (Gliwa et al. 2019, arXiv:1911.12237).

The reward is the F-measure of ROUGE-L against the one reference; ROUGE-1 and ROUGE-2 are reported
beside it, all by rouge-score with stemming, as published numbers are.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from statistics import fmean
from typing import Any, Literal

from loralab.errors import UserError
from loralab.tasks.base import Example, Message, Prompt, Score, Split
from loralab.tasks.splits import rows_of_split, text_field

_log = logging.getLogger(__name__)

INSTRUCTIONS = "Summarize the dialogue in a few sentences."
KINDS = ("rouge1", "rouge2", "rougeL")

_LONGEST = 10_000
"""Characters of a completion that are read: ROUGE-L takes time by its length."""


class Dialogue:
    """The dialogues of a folder or of the hub.

    path: a folder with files named train... and test..., rows of `dialogue` and `summary`; or a hub
        name.
    shots: summarised training dialogues in each prompt, the same ones for all (seeded).
    style: "chat" is one user message, "plain" is text to be continued behind "Summary:".
    examples: at most this many of each split, the first ones.
    """

    name = "samsum"
    reward_floor = 0.0
    full_marks = 1.0

    def __init__(
        self,
        *,
        path: str = "knkarthick/samsum",
        shots: int = 0,
        style: Literal["chat", "plain"] = "chat",
        examples: int | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 <= shots <= 16:
            raise UserError(f"samsum: shots is {shots}, expected 0 to 16")
        if examples is not None and examples < 1:
            raise UserError(f"samsum: examples is {examples}, expected 1 or more")
        self.path = path
        self.shots = shots
        self.style = style
        self.count = examples
        self.seed = seed
        self._read: dict[Split, list[Example]] = {}

    def examples(self, split: Split) -> Sequence[Example]:
        """Data holds `dialogue` and `summary`; rows without either are left out."""
        return self._all(split)[: self.count]

    def prompt(self, example: Example) -> Prompt:
        """The instructions, the shots and the dialogue. An example is never its own shot."""
        shown = [shot for shot in self._shots if shot.id != example.id][: self.shots]
        solved = [f"{_asked(shot)} {shot.data['summary']}" for shot in shown]
        text = "\n\n".join([INSTRUCTIONS, *solved, _asked(example)])
        return text if self.style == "plain" else [Message(role="user", content=text)]

    def score(self, example: Example, completion: str) -> Score:
        """ROUGE-L; parts: the three. `correct` is None: no summary is the right one."""
        # What goes on with a next dialogue is not part of the summary.
        own = completion[:_LONGEST].split("\n\nDialogue:", maxsplit=1)[0]
        parts = rouge(str(example.data["summary"]), own)
        return Score(parts["rougeL"], None, parts)

    def gold(self, example: Example) -> str | None:
        """The reference summary."""
        summary = str(example.data["summary"])
        # In plain style it stands right behind "Summary:".
        return f" {summary}" if self.style == "plain" else summary

    def metrics(self, answered: Sequence[tuple[Example, str]]) -> Mapping[str, float]:
        """rouge1, rouge2, rougeL: mean F-measures, 0 to 1."""
        scores = [self.score(example, completion).parts for example, completion in answered]
        return {kind: fmean(score[kind] for score in scores) for kind in KINDS}

    @cached_property
    def _shots(self) -> list[Example]:
        if not self.shots:
            return []
        train = self._all("train")
        return random.Random(self.seed).sample(train, min(self.shots + 1, len(train)))

    def _all(self, split: Split) -> list[Example]:
        if split not in self._read:
            rows = rows_of_split(self.path, split)
            if not rows:
                raise UserError(f"samsum: {self.path} holds no {split} file")
            found = []
            for number, row in enumerate(rows):
                dialogue = text_field(row, "dialogue").replace("\r\n", "\n").strip()
                summary = text_field(row, "summary").replace("\r\n", "\n").strip()
                if dialogue and summary:
                    data = {"dialogue": dialogue, "summary": summary}
                    found.append(Example(f"{split}-{number}", data))
            if len(found) < len(rows):
                left_out = len(rows) - len(found)
                _log.warning("samsum: %d of %d %s rows are empty", left_out, len(rows), split)
            self._read[split] = found
        return self._read[split]


def rouge(reference: str, text: str) -> dict[str, float]:
    """F-measures of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004), stemmed, 0 to 1."""
    scores = _scorer().score(reference, text)
    return {kind: float(scores[kind].fmeasure) for kind in KINDS}


@cache
def _scorer() -> Any:
    # A second to import, and listing tasks needs none of it.
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(KINDS), use_stemmer=True)


def _asked(example: Example) -> str:
    return f"Dialogue:\n{example.data['dialogue']}\n\nSummary:"
