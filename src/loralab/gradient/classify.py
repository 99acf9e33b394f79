"""Classification of texts: a head on the last token of a language model, and an adapter under it.

Transformers' decoders pool the last token whose id is not the padding id. Where padding and end
are one token (GPT-2, Llama), a text that ends in it loses its last token so; here the last token
is the last that the attention mask has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from loralab import tasks
from loralab.config.classify import ClassifyConfig
from loralab.engines.base import Completion
from loralab.errors import UserError
from loralab.gradient.events import OnTrainingEvent, ignore
from loralab.gradient.fine_tune import FineTuned
from loralab.gradient.forward import causal_of, forward_as
from loralab.gradient.judge import Progress
from loralab.gradient.session import Parts, Record, Summed, run_session
from loralab.rollouts import Batch, Rollout
from loralab.run import Run
from loralab.tasks.base import Example, Labelled, Prompt, Score, Split


def classify(
    config: ClassifyConfig,
    run: Run,
    on_event: OnTrainingEvent = ignore,
    stopping: Callable[[], bool] = lambda: False,
) -> FineTuned:
    """Train a classifier as the config says in a run directory, or go on with what is there.

    An evaluation adds the task's metrics (held_out_accuracy, held_out_f1) to held_out_correct.

    Raises:
        NonFiniteError: a loss or gradient is not finite.
        UserError: the task has no classes, or what `run_session` raises.
    """
    task = tasks.get(config.task.name, **config.task.options)
    if not isinstance(task, Labelled):
        raise UserError(f"task {task.name} has no classes; expected one that has, such as sst2")
    return run_session(config, run, on_event, stopping, lambda: _parts(config, task))


def _parts(config: ClassifyConfig, task: Any) -> Parts:
    from loralab.models.load import load_classifier

    model, tokenizer = load_classifier(
        config.model, task.classes, config.dtype, config.device, config.seed
    )
    longest = config.training.max_length
    records, cut = [], 0
    for example in task.examples("train"):
        ids = encode(tokenizer, task.text(example))
        cut += len(ids) > longest
        records.append({"input_ids": ids[:longest], "label": task.label(example)})
    pad_id = tokenizer.pad_token_id or 0
    wanted = config.evaluation
    examples = tuple(task.examples(wanted.split)[: wanted.limit])
    texts = _Texts(task)
    batch = Batch(texts, wanted.split, examples, config.generation, str(config.seed))
    return Parts(
        model=model,
        tokenizer=tokenizer,
        records=records,
        tokens=sum(len(record["input_ids"]) for record in records),
        learned=len(records),
        cut=cut,
        collate=lambda some: collate(some, pad_id),
        judge=ClassJudge(model, tokenizer, batch, task, config.training.batch_size, longest),
        trainer=Summed,
        arguments=TrainingArguments,
        wrapped=last_token_head,
    )


def encode(tokenizer: Any, text: str) -> list[int]:
    """A text's tokens as the tokenizer begins and ends texts; never none."""
    ids = list(tokenizer(text)["input_ids"])
    if not ids:
        begin = tokenizer.bos_token_id
        ids = [tokenizer.eos_token_id if begin is None else begin]
    return ids


def collate(records: Sequence[Record], pad_id: int) -> dict[str, Tensor]:
    """input_ids, attention_mask (rows, longest), padded on the right; labels (rows,) where the
    records have them."""
    longest = max(len(record["input_ids"]) for record in records)
    ids = torch.full((len(records), longest), pad_id)
    mask = torch.zeros(len(records), longest, dtype=torch.long)
    for row, record in enumerate(records):
        length = len(record["input_ids"])
        ids[row, :length] = torch.tensor(record["input_ids"])
        mask[row, :length] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    if "label" in records[0]:
        batch["labels"] = torch.tensor([record["label"] for record in records])
    return batch


@contextmanager
def last_token_head(model: Any) -> Iterator[None]:
    """Within it a decoder with a `score` head pools by the attention mask, runs the head on those
    tokens alone, and gives logits without a loss. Encoders pool otherwise and are left as they are.

    model: a Transformers ...ForSequenceClassification without PEFT's wrapper.
    """
    if not hasattr(model, "score"):
        yield
        return
    body = getattr(model, model.base_model_prefix)

    def forward(
        self: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> SequenceClassifierOutput:
        hidden = body(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        places = torch.arange(mask.shape[1], device=mask.device)
        last = (places * (mask != 0)).argmax(1)
        pooled = hidden[torch.arange(len(hidden), device=hidden.device), last]
        logits = self.score(pooled.to(_dtype(self.score))).float()
        return SequenceClassifierOutput(logits=logits)

    with forward_as(model, forward):
        yield


def _dtype(head: Any) -> torch.dtype:
    """PEFT keeps a head that is trained in float32, whatever the model is in."""
    parameters: list[Tensor] = list(head.parameters())
    return next((p for p in parameters if p.requires_grad), parameters[0]).dtype


@torch.no_grad()
def predict(
    model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int, max_length: int
) -> list[int]:
    """The likeliest class of each text.

    model: as `last_token_head` has it, or PEFT's around it.
    """
    device = model.get_input_embeddings().weight.device
    was_training = model.training
    model.eval()
    found: list[int] = []
    try:
        with last_token_head(causal_of(model)):
            for at in range(0, len(texts), batch_size):
                some = [
                    {"input_ids": encode(tokenizer, text)[:max_length]}
                    for text in texts[at : at + batch_size]
                ]
                batch = collate(some, tokenizer.pad_token_id or 0)
                logits = model(**{name: x.to(device) for name, x in batch.items()}).logits
                found += logits.argmax(-1).tolist()
    finally:
        model.train(was_training)
    return found


class ClassJudge:
    """Answers a text with the name of its likeliest class."""

    def __init__(
        self, model: Any, tokenizer: Any, batch: Batch, task: Any, batch_size: int, max_length: int
    ) -> None:
        self.batch = batch
        self._model = model
        self._tokenizer = tokenizer
        self._task = task
        self._batch_size = batch_size
        self._max_length = max_length

    def base(self, progress: Progress | None = None) -> list[Rollout]:
        """With the head as it was drawn or loaded."""
        return self.trained(self._model, progress)

    def trained(self, model: Any, progress: Progress | None = None) -> list[Rollout]:
        """As the model is now."""
        texts = [self._task.text(example) for example in self.batch.examples]
        classes = predict(model, self._tokenizer, texts, self._batch_size, self._max_length)
        names = [self._task.classes[number] for number in classes]
        if progress is not None:
            progress(len(names), len(names))
        return self.batch.judge([Completion(name, (), "stop") for name in names])


class _Texts:
    """A labelled task whose prompt is the text alone: what a classifier sees."""

    def __init__(self, task: Any) -> None:
        self._task = task
        self.name: str = task.name
        self.reward_floor = 0.0

    def examples(self, split: Split) -> Sequence[Example]:
        found: Sequence[Example] = self._task.examples(split)
        return found

    def prompt(self, example: Example) -> Prompt:
        return str(self._task.text(example))

    def score(self, example: Example, completion: str) -> Score:
        right = completion == self.gold(example)
        return Score(float(right), right)

    def gold(self, example: Example) -> str | None:
        return str(self._task.classes[self._task.label(example)])

    def metrics(self, answered: Sequence[tuple[Example, str]]) -> Mapping[str, float]:
        from loralab.tasks.metrics import classification

        classes = list(self._task.classes)
        return classification(
            [classes.index(name) for _, name in answered],
            [self._task.label(example) for example, _ in answered],
        )
