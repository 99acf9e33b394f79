"""TRL's trainers as peers, set up as its documentation does, on rows that are ready-made tokens.

Defaults are TRL's: float32 adapters, bf16 autocast, AdamW fused, its own collator. Gradient
checkpointing, its default too, is off: it would trade time for memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from datasets import Dataset

from loralab.bench.gate import Gate, GateCallback
from loralab.bench.work import Work
from loralab.gradient.loop import quiet


def sft(work: Work, gate: Gate) -> None:
    """SFTTrainer with a LoraConfig."""
    from trl import SFTConfig, SFTTrainer

    with _arguments(work) as given:
        model, tokenizer = work.load()
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(**given),
            train_dataset=Dataset.from_list(work.records()),
            processing_class=tokenizer,
            peft_config=work.lora(),
            callbacks=[GateCallback(gate)],
        )
        trainer.train()


def sft_labelled(work: Work, gate: Gate) -> None:
    """The same, its head on labelled positions alone, as TRL runs it where there is Triton."""
    with patch("trl.trainer.utils._use_triton", lambda device: True):
        sft(work, gate)


def dpo(work: Work, gate: Gate) -> None:
    """DPOTrainer with a LoraConfig; its reference is the model with the adapter off."""
    from trl import DPOConfig, DPOTrainer

    class Prepared(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
            return dataset  # tokens already

    with _arguments(work) as given:
        model, tokenizer = work.load()
        trainer = Prepared(
            model=model,
            args=DPOConfig(**given),
            train_dataset=Dataset.from_list(work.records()),
            processing_class=tokenizer,
            peft_config=work.lora(),
            callbacks=[GateCallback(gate)],
        )
        trainer.train()


def dpo_labelled(work: Work, gate: Gate) -> None:
    """The same, its head on answer tokens alone, as TRL runs it where there is Triton."""
    with patch("trl.trainer.utils._use_triton", lambda device: True):
        dpo(work, gate)


@contextmanager
def _arguments(work: Work) -> Iterator[dict[str, Any]]:
    """What the trainers' arguments have in common."""
    with ExitStack() as stack:
        stack.enter_context(quiet())
        yield {
            "output_dir": stack.enter_context(TemporaryDirectory()),
            "per_device_train_batch_size": work.batch_size,
            "max_steps": work.steps,
            "max_length": work.max_length,
            "learning_rate": work.lr,
            "seed": work.seed,
            "bf16": work.bf16,
            "gradient_checkpointing": False,
            "use_cpu": True,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
