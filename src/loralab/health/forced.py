"""What a model expects along fixed texts (teacher forcing), beside its base, token by token.

    kl_t = sum_v p_t(v) (log p_t(v) - log q_t(v)),   p the model's, q the base's next-token
    distribution after the same tokens, over the full vocabulary, log-softmax in float32

Logits exist for some hundred tokens at a time. Of the base the inputs of its output head are kept,
some kilobytes a token, so that it runs once and only its head again; a model that does more after
its head than hand its logits on (soft-capping, scaling) is run again instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from loralab.engines.attention import attention_configs, swapped_attention
from loralab.errors import UserError

BATCH_TOKENS = 512
"""Padded tokens in one forward: enough to keep a core busy, few enough that rows of one batch are
of one length (12 % padding with the shipped prompts, 26 % at 2,048)."""
BATCH_LOGITS = 2**25
"""Logits in one forward, in numbers."""
PIECE = 2**21
"""Numbers of a distribution that exist in float32 at one time, some times over: few enough for a
CPU's cache, which makes it 2.7 times as fast as four times as many."""


@dataclass(frozen=True)
class Row:
    """Token ids of a prompt and what follows it; those from `start` on are predicted.

    prompt: its index. ends: the last token is an end token.
    """

    prompt: int
    ids: tuple[int, ...]
    start: int
    ends: bool = False


@dataclass(frozen=True)
class Forced:
    """One entry a predicted token, row after row; float32 on the CPU where nothing else is said.

    rows: (n,) int64, the index of the prompt. tokens: (n,) int64, the token that stands there.
    ends: (n,) bool, it is the end token that closes a row.
    nll: (n,) nats of that token. entropy: (n,) nats of the next-token distribution.
    base_nll, base_entropy: (n,), the base's. kl: (n,) KL(model || base) in nats. agree: (n,), 1
    where both hold the same token for the likeliest. Without a base these four are NaN.
    """

    rows: Tensor
    tokens: Tensor
    ends: Tensor
    nll: Tensor
    entropy: Tensor
    base_nll: Tensor
    base_entropy: Tensor
    kl: Tensor
    agree: Tensor

    @staticmethod
    def joined(parts: Sequence[Forced]) -> Forced:
        """Several in one."""
        whole = {f.name: [getattr(part, f.name) for part in parts] for f in fields(Forced)}
        return Forced(**{name: torch.cat(tensors) for name, tensors in whole.items()})

    @staticmethod
    def none() -> Forced:
        """Of no tokens."""
        numbers = [torch.empty(0) for _ in range(6)]
        whole = torch.empty(0, dtype=torch.long)
        return Forced(whole, whole, whole.bool(), *numbers)

    def among(self, prompts: Sequence[int]) -> Forced:
        """The tokens of these prompts alone."""
        chosen = torch.isin(self.rows, torch.tensor(prompts, dtype=torch.long))
        return Forced(**{f.name: getattr(self, f.name)[chosen] for f in fields(Forced)})

    def of_rows_in_order(self) -> Forced:
        """Sorted by prompt, tokens of one in their order."""
        order = torch.argsort(self.rows, stable=True)
        return Forced(**{f.name: getattr(self, f.name)[order] for f in fields(Forced)})


def batches(rows: Sequence[Row], vocabulary: int) -> list[list[Row]]:
    """Rows that go through together, like lengths with like; the same rows always the same way."""
    made: list[list[Row]] = []
    picks = 0
    for row in sorted((r for r in rows if len(r.ids) > r.start), key=lambda r: -len(r.ids)):
        new = len(row.ids) - row.start
        full = made and (
            (len(made[-1]) + 1) * len(made[-1][0].ids) > BATCH_TOKENS
            or (picks + new) * vocabulary > BATCH_LOGITS
        )
        if not made or full:
            made.append([])
            picks = 0
        made[-1].append(row)
        picks += new
    return made


def device_of(causal: Any) -> torch.device:
    """Where a model takes its tokens."""
    device: torch.device = causal.get_input_embeddings().weight.device
    return device


@dataclass(frozen=True)
class Seen:
    """logits: (n, vocabulary), in the model's type. hidden: (n, d), what its head was given.
    plain: the logits are what the head gave."""

    logits: Tensor
    hidden: Tensor
    plain: bool


def run(causal: Any, batch: Sequence[Row]) -> Seen:
    """Logits of a batch's predicted tokens, from one forward.

    The head sees those tokens alone: the whole logits of the batch never exist.
    """
    device = device_of(causal)
    longest = max(len(row.ids) for row in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    picked = torch.zeros_like(ids, dtype=torch.bool)
    for place, row in enumerate(batch):
        # Padding stands behind the text, where no token of it sees it.
        ids[place, : len(row.ids)] = torch.tensor(row.ids)
        mask[place, : len(row.ids)] = 1
        picked[place, row.start - 1 : len(row.ids) - 1] = True
    with (
        _head_sees(causal, picked.to(device)) as seen,
        swapped_attention(attention_configs(causal)),
    ):
        logits: Tensor = causal(
            input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
        ).logits
    logits = logits.reshape(-1, logits.shape[-1])
    hidden, given = seen
    return Seen(logits, hidden, _same(logits, given))


@contextmanager
def _head_sees(causal: Any, picked: Tensor) -> Iterator[list[Tensor]]:
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


def compare(batch: Sequence[Row], logits: Tensor, base: Tensor | None) -> Forced:
    """Numbers of a batch from its logits (n, vocabulary) and the base's.

    Raises:
        UserError: the base has another vocabulary.
    """
    if base is not None and base.shape != logits.shape:
        raise UserError(
            f"the base has a vocabulary of {base.shape[-1]}, the model one of {logits.shape[-1]}: "
            "they cannot be compared token by token"
        )
    tokens = torch.tensor([token for row in batch for token in row.ids[row.start :]])
    counts = torch.tensor([len(row.ids) - row.start for row in batch])
    ends = torch.zeros(len(tokens), dtype=torch.bool)
    last = counts.cumsum(0) - 1
    ends[last] = torch.tensor([row.ends for row in batch])
    step = max(1, PIECE // logits.shape[-1])
    pieces = [
        _distributions(
            logits[at : at + step],
            None if base is None else base[at : at + step].to(logits.device),
            tokens[at : at + step].to(logits.device),
        )
        for at in range(0, len(tokens), step)
    ]
    numbers = torch.cat(pieces, dim=1).cpu()
    return Forced(
        torch.tensor([row.prompt for row in batch]).repeat_interleave(counts),
        tokens,
        ends,
        *numbers,
    )


def _distributions(logits: Tensor, base: Tensor | None, tokens: Tensor) -> Tensor:
    """(6, n): nll, entropy, base_nll, base_entropy, kl, agree."""
    log_p = logits.log_softmax(dim=-1, dtype=torch.float32)
    p = log_p.exp()
    at = tokens[:, None]
    nll, entropy = -log_p.gather(1, at)[:, 0], -_expected(p, log_p)
    if base is None:
        none = torch.full_like(nll, torch.nan)
        return torch.stack([nll, entropy, none, none, none, none])
    log_q = base.log_softmax(dim=-1, dtype=torch.float32)
    # `max` is several times as fast as `argmax` on a CPU, and takes the first of equals too.
    agree = (logits.max(-1).indices == base.max(-1).indices).float()
    agree[nll.isnan()] = torch.nan
    base_nll, base_entropy = -log_q.gather(1, at)[:, 0], -_expected(log_q.exp(), log_q)
    # The difference first: a sum of p log p and one of p log q would cancel to rounding.
    kl = _expected(p, log_p.sub_(log_q)).clamp_min(0.0)
    return torch.stack([nll, entropy, base_nll, base_entropy, kl, agree])


def _expected(p: Tensor, values: Tensor) -> Tensor:
    """sum over v of p(v) values(v), where 0 times infinity is 0."""
    return torch.where(p == 0, 0.0, p * values).sum(-1)
