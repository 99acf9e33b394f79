"""Rows laid end to end for one forward: nothing is padded, and a prompt they share runs once.

    prompt 1 | answer a | answer b | prompt 2 | answer c

An answer's queries see its prompt's keys and its own, whatever else stands between; its positions
go on from the prompt's. So each row's numbers are those it has alone, up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "loralab_branches"

MODEL_TYPES = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "gemma3_text", "gpt2"}
)
"""Models that take their positions from position_ids and their attention from the interface, and
hand on to it what else they are given; each is compared with rows run alone in the tests."""

Ids = tuple[int, ...]


class Branches:
    """How rows lie in one sequence.

    ids, positions: (tokens,) int64. ends: of each row the places whose logits are its predictions,
    its prompt's last and its answer's but the last. spans: (front, stop, begin, end) of each run of
    queries: they see the keys from front to stop, and of those from begin to end none after them.
    """

    def __init__(self, rows: Sequence[tuple[Ids, int]]) -> None:
        """rows: token ids, and how many of them are the prompt, one at least."""
        ids: list[int] = []
        positions: list[int] = []
        fronts: dict[Ids, tuple[int, int]] = {}
        self.spans: list[tuple[int, int, int, int]] = []
        self.ends: list[list[int]] = []
        # Rows of one prompt may lie anywhere: attention takes its keys from where they are.
        for row, start in rows:
            prompt, answer = row[:start], row[start:-1]
            if prompt not in fronts:
                fronts[prompt] = (len(ids), len(ids) + start)
                self.spans.append((0, 0, *fronts[prompt]))
                ids += prompt
                positions += range(start)
            front, stop = fronts[prompt]
            begin, end = len(ids), len(ids) + len(answer)
            if answer:
                self.spans.append((front, stop, begin, end))
            ids += answer
            positions += range(start, start + len(answer))
            self.ends.append([stop - 1, *range(begin, end)])
        self.ids, self.positions = torch.tensor(ids), torch.tensor(positions)
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}

    def mask(self, front: int, queries: int, window: int | None, device: torch.device) -> Tensor:
        """(queries, front + queries) bool, True where a query sees a key."""
        key = (front, queries, window)
        if key not in self._masks:
            at = torch.arange(front, front + queries, device=device)[:, None]
            keys = torch.arange(front + queries, device=device)
            seen = keys <= at
            self._masks[key] = seen if window is None else seen & (keys > at - window)
        return self._masks[key]


def packs(causal: Any, configs: Sequence[Any]) -> bool:
    """Whether a causal LM, held still, can be given rows end to end. configs: its attention's."""
    if getattr(causal.config, "model_type", None) not in MODEL_TYPES:
        return False
    return {config._attn_implementation_internal for config in configs} == {"sdpa"}


def branch_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    branches: Branches | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as `AttentionInterface` calls it.

    query: (1, heads, tokens, d). key, value: (1, key heads, tokens, d). Returns (1, tokens, heads,
    d).
    """
    assert branches is not None
    share = query.shape[1] // key.shape[1]
    if share > 1:
        key, value = (part.repeat_interleave(share, dim=1) for part in (key, value))
    parts = []
    for front, stop, begin, end in branches.spans:
        k, v = (
            part[:, :, begin:end]
            if front == stop
            else torch.cat((part[:, :, front:stop], part[:, :, begin:end]), dim=2)
            for part in (key, value)
        )
        mask = branches.mask(stop - front, end - begin, sliding_window, query.device)
        out = scaled_dot_product_attention(
            query[:, :, begin:end], k, v, attn_mask=mask, scale=scaling
        )
        parts.append(out.transpose(1, 2))
    return torch.cat(parts, dim=1), None


AttentionInterface.register(NAME, branch_attention)


@contextmanager
def branching(configs: Sequence[Any]) -> Iterator[None]:
    """The configs of a model that `packs`, with this attention in place of SDPA's."""
    for config in configs:
        config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        for config in configs:
            config._attn_implementation_internal = "sdpa"
