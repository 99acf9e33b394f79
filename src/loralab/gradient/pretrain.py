"""A pretraining run: from a corpus to a decoder with its tokenizer, resumable at checkpoints."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from loralab import durable, ranks
from loralab.config.pretrain import PretrainConfig
from loralab.errors import UserError
from loralab.gradient.collate import as_row, flatten, pad
from loralab.gradient.contamination import contaminated
from loralab.gradient.corpus import Source, read_corpus, texts_of_pairs
from loralab.gradient.diary import Diary
from loralab.gradient.events import (
    Evaluated,
    OnTrainingEvent,
    Remark,
    TrainingEnded,
    TrainingStarted,
    ignore,
)
from loralab.gradient.forward import forward_kept
from loralab.gradient.guarded import guards
from loralab.gradient.held_out import mean_loss, own_step, perplexity, sample
from loralab.gradient.loop import (
    History,
    Watched,
    arguments,
    quiet,
    total_steps,
)
from loralab.gradient.outputs import kept_when_not_finite, resumed, save_trained
from loralab.gradient.rows import Row
from loralab.gradient.stream import Mixture, rows_of, shuffled, token_counts
from loralab.gradient.tokenizer import train_tokenizer
from loralab.models.decoder import DecoderConfig, DecoderForCausalLM
from loralab.run import Run
from loralab.timings import Timings

CURVE = "evaluation.csv"
"""The file of a run that holds step, tokens, loss and perplexity of each evaluation."""


@dataclass(frozen=True)
class Pretrained:
    """How a run went. complete: False if it stopped at a signal. steps: done in all."""

    complete: bool
    steps: int
    losses: tuple[float, ...]


def pretrain(
    config: PretrainConfig,
    run: Run,
    on_event: OnTrainingEvent = ignore,
    stopping: Callable[[], bool] = lambda: False,
) -> Pretrained:
    """Pretrain as the config says in a run directory, or go on with what is there.

    stopping: asked after every step; True saves a checkpoint and ends the run early.

    Raises:
        NonFiniteError: a loss or gradient is not finite; `model/` holds the weights before it.
        UserError: something the user can mend; the run can be resumed afterwards.
    """
    with Timings.of_run(run.timings_path) as timings:
        return _pretrain(config, run, on_event, stopping, timings)


def _pretrain(
    config: PretrainConfig,
    run: Run,
    on_event: OnTrainingEvent,
    stopping: Callable[[], bool],
    timings: Timings,
) -> Pretrained:
    from loralab.models.load import pick_device

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    settings = config.training
    shape_of(config, vocab_size=config.tokenizer.vocab_size)  # before anything is written
    with timings.phase("data"):
        sources = _without_leaks(read_corpus(config.corpus), config, on_event)
        if not run.leads:
            ranks.wait()  # for the tokenizer of the process that leads
        tokenizer = tokenizer_of(
            config, run.path / "tokenizer", (d.whole for s in sources for d in s.train)
        )
        if run.leads:
            ranks.wait()
        length, packed = settings.max_length, settings.packing
        parts = [
            rows_of(
                s,
                shuffled(s.train, config.seed),
                tokenizer,
                length,
                packed,
                said=lambda text: on_event(Remark(text)),
            )
            for s in sources
        ]
        counts = [token_counts(part) for part in parts]
        mixture = Mixture(parts, [s.config.weight for s in sources])
        held = [
            row for s in sources if s.test for row in rows_of(s, s.test, tokenizer, length, packed)
        ]
        held = held[: config.evaluation.limit]
    if repeated := sum(source.repeated for source in sources):
        on_event(Remark(f"{repeated} training documents are held out too and were left out"))
    with timings.phase("init_population"):
        model = build(config, tokenizer).to(device)

    resume_from, done = resumed(run)
    probe = _Probe(config, run, model, tokenizer, held, timings, on_event)
    if not any(row.get("phase") == "before" for row in run.metrics()):
        probe.line(0, "before")
    diary = _Diary(config, run, timings, on_event, stopping, probe.scores)
    watching = [diary, *guards(config, run.path, tokenizer, on_event)]
    on_event(
        TrainingStarted(
            model=f"{config.name} ({config.decoder.attention} attention)",
            task=", ".join(Path(source.path).name for source in config.corpus),
            rows=len(mixture),
            tokens=sum(tokens for tokens, _ in counts),
            learned=sum(learned for _, learned in counts),
            parameters=sum(p.numel() for p in model.parameters()),
            steps=total_steps(len(mixture), settings),
            resumed_at=done or None,
        )
    )
    with timings.phase("training"), kept_when_not_finite(model, tokenizer, config.model, run):
        history = train(model, tokenizer, mixture, config, watching, run.checkpoints, resume_from)
    with timings.phase("saving"), quiet():
        save_trained(model, tokenizer, config.model, run)
    if history.complete:
        probe.line(history.steps, "after")
    on_event(TrainingEnded(history.complete, history.steps))
    return Pretrained(history.complete, history.steps, history.losses)


def _without_leaks(
    sources: Sequence[Source], config: PretrainConfig, on_event: OnTrainingEvent
) -> list[Source]:
    """The sources, those of pairs without rows that are evaluated on."""
    kept = []
    for source in sources:
        if source.config.format == "pairs":
            held = {"its held-out rows": texts_of_pairs(source.test)}
            learned = texts_of_pairs(source.train)
            leaked = contaminated(learned, held, config.contamination, on_event)
            train = tuple(d for d in source.train if d.place not in leaked)
            if not train:
                raise UserError(f"{source.config.path}: contamination leaves no document to learn")
            source = replace(source, train=train)
        kept.append(source)
    return kept


def tokenizer_of(config: PretrainConfig, folder: Path, texts: Iterable[str]) -> Any:
    """The tokenizer in the folder if there is one, else the config's, written there.

    Raises:
        UserError: the config's tokenizer cannot be read, or has no end token.
    """
    wanted = config.tokenizer
    if (folder / "tokenizer.json").is_file():
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if wanted.path is None:
        made = train_tokenizer(texts, wanted.vocab_size, config.decoder.max_position_embeddings)
    else:
        try:
            made = AutoTokenizer.from_pretrained(wanted.path)
        except (OSError, ValueError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(f"tokenizer.path {wanted.path!r}: {reason}") from error
        if made.eos_token_id is None:
            raise UserError(f"tokenizer.path {wanted.path!r}: has no end token to put after a text")
    durable.publish(folder, lambda draft: made.save_pretrained(draft))
    return made


def shape_of(config: PretrainConfig, **tokens: int | None) -> DecoderConfig:
    """The config's decoder as Transformers has it; tokens: vocab_size and special ids.

    Raises:
        UserError: sizes that do not fit together.
    """
    try:
        return DecoderConfig(**config.decoder.model_dump(), **tokens)
    except ValueError as error:
        raise UserError(f"decoder: {' '.join(str(error).split())}") from error


def build(config: PretrainConfig, tokenizer: Any) -> DecoderForCausalLM:
    """The config's decoder in float32, with random weights that depend on the seed alone.

    Raises:
        UserError: sizes that do not fit together.
    """
    shape = shape_of(
        config,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed % 2**32)
        model: DecoderForCausalLM = DecoderForCausalLM(shape).eval()
    return model


class _Trainer(Watched):
    """Transformers' trainer; a batch's loss is divided by the tokens of the whole update."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True


def train(
    model: DecoderForCausalLM,
    tokenizer: Any,
    rows: Mixture,
    config: PretrainConfig,
    callbacks: Sequence[TrainerCallback] = (),
    output_dir: Path | None = None,
    resume_from: Path | None = None,
) -> History:
    """Train every weight on the rows, in place. See `sft.train` for callbacks and checkpoints.

    Raises:
        NonFiniteError: a loss or gradient is not finite.
    """
    settings = config.training
    with ExitStack() as stack:
        folder = output_dir or Path(stack.enter_context(TemporaryDirectory()))
        stack.enter_context(forward_kept(model))
        stack.enter_context(quiet())
        flat = stack.enter_context(own_step(model, settings.fast))

        def collate(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
            batch = [as_row(record) for record in records]
            return flatten(batch) if flat else pad(batch, tokenizer.pad_token_id or 0)

        trainer = _Trainer(
            model=model.requires_grad_(True),
            args=arguments(
                TrainingArguments,
                model,
                settings,
                config.seed,
                folder,
                autocast=config.dtype == "bfloat16",
                keep=output_dir is not None,
            ),
            data_collator=collate,
            train_dataset=rows,
            callbacks=list(callbacks),
        )
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
        finally:
            model.eval()
        return History.of(trainer, ())


class _Probe:
    """Loss on what is held out and texts for the config's prompts, into the run directory."""

    def __init__(
        self,
        config: PretrainConfig,
        run: Run,
        model: DecoderForCausalLM,
        tokenizer: Any,
        held: Sequence[Row],
        timings: Timings,
        on_event: OnTrainingEvent,
    ) -> None:
        self._config = config
        self._run = run
        self._model = model
        self._tokenizer = tokenizer
        self._held = held
        self._timings = timings
        self._on_event = on_event

    def line(self, step: int, phase: str) -> None:
        """Evaluate, and write a line of metrics of its own."""
        if not self._run.leads:
            return
        scores = self.scores(step, phase)
        tokens = max((row.get("tokens", 0) for row in self._run.metrics()), default=0)
        self._run.log_metrics({"step": step, "phase": phase, "tokens": tokens, **scores})
        write_curve(self._run)

    def scores(self, step: int, phase: str = "during") -> dict[str, Any]:
        """Evaluate, and say how it went; what it adds to a line of metrics."""
        config, prompts = self._config, self._config.evaluation.prompts
        with self._timings.phase("evaluation"):
            held = mean_loss(
                self._model,
                self._held,
                config.training.batch_size,
                autocast=config.dtype == "bfloat16",
            )
            texts = sample(self._model, self._tokenizer, prompts, config.generation, config.seed)
        self._run.log_completions(
            {
                "step": step,
                "phase": phase,
                "split": "test",
                "example": f"prompt {number}",
                "prompt": prompt,
                "gold": None,
                "completion": text,
                "reward": None,
                "correct": None,
            }
            for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True), 1)
        )
        if texts:
            self._on_event(Evaluated(step, held, prompts[0], texts[0]))
        return {} if held is None else {"held_out_loss": held, "perplexity": perplexity(held)}


class _Diary(Diary):
    """Keeps the file of evaluations up to date with the lines."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **more: Any,
    ) -> None:
        super().on_log(args, state, control, logs, **more)
        every = self._config.evaluation.every
        if every is not None and state.global_step % every == 0:
            write_curve(self._run)


def write_curve(run: Run) -> None:
    """Write the evaluations of a run so far as `evaluation.csv`, from its metrics."""
    columns = ("step", "tokens", "held_out_loss", "perplexity")
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("step", "tokens", "loss", "perplexity"))
    for row in run.metrics():
        if row.get("held_out_loss") is not None:
            table.writerow([row.get(column) for column in columns])
    run.write(CURVE, text.getvalue())
