"""Choosing tokens: temperature, top-k, top-p, one uniform per (seed, step) of each request.

The uniform comes from Philox4x32-10, a counter-based generator (Salmon et al. 2011,
https://doi.org/10.1145/2063384.2063405): keyed by the request's seed, counted by its step. So a
request's draws depend neither on its neighbours in the batch nor on where it stands in it. The
token is the inverse of the cumulative distribution at that uniform.

The filters keep what the warpers of Transformers keep, in their order: temperature, top-k (ties
with the k-th logit stay), top-p (the smallest set whose probability reaches p).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from loralab.engines.base import Sampling

_CANDIDATES = (64, 1024, 8192)
"""Likeliest logits looked at before the whole vocabulary is sorted: a nucleus is rarely larger."""
_BLOCK = 256
"""Weights summed at once where a long row is inverted: a cumulative sum of all is slower."""

_WORKING_LOGITS = 2**22
"""Logits worked on at once: float64 copies of a large batch's would dwarf its cache."""

_ROUND_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox(
    counter: NDArray[np.uint64], key: NDArray[np.uint64], rounds: int = 10
) -> NDArray[np.uint64]:
    """Philox4x32: counter (n, 4) and key (n, 2), 32-bit words in uint64, to words (n, 4)."""
    c0, c1, c2, c3 = counter.T
    k0, k1 = key.T
    for _ in range(rounds):
        product0 = c0 * _ROUND_MULTIPLIERS[0]
        product1 = c2 * _ROUND_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> _HALF) ^ c1 ^ k0,
            product1 & _LOW,
            (product0 >> _HALF) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0 = (k0 + _KEY_STEPS[0]) & _LOW
        k1 = (k1 + _KEY_STEPS[1]) & _LOW
    return np.stack([c0, c1, c2, c3], axis=1)


def uniforms(seeds: Sequence[int], steps: Sequence[int]) -> Tensor:
    """One float64 in [0, 1) for each (seed, step). Seeds are taken modulo 2**64."""
    seed = np.array([s % 2**64 for s in seeds], dtype=np.uint64)
    step = np.array(steps, dtype=np.uint64)
    zeros = np.zeros_like(step)
    counter = np.stack([step & _LOW, step >> _HALF, zeros, zeros], axis=1)
    words = philox(counter, np.stack([seed & _LOW, seed >> _HALF], axis=1))
    mantissa = (words[:, 0] << np.uint64(21)) | (words[:, 1] >> np.uint64(11))
    return torch.from_numpy(mantissa.astype(np.float64) * 2.0**-53)


def sample(logits: Tensor, settings: Sequence[Sampling], steps: Sequence[int]) -> Tensor:
    """Draw a token for each row.

    logits: (rows, vocabulary) float32, no NaN. steps: tokens each request has generated so far.
    Returns (rows,) int64. A row with temperature 0 gets its argmax.
    """
    tokens = torch.empty(logits.shape[0], dtype=torch.long, device=logits.device)
    draws = uniforms([s.seed for s in settings], steps).to(logits.device)
    groups: dict[tuple[float, int, float], list[int]] = {}
    for row, setting in enumerate(settings):
        groups.setdefault((setting.temperature, setting.top_k, setting.top_p), []).append(row)
    at_once = max(_WORKING_LOGITS // logits.shape[-1], 1)
    for (temperature, top_k, top_p), members in groups.items():
        if len(members) == logits.shape[0] <= at_once:
            return _draw(logits, draws, temperature, top_k, top_p)
        for start in range(0, len(members), at_once):
            rows = torch.tensor(members[start : start + at_once], device=logits.device)
            tokens[rows] = _draw(logits[rows], draws[rows], temperature, top_k, top_p)
    return tokens


def _draw(logits: Tensor, draws: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Tokens (rows,) for rows that share their settings."""
    if temperature == 0:
        return logits.max(-1).indices
    vocabulary = logits.shape[-1]
    # Taking the maximum off first keeps a tiny temperature from overflowing.
    scaled = (logits - logits.amax(-1, keepdim=True)).div_(temperature)
    kept_k = top_k if top_k < vocabulary else 0
    if not kept_k and top_p >= 1:
        return _invert(scaled.exp_(), draws)
    counts = [kept_k + 32] if kept_k else list(_CANDIDATES)
    tokens = torch.empty(logits.shape[0], dtype=torch.long, device=logits.device)
    left = torch.arange(logits.shape[0], device=logits.device)
    for count in [*(c for c in counts if c < vocabulary), vocabulary]:
        ids, weights, enough = _filter(scaled, count, kept_k, top_p)
        picked = ids.gather(1, _invert(weights, draws)[:, None])[:, 0]
        tokens[left[enough]] = picked[enough]
        if bool(enough.all()):
            break
        left, scaled, draws = left[~enough], scaled[~enough], draws[~enough]
    return tokens


def _filter(scaled: Tensor, count: int, top_k: int, top_p: float) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` likeliest tokens, likeliest first, with the weights of dropped ones at 0.

    scaled: (rows, vocabulary), at most 0. Returns ids (rows, count), weights (rows, count)
    float64, and (rows,) bool: whether these candidates were certain to hold every kept token.
    Equal logits stand in order of their ids, so the choice does not hang on how many were asked
    for.
    """
    vocabulary = scaled.shape[-1]
    if count < vocabulary:
        ids = scaled.topk(count, dim=-1, sorted=False).indices.sort(-1).values
        values = scaled.gather(1, ids)
        values, order = values.sort(dim=-1, descending=True, stable=True)
        ids = ids.gather(1, order)
    else:
        values, ids = scaled.sort(dim=-1, descending=True, stable=True)
    weights = values.double().exp()
    last = values[:, -1]
    if top_k:
        threshold = values[:, top_k - 1]
        weights.masked_fill_(values < threshold[:, None], 0.0)
        total = weights.sum(-1)
        # Ties with the k-th logit may reach past the candidates.
        enough = last < threshold
    else:
        total = _blocks(scaled.exp()).sum(-1).sum(-1, dtype=torch.float64)
        enough = torch.zeros_like(last, dtype=torch.bool)
    if top_p < 1:
        reached = weights.cumsum(-1)
        before = reached - weights
        dropped = before >= (top_p * total)[:, None]
        dropped[:, 0] = False
        if not top_k:
            # The nucleus is complete once the candidates pass p, and no tie straddles its end.
            ends = (~dropped).sum(-1) - 1
            edge = values.gather(1, ends[:, None])[:, 0]
            enough = (reached[:, -1] >= top_p * total) & (last < edge)
        weights.masked_fill_(dropped, 0.0)
    if count == vocabulary:
        enough = torch.ones_like(enough)
    return ids, weights, enough


def _invert(weights: Tensor, draws: Tensor) -> Tensor:
    """Index (rows,) at which the cumulative weight (rows, n) first exceeds draw x total."""
    rows, n = weights.shape
    if n <= 4 * _BLOCK:
        reached = weights.cumsum(-1, dtype=torch.float64)
        return _first_above(weights, reached, draws * reached[:, -1])
    blocks = _blocks(weights)
    # Few enough to add in float32; asking for float64 here would copy every weight first.
    sums = blocks.sum(-1).double()
    reached = sums.cumsum(-1)
    target = draws * reached[:, -1]
    block = _first_above(sums, reached, target)
    before = pad(reached, (1, 0)).gather(1, block[:, None])[:, 0]
    inside = blocks[torch.arange(rows, device=block.device), block]
    reached = inside.cumsum(-1, dtype=torch.float64)
    return block * _BLOCK + _first_above(inside, reached, target - before)


def _blocks(weights: Tensor) -> Tensor:
    """View weights (rows, n) as (rows, blocks, block), with zeros appended where n is uneven."""
    missing = -weights.shape[-1] % _BLOCK
    whole = pad(weights, (0, missing)) if missing else weights
    return whole.view(weights.shape[0], -1, _BLOCK)


def _first_above(weights: Tensor, reached: Tensor, target: Tensor) -> Tensor:
    """First index (rows,) where reached (rows, n) exceeds target (rows,), at a positive weight."""
    index = torch.searchsorted(reached, target[:, None], right=True)[:, 0]
    # Rounding can put the target on the total itself: step back to the last token of any weight.
    last = weights.shape[-1] - 1 - (weights > 0).flip(-1).to(torch.int8).max(-1).indices
    return torch.minimum(index, last)
