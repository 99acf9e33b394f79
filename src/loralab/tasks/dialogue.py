"""SAMSum: messenger dialogues and their summaries (Gliwa et al. 2019, arXiv:1911.12237).

The reward is the F-measure of ROUGE-L against the one reference; ROUGE-1 and ROUGE-2 are reported
beside it, all by rouge-score with stemming, as published numbers are.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from statistics import fmean
from typing import Any

from loralab.data.sources import Row
from loralab.tasks.base import Example, Message, Prompt, Score, Split
from loralab.tasks.few_shot import FewShot
from loralab.tasks.splits import text_field

_log = logging.getLogger(__name__)

INSTRUCTIONS = "Summarize the dialogue in a few sentences."
KINDS = ("rouge1", "rouge2", "rougeL")

_LONGEST = 10_000
"""Characters of a completion that are read: ROUGE-L takes time by its length."""


class Dialogue(FewShot):
    """The dialogues; options as `FewShot`.

    Rows and data hold `dialogue` and `summary`; rows without either are left out.
    """

    name = "samsum"
    hub = "knkarthick/samsum"
    most_shots = 16

    def prompt(self, example: Example) -> Prompt:
        """The instructions, the shots and the dialogue. An example is never its own shot."""
        shown = self.shots_for(example)
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
        return self.behind_prompt(str(example.data["summary"]))

    def metrics(self, answered: Sequence[tuple[Example, str]]) -> Mapping[str, float]:
        """rouge1, rouge2, rougeL: mean F-measures, 0 to 1."""
        scores = [self.score(example, completion).parts for example, completion in answered]
        return {kind: fmean(score[kind] for score in scores) for kind in KINDS}

    def read(self, split: Split, rows: Sequence[Row]) -> list[Example]:
        """Dialogue and summary of each row that has both."""
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
        return found


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
