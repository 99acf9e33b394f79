"""What the population benchmark generates: prompts, and members with an evolution's noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loralab.adapters.state import AdapterState, Factors
from loralab.adapters.targets import linear_weights
from loralab.tasks import get
from loralab.tasks.base import Prompt

SHORT, LONG, UNSHARED = "short", "long", "unshared"

Members = Mapping[str, AdapterState]


@dataclass(frozen=True)
class Workload:
    """Prompts that every member answers.

    prompts: as a task gives them, for engines that apply the chat template themselves.
    ids: the same prompts as token ids, for peers that take ids.
    tokens: how many tokens each sequence generates, exactly.
    """

    name: str
    title: str
    prompts: tuple[Prompt, ...]
    ids: tuple[tuple[int, ...], ...]
    tokens: int

    @property
    def shared_prefix(self) -> int:
        """Length in tokens of the longest prefix that all prompts have in common."""
        shortest = min(len(ids) for ids in self.ids)
        first = self.ids[0]
        for place in range(shortest):
            if any(ids[place] != first[place] for ids in self.ids):
                return place
        return shortest

    def describe(self) -> str:
        """The sizes in words."""
        lengths = sorted(len(ids) for ids in self.ids)
        return (
            f"{len(self.ids)} prompts of {lengths[0]} to {lengths[-1]} tokens, of which the first "
            f"{self.shared_prefix} are common to all; {self.tokens} new tokens each"
        )

    def shortened(self, prompts: int, tokens: int) -> Workload:
        """The first prompts only and fewer new tokens, to warm up on."""
        return Workload(self.name, self.title, self.prompts[:prompts], self.ids[:prompts], tokens)


def encode(tokenizer: Any, prompt: Prompt) -> tuple[int, ...]:
    """Token ids of a prompt: plain text as it stands, messages through the chat template."""
    if isinstance(prompt, str):
        return tuple(tokenizer(prompt)["input_ids"])
    encoded = tokenizer.apply_chat_template(
        list(prompt), add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return tuple(encoded["input_ids"])


def build(name: str, tokenizer: Any, prompts: int, tokens: int) -> Workload:
    """A workload by name.

    short: the training questions of conciseness.
    long: Countdown problems behind the task's fixed instructions.
    unshared: the long prompts, each behind a different first token, so that an engine gains
        nothing by sharing their common prefix.
    """
    if name == SHORT:
        task = get("conciseness")
        title = "short chat prompts (conciseness)"
    elif name in (LONG, UNSHARED):
        task = get("countdown", examples=max(50, 5 * prompts), seed=0)
        title = "Countdown prompts, fixed instructions first"
    else:
        raise ValueError(f"workload {name!r}: expected one of {SHORT}, {LONG}, {UNSHARED}")
    texts: list[Prompt] = [task.prompt(e) for e in task.examples("train")[:prompts]]
    if name == UNSHARED:
        title = "Countdown prompts, each behind its own first token (no common prefix)"
        texts = [f"{chr(65 + i)}) {as_text(tokenizer, text)}" for i, text in enumerate(texts)]
    ids = tuple(encode(tokenizer, text) for text in texts)
    return Workload(name, title, tuple(texts), ids, tokens)


def as_text(tokenizer: Any, prompt: Prompt) -> str:
    """The prompt as one text, chat markers included."""
    if isinstance(prompt, str):
        return prompt
    text: str = tokenizer.apply_chat_template(
        list(prompt), add_generation_prompt=True, tokenize=False
    )
    return text


def random_members(
    model: nn.Module,
    count: int,
    rank: int,
    alpha: float,
    fraction: float,
    dtype: torch.dtype,
    seed: int,
    share_A: bool,
) -> dict[str, AdapterState]:
    """Members of a population in mid-evolution: `m0` ... on every linear but the head.

    A (rank, in) ~ N(0, 1/in). B (out, rank) is noise of such a size that the RMS of the change
    of W is `fraction` of mean |W|: B ~ N(0, b^2), b = fraction mean|W| sqrt(in/rank) / scaling.
    With `share_A` the members hold the same tensor object A (noise on B alone), otherwise each
    has its own (noise on A and B).
    """
    generator = torch.Generator().manual_seed(seed)
    scaling = alpha / rank
    weights = linear_weights(model)
    size = {
        name: fraction * float(w.float().abs().mean()) * (w.shape[1] / rank) ** 0.5 / scaling
        for name, w in weights.items()
    }

    def draw(rows: int, columns: int, std: float) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) * std).to(dtype)

    def draw_A() -> dict[str, Tensor]:
        return {n: draw(rank, w.shape[1], w.shape[1] ** -0.5) for n, w in weights.items()}

    common = draw_A() if share_A else None
    members = {}
    for index in range(count):
        factors_A = common if common is not None else draw_A()
        factors = {
            n: Factors(factors_A[n], draw(w.shape[0], rank, size[n])) for n, w in weights.items()
        }
        members[f"m{index}"] = AdapterState(factors, scaling)
    return members


def first(members: Members, count: int) -> dict[str, AdapterState]:
    """The first members, to warm up on."""
    return dict(list(members.items())[:count])


def equal_share(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """Share of the sequences that are the same, token for token."""
    same = sum(list(a) == list(b) for a, b in zip(ours, theirs, strict=True))
    return same / len(theirs)
