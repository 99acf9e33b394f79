"""What rows are run through, to the logits of the tokens that are predicted in them.

The logits of a batch exist for some hundred tokens, and of predicted tokens alone. Rows lie end to
end where a model takes them so (`packed.py`), else they are padded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from loralab.engines.attention import attention_configs, swapped_attention
from loralab.health.forced import Row
from loralab.health.packed import MODEL_TYPES, Branches, branching, packs

BATCH_TOKENS = 512
"""Tokens in one forward: enough to keep a core busy, few enough that padded rows of one batch are
of one length (12 % padding with the shipped prompts, 26 % at 2,048)."""
BATCH_LOGITS = 2**25
"""Logits in one forward, in numbers."""


@dataclass(frozen=True)
class Seen:
    """logits: (n, vocabulary). hidden: (n, d), what the output head was given, where the logits are
    what it gave; None where they are not, or it is not known."""

    logits: Tensor
    hidden: Tensor | None = None


class Runner(Protocol):
    """A model, or its base, as rows see it."""

    def batches(self, rows: Sequence[Row]) -> list[list[int]]:
        """Places of the rows that go through together; rows that predict nothing are left out."""
        ...

    def run(self, batch: Sequence[Row]) -> Seen:
        """Of their predicted tokens, row after row."""
        ...


class ModelRunner:
    """A causal LM's own forward. standing: puts it in place, held still, adapters on or off."""

    def __init__(self, causal: Any, standing: Callable[[], AbstractContextManager[Any]]) -> None:
        self._causal, self._standing = causal, standing

    def batches(self, rows: Sequence[Row]) -> list[list[int]]:
        """The same rows always the same way."""
        known = getattr(self._causal.config, "model_type", None) in MODEL_TYPES
        vocabulary = self._causal.config.get_text_config(decoder=True).vocab_size
        return by_prompt(rows, vocabulary) if known else by_length(rows, vocabulary)

    def run(self, batch: Sequence[Row]) -> Seen:
        """One forward, in which the head sees the predicted tokens alone."""
        with self._standing() as causal:
            return run(causal, batch)


def by_prompt(
    rows: Sequence[Row], vocabulary: int, most_logits: int | None = None
) -> list[list[int]]:
    """Batches of rows that lie end to end: those of one prompt together, which runs once.

    most_logits: None is BATCH_LOGITS.
    """
    most_logits = most_logits or BATCH_LOGITS
    first: dict[tuple[int, ...], int] = {}
    for row in rows:
        first.setdefault(row.prompt_ids, len(first))
    made: list[list[int]] = []
    prompts: set[tuple[int, ...]] = set()
    tokens = picks = 0
    for at in sorted(_predicting(rows), key=lambda at: first[rows[at].prompt_ids]):
        row = rows[at]
        picked, own = len(row.answer), len(row.answer) - 1
        more = own if row.prompt_ids in prompts else row.start + own
        full = tokens + more > BATCH_TOKENS or (picks + picked) * vocabulary > most_logits
        if not made or full:
            made.append([])
            prompts, tokens, picks, more = set(), 0, 0, row.start + own
        made[-1].append(at)
        prompts.add(row.prompt_ids)
        tokens, picks = tokens + more, picks + picked
    return made


def by_length(rows: Sequence[Row], vocabulary: int) -> list[list[int]]:
    """Batches of rows that are padded: like lengths with like."""
    made: list[list[int]] = []
    picks = 0
    for at in sorted(_predicting(rows), key=lambda at: -len(rows[at].ids)):
        picked = len(rows[at].answer)
        full = made and (
            (len(made[-1]) + 1) * len(rows[made[-1][0]].ids) > BATCH_TOKENS
            or (picks + picked) * vocabulary > BATCH_LOGITS
        )
        if not made or full:
            made.append([])
            picks = 0
        made[-1].append(at)
        picks += picked
    return made


def _predicting(rows: Sequence[Row]) -> list[int]:
    return [at for at, row in enumerate(rows) if row.answer]


def run(causal: Any, batch: Sequence[Row]) -> Seen:
    """Of a model that is held still."""
    device = causal.get_input_embeddings().weight.device
    configs = attention_configs(causal)
    with ExitStack() as swaps:
        if packs(causal, configs):
            branches = Branches([(row.ids, row.start) for row in batch])
            places = torch.tensor([at for ends in branches.ends for at in ends])
            picked = (torch.zeros_like(places), places)
            given = {
                "input_ids": branches.ids[None].to(device),
                "position_ids": branches.positions[None].to(device),
                "branches": branches,
            }
            swaps.enter_context(branching(configs))
        else:
            ids, mask, picked = _padded(batch)
            given = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
            swaps.enter_context(swapped_attention(configs))
        rows, tokens = (part.to(device) for part in picked)
        seen = swaps.enter_context(_head_sees(causal, (rows, tokens)))
        logits: Tensor = causal(**given, use_cache=False).logits
    logits = logits.reshape(-1, logits.shape[-1])
    hidden, made = seen
    return Seen(logits, hidden if _same(logits, made) else None)


def by_row(numbers: Tensor, rows: Sequence[Row]) -> Sequence[Tensor]:
    """(n, ...) of rows' predicted tokens, row by row."""
    return torch.split(numbers, [len(row.answer) for row in rows])


def _padded(batch: Sequence[Row]) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """ids and mask (rows, tokens), and where what is predicted is read: (n,) rows and tokens.

    Padding stands behind the text, where no token of it sees it.
    """
    longest = max(len(row.ids) for row in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    picked = torch.zeros_like(ids, dtype=torch.bool)
    for place, row in enumerate(batch):
        ids[place, : len(row.ids)] = torch.tensor(row.ids)
        mask[place, : len(row.ids)] = 1
        picked[place, row.start - 1 : len(row.ids) - 1] = True
    rows, tokens = picked.nonzero(as_tuple=True)
    return ids, mask, (rows, tokens)


@contextmanager
def _head_sees(causal: Any, picked: tuple[Tensor, Tensor]) -> Iterator[list[Tensor]]:
    """Give the output head the picked tokens alone; holds its input and output afterwards."""
    head = causal.get_output_embeddings()
    inner, before = head.forward, head.__dict__.get("forward")
    seen: list[Tensor] = []

    def forward(x: Tensor) -> Any:
        chosen = x[picked].contiguous()
        seen[:] = [chosen, inner(chosen[None])[0]]
        return seen[1][None]

    head.__dict__["forward"] = forward
    try:
        yield seen
    finally:
        if before is None:
            head.__dict__.pop("forward")
        else:
            head.__dict__["forward"] = before


def _same(logits: Tensor, given: Tensor) -> bool:
    """Whether a model passes its head's output on (perhaps in float32); seen on one token."""
    return logits.shape == given.shape and torch.equal(logits[:1].float(), given[:1].float())
