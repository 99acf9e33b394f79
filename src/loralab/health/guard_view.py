"""What a guard looks at: what the model writes, its weights, and the rows that it learns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import Any

import torch
from transformers import TrainingArguments

from loralab import ranks
from loralab.errors import UserError
from loralab.health.data import DataProbe
from loralab.health.divergence import DivergenceProbe, OwnDivergenceProbe
from loralab.health.findings import Example
from loralab.health.look import Probe, Subject, measure
from loralab.health.prompts import shipped_prompts
from loralab.health.reading import Reading
from loralab.health.setup import setup_values
from loralab.health.still import has_adapter
from loralab.health.text import TextProbe
from loralab.health.token_classes import TokenClassProbe
from loralab.health.training_rows import training_rows
from loralab.health.weights import WeightProbe

PROMPTS = 12
"""Of the shipped prompts, two of each kind: a look has to cost little."""
TOKENS = 48
"""Of each completion."""
DATA_ROWS = 256
"""Training rows that are looked at, from the beginning."""
LEARNED = 5
"""Steps before which no look asks what the model makes of them, which costs as much as all texts:
it has learned next to nothing of them yet."""


class View:
    """A model in its training, as a callback is given it.

    given: what a Trainer hands its callbacks: model, optimizer, train_dataloader,
        processing_class. step: after which the training goes on.
    prompts, base, tokenizer: as GuardCallback takes them. texts: whether to read what it writes;
        of several processes one does. tell: is given a line where it can not.
    rows: how many are learned, None if the dataset does not know.
    """

    def __init__(
        self,
        given: Mapping[str, Any],
        args: TrainingArguments,
        step: int,
        *,
        texts: bool,
        prompts: Sequence[Any] | None = None,
        base: Any = None,
        tokenizer: Any = None,
        tell: Callable[[str], None],
    ) -> None:
        self._model, self._tell = given["model"], tell
        own = tokenizer or given.get("processing_class")
        self._tokenizer = getattr(own, "tokenizer", own)
        self._weights = WeightProbe()
        self._probes: list[Probe] = [
            TextProbe(),
            DivergenceProbe(),
            OwnDivergenceProbe(),
            TokenClassProbe(),
        ]
        self._data: DataProbe | None = None
        self._failed: set[str] = set()
        self._facts = setup_values(self._model, given.get("optimizer"))
        learned = training_rows(given.get("train_dataloader"), DATA_ROWS)
        self.rows = learned.count
        self._facts |= learned.values()
        self._subject: Subject | None = None
        if not texts:
            return
        if learned.tokens and self._tokenizer is not None:
            longest = getattr(args, "max_length", None)
            self._data = DataProbe(learned.tokens, self._tokenizer, longest, rescaled=False)
            self._probes.append(self._data)
        asked = shipped_prompts()[:PROMPTS] if prompts is None else prompts
        self._subject = self._subject_of(asked, base, args.seed, step)

    def reading(self, step: int, numbers: Callable[[], dict[str, float]]) -> Reading:
        """A look at this moment. numbers: what else belongs to it, asked for at its end."""
        began = perf_counter()
        values: dict[str, float] = {}
        examples: tuple[Example, ...] = ()
        if self._subject is not None:
            look = self._subject.look()
            try:
                for probe in self._probes:
                    if probe is self._data and step < LEARNED:
                        continue
                    values |= self._asked(probe.name, partial(probe.measure, look))
                examples = measure(look, (), step).examples
            except torch.OutOfMemoryError:
                self._tell("guard: no memory left to look at texts; numbers and weights are")
                self._subject = None
        values |= self._asked("weights", lambda: self._weights.measure_model(self._model))
        if self._data is not None:
            base = None if self._subject is None else self._subject.base_runner
            values |= self._asked("data", partial(self._data.measure_model, self._model, base))
        # Last: how many rows there are is known of all, not of those alone that are looked at.
        values |= self._facts | numbers()
        return Reading(step, values, examples, perf_counter() - began)

    def _asked(self, name: str, probe: Callable[[], dict[str, float]]) -> dict[str, float]:
        """What a probe tells; nothing from then on if it fails: no training is to end of that."""
        if name in self._failed:
            return {}
        try:
            return probe()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._failed.add(name)
            self._tell(f"guard: {name} is measured no more: {type(error).__name__}: {error}")
            return {}

    def _subject_of(
        self, prompts: Sequence[Any], base: Any, seed: int, step: int
    ) -> Subject | None:
        why = ""
        if self._tokenizer is None:
            why = ", no tokenizer was given"
        elif ranks.sharding() is not None:
            why = ", its weights are sharded"
        elif _output_head(self._model) is None:
            why = ", the model writes no text"
        if not why:
            # A whole model that goes on from a checkpoint is not what it began as: no base then.
            if base is None and not has_adapter(self._model) and step == 0:
                base = "now"
            try:
                return Subject(
                    self._model,
                    self._tokenizer,
                    prompts=prompts,
                    base=base,
                    seed=seed,
                    max_new_tokens=TOKENS,
                )
            except UserError as error:
                why = f": {error}"
        self._tell(f"guard: looks at numbers and weights alone{why}")
        return None


def _output_head(model: Any) -> Any:
    ask = getattr(model, "get_output_embeddings", None)
    try:
        return None if ask is None else ask()
    except NotImplementedError:
        return None
