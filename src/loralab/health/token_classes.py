"""Where the loss lies: in layout, in the end token, in phrases that always come, or in content.

A loss may fall by half while a model learns to write newlines or the phrase that opens every
answer. So tokens are put into classes once, by the base, and the loss is told for each.

Boilerplate stays predictable when answers are exchanged between prompts: the base gives the token
a chance of 1/2 or more after a stranger's prompt and the answer so far, or the same token follows
the same three in several other answers, which is how a model will learn it.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from loralab.health.expecting import RowSet
from loralab.health.forced import Forced, Row

if TYPE_CHECKING:
    from loralab.health.look import Look, Subject

CLASSES = ("whitespace", "eos", "boilerplate", "content")
KNOWN_NATS = math.log(2)
"""Loss after a stranger's prompt up to which a token is boilerplate."""
GRAM = 4
SHARED = 0.2
"""Share of the other answers (two at least) with the same n-gram, from which it is boilerplate."""
GAIN_ROWS = 12
"""Rows whose prompts are exchanged at each look."""
LONGEST = 512
"""Tokens of a labelled row that are read."""
_IGNORED = -100


class Labelled(Protocol):
    """A training row: ids and labels of one length, -100 where nothing is learned."""

    @property
    def input_ids(self) -> Sequence[int]: ...
    @property
    def labels(self) -> Sequence[int]: ...


@dataclass(frozen=True)
class Read:
    """rows: what is read. learned: (n,) bool, of the tokens that `expect(rows)` tells of those with
    a label; None is all."""

    rows: tuple[Row, ...]
    learned: Tensor | None


@dataclass(frozen=True)
class Classes:
    """exchanged: some of the rows with a stranger's prompt. kind: (n,) int64, an index of CLASSES
    for each token, -1 where nothing is learned. base_gain: of the base, as `loss.prompt_gain`."""

    exchanged: tuple[Row, ...]
    kind: Tensor
    base_gain: float


class TokenClassProbe:
    """Mean nats a token in each class, and what the prompt is worth.

    loss.whitespace (tokens of whitespace alone), loss.eos, loss.boilerplate, loss.content;
    loss.prompt_gain: nats a token that the known answer costs more after another prompt than after
    its own, end tokens left out, on 12 rows drawn by the subject's seed.

    rows: training rows with labels, of which `limit` are drawn by the seed; None reads the
    prompts' known-good texts.
    """

    name = "token_classes"
    measures = "loss on whitespace, end tokens, boilerplate and content; what the prompt is worth"
    cost = "the forward of `divergence` (or one over the rows), and one over 12 exchanged prompts"

    def __init__(
        self,
        rows: Sequence[Labelled] | Sequence[Mapping[str, Sequence[int]]] | None = None,
        limit: int = 32,
    ) -> None:
        self._rows = rows
        self._limit = limit

    def measure(self, look: Look) -> dict[str, float]:
        subject = look.subject
        if self._rows is None:
            read = Read(subject.good_rows, None)
            seen = look.good
        else:
            read = subject.once((self, "rows"), lambda: self._read(subject))
            rows = RowSet(read.rows, base=not subject.only_kept, keep=True)
            seen = look.expect((self, "rows"), lambda _: rows)
        classes = subject.once(self, lambda: _classes(subject, read, seen))
        crossed = RowSet(classes.exchanged)
        exchanged = look.expect((self, "exchanged"), lambda _: crossed)
        values = _by_class("loss", seen.nll, classes.kind)
        values["loss.prompt_gain"] = _gain(exchanged, seen, seen.nll, classes.kind)
        if subject.has_base:
            values |= _by_class("base.loss", seen.base_nll, classes.kind)
            values["base.loss.prompt_gain"] = classes.base_gain
        return values

    def _read(self, subject: Subject) -> Read:
        """Some training rows, from the first token that is learned on."""
        assert self._rows is not None
        drawn = random.Random(subject.seed)
        places = sorted(drawn.sample(range(len(self._rows)), min(self._limit, len(self._rows))))
        longest = min(LONGEST, subject.context or LONGEST)
        rows, learned = [], []
        for place in places:
            ids, labels = (list(part)[:longest] for part in _parts(self._rows[place]))
            at = [i for i, label in enumerate(labels) if label != _IGNORED and i > 0]
            if at:
                stop = at[-1] + 1
                rows.append(Row(place, tuple(ids[:stop]), at[0], ids[stop - 1] in subject.ends))
                learned += [label != _IGNORED for label in labels[at[0] : stop]]
        return Read(tuple(rows), torch.tensor(learned, dtype=torch.bool))


def _parts(row: Labelled | Mapping[str, Sequence[int]]) -> tuple[Sequence[int], Sequence[int]]:
    if isinstance(row, Mapping):
        return row["input_ids"], row["labels"]
    return row.input_ids, row.labels


def _classes(subject: Subject, read: Read, seen: Forced) -> Classes:
    drawn = random.Random(subject.seed)
    strangers = _exchanged(read.rows, drawn, subject.context)
    other = subject.expect_base(strangers)
    kind = _kinds(subject, read.rows, seen, other)
    if read.learned is not None:
        kind[~read.learned] = -1
    some = drawn.sample(strangers, min(GAIN_ROWS, len(strangers)))
    some.sort(key=lambda row: row.prompt)
    inside = other.among([row.prompt for row in some])
    return Classes(tuple(some), kind, _gain(inside, seen, seen.base_nll, kind))


def _exchanged(rows: Sequence[Row], drawn: random.Random, context: int | None) -> list[Row]:
    """Each row's answer behind the prompt of another, of which the end stays where both are too
    long together; none of fewer than two rows."""
    if len(rows) < 2:
        return []
    order = list(range(len(rows)))
    drawn.shuffle(order)
    partner = dict(zip(order, order[1:] + order[:1], strict=True))
    made = []
    for at, row in enumerate(rows):
        other, answer = rows[partner[at]], row.ids[row.start :]
        front = other.ids[: other.start]
        if context is not None:
            front = front[-max(1, context - len(answer)) :]
        made.append(Row(row.prompt, front + answer, len(front), row.ends))
    return made


def _kinds(subject: Subject, rows: Sequence[Row], own: Forced, other: Forced) -> Tensor:
    kind = torch.full_like(own.tokens, CLASSES.index("content"))
    if len(other.tokens):
        kind[other.nll <= KNOWN_NATS] = CLASSES.index("boilerplate")
    kind[_shared(rows)] = CLASSES.index("boilerplate")
    blank = torch.tensor([subject.is_layout(token) for token in own.tokens.tolist()])
    kind[blank.bool()] = CLASSES.index("whitespace")
    kind[own.ends] = CLASSES.index("eos")
    return kind


def _shared(rows: Sequence[Row]) -> Tensor:
    """(n,) bool: the token, after the same three before it in the answer, is in several others."""
    owners: dict[tuple[int, ...], set[int]] = defaultdict(set)
    grams = []
    for at, row in enumerate(rows):
        # Nothing stands before an answer's first words, which openings share.
        answer = (-1,) * (GRAM - 1) + row.ids[row.start :]
        own = [answer[i : i + GRAM] for i in range(len(answer) - GRAM + 1)]
        for gram in own:
            owners[gram].add(at)
        grams += own
    least = max(2, math.ceil(SHARED * (len(rows) - 1)))
    return torch.tensor([len(owners[gram]) - 1 >= least for gram in grams], dtype=torch.bool)


def _by_class(prefix: str, nll: Tensor, kind: Tensor) -> dict[str, float]:
    """NaN of a class without tokens."""
    return {
        f"{prefix}.{name}": float(nll[kind == index].double().mean())
        for index, name in enumerate(CLASSES)
    }


def _gain(exchanged: Forced, own: Forced, nll: Tensor, kind: Tensor) -> float:
    """Mean over tokens of the loss after a stranger's prompt, less `nll`, that after their own."""
    if not len(exchanged.rows):
        return math.nan
    chosen = torch.isin(own.rows, exchanged.rows)
    learned = (kind[chosen] >= 0) & ~own.ends[chosen]
    return float((exchanged.nll - nll[chosen])[learned].double().mean())
