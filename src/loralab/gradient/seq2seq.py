"""Encoder-decoders such as T5: the encoder reads a prompt, the decoder learns the answer.

The loop is Transformers' Seq2SeqTrainer. The loss of an update is the mean over its answer tokens,
however they fall into batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from loralab import tasks
from loralab.config.seq2seq import Seq2SeqConfig
from loralab.engines.base import Completion
from loralab.gradient.events import OnTrainingEvent, ignore
from loralab.gradient.fine_tune import FineTuned
from loralab.gradient.judge import Progress
from loralab.gradient.rows import IGNORED
from loralab.gradient.session import Parts, Record, Summed, run_session
from loralab.rollouts import Batch, Rollout, stable_hash
from loralab.run import Run
from loralab.tasks.base import Example, Measured, Prompt, Score, Split, Task


def seq2seq(
    config: Seq2SeqConfig,
    run: Run,
    on_event: OnTrainingEvent = ignore,
    stopping: Callable[[], bool] = lambda: False,
) -> FineTuned:
    """Train an encoder-decoder as the config says in a run directory, or go on with what is there.

    An evaluation adds the task's metrics (held_out_rougeL) to held_out_reward.

    Raises:
        NonFiniteError: a loss or gradient is not finite.
        UserError: what `run_session` raises, or a model that is no encoder-decoder.
    """
    task = tasks.get(config.task.name, **config.task.options)
    return run_session(config, run, on_event, stopping, lambda: _parts(config, task))


def _parts(config: Seq2SeqConfig, task: Task) -> Parts:
    from loralab.models.load import load_seq2seq

    model, tokenizer = load_seq2seq(config.model, config.dtype, config.device)
    kind = _Measured if isinstance(task, Measured) else _Sources
    sources: Task = kind(task, config.prefix)
    records, cut = [], 0
    for example in sources.examples("train"):
        gold = sources.gold(example)
        if gold is None:
            continue
        source = ended(tokenizer, plain_prompt(sources.prompt(example)))
        target = ended(tokenizer, gold.strip())
        cut += len(source) > config.training.max_length or len(target) > config.target_length
        records.append(
            {
                "input_ids": source[: config.training.max_length],
                "labels": target[: config.target_length],
            }
        )
    wanted = config.evaluation
    examples = tuple(sources.examples(wanted.split)[: wanted.limit])
    batch = Batch(sources, wanted.split, examples, config.generation, str(config.seed))
    pad_id = tokenizer.pad_token_id or 0
    return Parts(
        model=model,
        tokenizer=tokenizer,
        records=records,
        tokens=sum(len(r["input_ids"]) + len(r["labels"]) for r in records),
        learned=sum(len(record["labels"]) for record in records),
        cut=cut,
        collate=lambda some: collate(some, pad_id),
        judge=SourceJudge(model, tokenizer, batch, config),
        trainer=_Trainer,
        arguments=Seq2SeqTrainingArguments,
    )


def ended(tokenizer: Any, text: str) -> list[int]:
    """A text's tokens with one end token behind them, whether or not the tokenizer adds it."""
    ids = list(tokenizer(text)["input_ids"])
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def plain_prompt(prompt: Prompt) -> str:
    """A prompt as one text: messages one after the other."""
    return prompt if isinstance(prompt, str) else "\n\n".join(m["content"] for m in prompt)


def collate(records: Sequence[Record], pad_id: int) -> dict[str, Tensor]:
    """input_ids, attention_mask (rows, longest source), labels (rows, longest answer), -100 behind
    an answer: padding is known by the lengths, an end token is learned."""
    wide = max(len(record["input_ids"]) for record in records)
    deep = max(len(record["labels"]) for record in records)
    ids = torch.full((len(records), wide), pad_id)
    mask = torch.zeros(len(records), wide, dtype=torch.long)
    labels = torch.full((len(records), deep), IGNORED)
    for row, record in enumerate(records):
        source, target = record["input_ids"], record["labels"]
        ids[row, : len(source)] = torch.tensor(source)
        mask[row, : len(source)] = 1
        labels[row, : len(target)] = torch.tensor(target)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class _Trainer(Summed, Seq2SeqTrainer):  # type: ignore[misc]
    """Transformers', with our loss."""


@torch.no_grad()
def answer(
    model: Any, tokenizer: Any, sources: Sequence[str], config: Seq2SeqConfig, seeds: Sequence[int]
) -> list[Completion]:
    """What the model writes for each source; sampled ones depend on their own seed alone."""
    settings = config.generation
    device = model.get_input_embeddings().weight.device
    size = config.training.batch_size if settings.temperature == 0 else 1
    sampled: dict[str, Any] = {}
    if settings.temperature > 0:
        sampled = {
            "do_sample": True,
            "temperature": settings.temperature,
            "top_k": settings.top_k,
            "top_p": settings.top_p,
        }
    was_training = model.training
    model.eval()
    made: list[Completion] = []
    try:
        for at in range(0, len(sources), size):
            some = [
                {"input_ids": ended(tokenizer, s)[: config.training.max_length], "labels": []}
                for s in sources[at : at + size]
            ]
            batch = collate(some, tokenizer.pad_token_id or 0)
            with torch.random.fork_rng():
                torch.manual_seed(seeds[at])
                out = model.generate(
                    input_ids=batch["input_ids"].to(device),
                    attention_mask=batch["attention_mask"].to(device),
                    max_new_tokens=settings.max_new_tokens,
                    num_beams=config.beams,
                    **{"do_sample": False, **sampled},
                )
            made += [_completion(tokenizer, ids, settings.max_new_tokens) for ids in out.tolist()]
    finally:
        model.train(was_training)
    return made


def _completion(tokenizer: Any, ids: list[int], longest: int) -> Completion:
    """Without the decoder's first token and what follows the end."""
    new = ids[1:]
    end = tokenizer.eos_token_id
    if end in new:
        new = new[: new.index(end) + 1]
    stopped = new[-1:] == [end] or len(new) < longest
    text = tokenizer.decode(new, skip_special_tokens=True)
    return Completion(text, tuple(new), "stop" if stopped else "length")


class SourceJudge:
    """Answers held-out prompts by `generate`."""

    def __init__(self, model: Any, tokenizer: Any, batch: Batch, config: Seq2SeqConfig) -> None:
        self.batch = batch
        self._model = model
        self._tokenizer = tokenizer
        self._config = config

    def base(self, progress: Progress | None = None) -> list[Rollout]:
        """Before anything is attached."""
        return self.trained(self._model, progress)

    def trained(self, model: Any, progress: Progress | None = None) -> list[Rollout]:
        """As the model is now."""
        batch = self.batch
        sources = [plain_prompt(batch.task.prompt(example)) for example in batch.examples]
        seeds = [stable_hash(batch.key, batch.split, e.id) >> 1 for e in batch.examples]
        completions = answer(model, self._tokenizer, sources, self._config, seeds)
        if progress is not None:
            progress(len(completions), len(completions))
        return batch.judge(completions)


class _Sources:
    """A task whose prompts are texts with a prefix: what an encoder sees."""

    def __init__(self, task: Task, prefix: str) -> None:
        self._task = task
        self._prefix = prefix
        self.name = task.name
        self.reward_floor = task.reward_floor

    def examples(self, split: Split) -> Sequence[Example]:
        return self._task.examples(split)

    def prompt(self, example: Example) -> Prompt:
        return self._prefix + plain_prompt(self._task.prompt(example))

    def score(self, example: Example, completion: str) -> Score:
        return self._task.score(example, completion)

    def gold(self, example: Example) -> str | None:
        return self._task.gold(example)


class _Measured(_Sources):
    def metrics(self, answered: Sequence[tuple[Example, str]]) -> Mapping[str, float]:
        assert isinstance(self._task, Measured)
        return self._task.metrics(answered)
