"""The centre of a search as something to look at: what it writes, and what it expects of texts.

Its engine writes, as it does for members. What it expects is read off the engine's own model, with
the centre's change in the weights and its adapter in the forwards, and put back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import nan
from typing import Any, Protocol, cast

from loralab.engines.base import Request, Sampling
from loralab.engines.batched import BatchedEngine
from loralab.engines.lora_linear import Routing, build_stacks, patched
from loralab.evolution.space import Centre
from loralab.evolution.workbench import PopulationEngine
from loralab.health.divergence import DivergenceProbe, OwnDivergenceProbe
from loralab.health.look import Completion, Look, Probe, Subject, measure
from loralab.health.prompts import Prompt
from loralab.health.reading import Reading
from loralab.health.still import held_still
from loralab.health.text import Answer, TextProbe
from loralab.health.token_classes import TokenClassProbe

TOKENS = 48
"""Of each completion."""
_NAME = "guard-centre"
_BASE = Centre(None)


class Looked(Protocol):
    """What is looked at of a search."""

    def reading(self, centre: Centre, step: int) -> Reading:
        """Of a centre, beside the true base.

        Raises:
            UserError: the engine cannot run it.
        """
        ...

    def divergence(self, point: Centre) -> float:
        """KL(point || true base) along known-good texts, in nats a token; NaN where an engine tells
        no expectations."""
        ...


def subject_of(engine: PopulationEngine, prompts: Sequence[Prompt], seed: int) -> Looked:
    """Texts and expectations where the engine's model is here; of another engine texts alone."""
    if isinstance(engine, BatchedEngine):
        return _Centre(engine, prompts, seed)
    return _Texts(engine, prompts)


class _Centre(Subject):
    """A subject that is whatever point of the search it was last given."""

    def __init__(self, engine: BatchedEngine, prompts: Sequence[Prompt], seed: int) -> None:
        super().__init__(
            engine.model, engine.tokenizer, prompts=prompts, seed=seed, max_new_tokens=TOKENS
        )
        self.has_base = True
        self._engine = engine
        self._at = _BASE
        self._probes: tuple[Probe, ...] = (
            TextProbe(),
            DivergenceProbe(),
            OwnDivergenceProbe(),
            TokenClassProbe(),
        )

    def reading(self, centre: Centre, step: int) -> Reading:
        self._at = centre
        return measure(self.look(), self._probes, step)

    def divergence(self, point: Centre) -> float:
        self._at = point
        return DivergenceProbe().measure(self.look())["kl"]

    def complete(self, base: bool) -> tuple[Completion, ...]:
        return _written(
            self._engine, _BASE if base else self._at, self.requests, self.max_new_tokens
        )

    @contextmanager
    def as_model(self) -> Iterator[Any]:
        with self._being(self._at) as causal:
            yield causal

    @contextmanager
    def as_base(self) -> Iterator[Any]:
        with self._being(_BASE) as causal:
            yield causal

    @contextmanager
    def _being(self, centre: Centre) -> Iterator[Any]:
        self._engine.set_base(centre.change or {})
        adapters = [] if centre.adapter is None else [centre.adapter]
        stacks = build_stacks(self.causal, adapters)
        device = self.causal.get_input_embeddings().weight.device
        # All rows have the one adapter, so that they are one row to it.
        routing = Routing.of([0] * len(adapters), device)
        with held_still(self.causal), patched(stacks, routing):
            yield self.causal


class _Texts:
    """What an engine elsewhere writes."""

    def __init__(self, engine: PopulationEngine, prompts: Sequence[Prompt]) -> None:
        self._engine, self._prompts = engine, prompts
        self._base: tuple[Answer, ...] = ()

    def reading(self, centre: Centre, step: int) -> Reading:
        answers = self._answers(centre)
        self._base = self._base or self._answers(_BASE)
        return measure(cast(Look, _Written(answers, self._base)), [TextProbe()], step)

    def divergence(self, point: Centre) -> float:
        return nan

    def _answers(self, centre: Centre) -> tuple[Answer, ...]:
        asked = [
            one.text if one.text is not None else list(one.messages or ()) for one in self._prompts
        ]
        made = _written(self._engine, centre, asked, TOKENS)
        return tuple(
            Answer(prompt.shown, one.text, one.token_ids, one.ended, one.failed is not None)
            for prompt, one in zip(self._prompts, made, strict=True)
        )


class _Written:
    """As much of a look as texts need."""

    def __init__(self, completions: tuple[Answer, ...], base: tuple[Answer, ...]) -> None:
        self.completions, self._base = completions, base

    def answers(self) -> tuple[Answer, ...]:
        return self.completions

    def base_answers(self) -> tuple[Answer, ...]:
        return self._base


def _written(
    engine: PopulationEngine, centre: Centre, requests: Sequence[Any], tokens: int
) -> tuple[Completion, ...]:
    """Greedy answers of a point; the engine holds no adapter afterwards."""
    engine.set_base(centre.change or {})
    engine.load({} if centre.adapter is None else {_NAME: centre.adapter})
    name = None if centre.adapter is None else _NAME
    made = engine.generate([Request(one, name, Sampling(tokens)) for one in requests])
    engine.load({})
    return tuple(
        Completion(one.text, one.tokens, one.finish_reason == "stop", one.error) for one in made
    )
