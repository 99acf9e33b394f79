"""Supervised fine-tuning of a model in memory: TRL's trainer around a step of our own.

The loop, the optimiser, the schedule, checkpoints and many machines are TRL's and Transformers'
(SFTTrainer on Trainer on Accelerate). Ours are the rows (see `rows`), and where the model is of a
kind that allows it, the step: the loss on learned tokens alone (`loss`), sequences end to end
instead of padding (`attention`), fused LoRA products (`fast`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback
from trl import SFTConfig as TrlConfig
from trl import SFTTrainer

from loralab.config import TrainingConfig
from loralab.errors import UserError
from loralab.gradient import attention, loss
from loralab.gradient.collate import as_record, as_row, flatten, pad
from loralab.gradient.forward import causal_of, forward_kept
from loralab.gradient.loop import (
    History,
    arguments,
    fast_step,
    precision_kept,
    quiet,
)
from loralab.gradient.parts import InParts, set_parts
from loralab.gradient.rows import Row, pack


def train(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    settings: TrainingConfig,
    seed: int,
    callbacks: Sequence[Any] = (),
    output_dir: Path | None = None,
    *,
    resume_from: Path | None = None,
    autocast: bool = False,
) -> History:
    """Train what is trainable in a model (a PeftModel, or the model itself), in place.

    Rows are visited in an order that depends on the seed alone. The model is left in evaluation
    mode, and its `forward` and attention as they were.

    callbacks: Transformers' TrainerCallback objects; `on_log` sees every step, with `tokens` seen
        so far and the step's `seconds` beside the Trainer's own numbers.
    output_dir: where checkpoints go, every `settings.save_every` steps and when a callback asks;
        None writes nothing.
    resume_from: a checkpoint's directory. Training goes on as if it had not been interrupted, on
        the CPU to the same bits.
    autocast: weights are float32 but products run in bf16 (full fine-tuning).

    Raises:
        NonFiniteError: a loss or gradient is not finite.
        UserError: no rows, or an optimizer that is not there.
    """
    if not rows:
        raise UserError("there are no rows to train on")
    causal = causal_of(model)
    notes, flat, labelled = _plan(causal, settings)
    if settings.packing:
        rows = pack(rows, settings.max_length)
    with ExitStack() as stack:
        folder = output_dir or Path(stack.enter_context(TemporaryDirectory()))
        stack.enter_context(forward_kept(model, causal))
        stack.enter_context(quiet())
        trl = arguments(
            TrlConfig,
            model,
            settings,
            seed,
            folder,
            autocast,
            keep=output_dir is not None,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

        def collate(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
            batch = [as_row(record) for record in records]
            return flatten(batch) if flat else pad(batch, pad_id)

        try:
            with precision_kept(model):
                trainer = _Trainer(
                    model=model,
                    args=trl,
                    data_collator=collate,
                    train_dataset=Dataset.from_list([as_record(row) for row in rows]),
                    processing_class=tokenizer,
                    callbacks=list(callbacks),
                )
        except ValueError as error:  # TRL's word for a combination it does not train
            raise UserError(f"training: {' '.join(str(error).split())}") from error
        trainer.own_loss = labelled
        if labelled:  # divided by the learned tokens of the update, whatever a part has of them
            set_parts(trainer, causal)
        trainer.remove_callback(PrinterCallback)
        # It would write its tokens into the model's config, and itself into each checkpoint.
        trainer.processing_class = None
        if settings.fast:
            notes += stack.enter_context(fast_step(model))
        if labelled:
            stack.enter_context(loss.labelled_head(causal))
        stack.enter_context(attention.named_attention(causal, attention.NAME if flat else None))
        try:
            trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
        finally:
            model.eval()
    return History.of(trainer, notes)


def _plan(causal: Any, settings: TrainingConfig) -> tuple[tuple[str, ...], bool, bool]:
    """What is to be said, whether batches are flat, whether the loss is ours."""
    if not settings.fast:
        if settings.packing:
            raise UserError("training.packing needs training.fast: true")
        return (), False, False
    from_loss, from_attention = loss.reason_against(causal), attention.reason_against(causal)
    if from_attention and settings.packing:
        raise UserError(f"training.packing: this model cannot: {from_attention}")
    notes = []
    if from_loss:
        notes.append(f"the loss is TRL's, slower than ours: {from_loss}")
    if from_attention:
        notes.append(f"batches are padded: {from_attention}")
    # TRL's loss counts tokens by the attention mask that flat batches do not have.
    flat = from_attention is None and from_loss is None
    return tuple(notes), flat, from_loss is None


class _Trainer(InParts, SFTTrainer):  # type: ignore[misc]
    """TRL's, with our loss where the model allows it."""

    own_loss = False
    # The loss is divided by the learned tokens of the whole update, not of each batch.
    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        if not self.own_loss:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        value = outputs["loss"]
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            value = value * self.accelerator.num_processes
        return (value, outputs) if return_outputs else value
