"""Contamination: does training text hold what a task is evaluated on?

Two texts overlap where they share 13 words in a row (Brown et al. 2020, arXiv:2005.14165,
appendix C). What many evaluated texts have is the wording of the task, not a leak, and does not
count. An evaluated row is *in* the training data where one training row holds most of it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loralab.data.documents import Document
from loralab.errors import UserError

GRAM = 13
"""Words in a row that two texts share only by copying."""

LEAST = 6
"""A whole text of fewer words says too little."""

MOST_OF_IT = 0.8
"""Share of an evaluated row's 13-grams in one training row from which on it is that row."""

_COMMON = 10
_WORDING = 8
_OWN = 9
"""Words of an evaluated row's 13 that have to be its own, not its task's wording: other rows too go
on from the wording as conversations begin ("Hi, do you need me to")."""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Overlap:
    """One training row and one evaluated row that share words.

    share: of the evaluated row's 13-grams that the training row has. words: the first of them.
    """

    train: str
    task: str
    example: str
    share: float
    words: str

    @property
    def is_row(self) -> bool:
        """The evaluated row itself stands in the training data."""
        return self.share >= MOST_OF_IT


@dataclass(frozen=True)
class Contamination:
    """What the check found. train, evaluated: how many texts of each were compared."""

    train: int
    evaluated: int
    overlaps: tuple[Overlap, ...]

    @property
    def rows(self) -> tuple[Overlap, ...]:
        """Evaluated rows that are in the training data."""
        return tuple(overlap for overlap in self.overlaps if overlap.is_row)

    def refuse_rows(self) -> None:
        """Raises UserError where an evaluated row is in the training data, naming the first."""
        if not self.rows:
            return
        first = self.rows[0]
        raise UserError(
            f"contamination: {len(self.rows)} rows that {first.task} evaluates on are in the "
            f"training data, the first at {first.train} (example {first.example}): a score would "
            "measure memory; contamination.action=drop leaves such rows out, "
            "contamination.action=off trains on them all the same, `loralab data check` lists them"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        overlaps = [{**asdict(overlap), "is_row": overlap.is_row} for overlap in self.overlaps]
        return {"train": self.train, "evaluated": self.evaluated, "overlaps": overlaps}


def contamination(
    train: Iterable[Document], evaluated: Mapping[str, Sequence[Document]]
) -> Contamination:
    """Compare training rows with the rows that tasks are evaluated on.

    evaluated: by task; a row may be several texts (its prompt, its answer) of one place. A text
        of 6 to 12 words counts where a training row equals it, or holds it as a line of its own.

    >>> from loralab.data.documents import Document
    >>> question = Document("test-1", "If Ann has three apples and eats two of them, how many are left?")
    >>> contamination([question], {"sums": [question]}).rows[0].share
    1.0
    """  # noqa: E501  (a text has to have 13 words)
    index: dict[str, list[tuple[str, int]]] = {}
    sizes: dict[tuple[str, int], int] = {}
    for task, documents in evaluated.items():
        wording = _wording(documents)
        for number, text in enumerate(documents):
            own = _own_grams(text.text, wording)
            sizes[task, number] = len(own)
            for gram in own:
                index.setdefault(gram, []).append((task, number))
    count = 0
    overlaps: list[Overlap] = []
    for document in train:
        count += 1
        shared: dict[tuple[str, int], list[str]] = {}
        for gram in dict.fromkeys((*_grams(document.text), *_short_lines(document.text))):
            for place in index.get(gram, ()):
                shared.setdefault(place, []).append(gram)
        best: dict[tuple[str, str], Overlap] = {}
        for (task, number), same in shared.items():
            example = evaluated[task][number].place
            share = len(same) / sizes[task, number]
            if (task, example) not in best or share > best[task, example].share:
                best[task, example] = Overlap(document.place, task, example, share, same[0])
        overlaps += best.values()
    overlaps.sort(key=lambda overlap: -overlap.share)
    return Contamination(count, sum(map(len, evaluated.values())), tuple(overlaps))


def _wording(documents: Sequence[Document]) -> set[str]:
    """Runs of 8 words that many of these texts have. Shorter than 13, so that a run that goes on
    from the wording into a row's first word by chance does not count either."""
    found = [set(_runs(_WORD.findall(d.text.casefold()), _WORDING)) for d in documents]
    times = Counter(run for runs in found for run in runs)
    common = max(1, min(_COMMON, len(documents) // 2))
    return {run for run, count in times.items() if count > common}


def _own_grams(text: str, wording: set[str]) -> set[str]:
    """The runs that speak for an evaluated text: enough of their words are its own."""
    words = _WORD.findall(text.casefold())
    shared = [False] * len(words)
    for start, run in enumerate(_runs(words, _WORDING)):
        if run in wording:
            shared[start : start + _WORDING] = [True] * _WORDING
    if LEAST <= len(words) < GRAM:
        return set() if any(shared) else {" ".join(words)}
    return {
        gram
        for start, gram in enumerate(_runs(words, GRAM))
        if shared[start : start + GRAM].count(False) >= _OWN
    }


def _runs(words: list[str], length: int) -> Iterator[str]:
    for start in range(len(words) - length + 1):
        yield " ".join(words[start : start + length])


def _grams(text: str) -> Iterator[str]:
    """Every run of 13 words, or the whole of a shorter text."""
    words = _WORD.findall(text.casefold())
    if LEAST <= len(words) < GRAM:
        yield " ".join(words)
    yield from _runs(words, GRAM)


def _short_lines(text: str) -> Iterator[str]:
    for line in text.splitlines():
        words = _WORD.findall(line.casefold())
        if LEAST <= len(words) < GRAM:
            yield " ".join(words)
