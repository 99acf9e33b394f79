"""What every way of a step benchmark is given: a model, rows on disk and the same settings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loralab.errors import UserError

Record = dict[str, list[int]]


@dataclass(frozen=True)
class Work:
    """Settings that the ways share.

    model: as `loralab.load` takes it. rows: a JSON file of records. steps: of the whole training,
    which the learning rate falls over. rank: of the adapter on every linear of the decoder.
    """

    model: str
    dtype: str
    rows: str
    steps: int
    batch_size: int = 8
    max_length: int = 512
    rank: int = 16
    lr: float = 2e-4
    seed: int = 0

    @property
    def bf16(self) -> bool:
        return self.dtype == "bfloat16"

    def load(self, dtype: str | None = None) -> tuple[Any, Any]:
        """The model, frozen, and its tokenizer."""
        from loralab.models.load import load

        return load(self.model, dtype or self.dtype)

    def lora(self) -> Any:
        """PEFT's own configuration; the adapter of a bf16 model is float32, PEFT's default."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=2 * self.rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )

    def adapted(self) -> tuple[Any, Any]:
        """The model with its adapter, and the tokenizer; factors as TRL's trainer draws them."""
        from peft import get_peft_model
        from transformers import set_seed

        model, tokenizer = self.load()
        set_seed(self.seed)
        return get_peft_model(model, self.lora()), tokenizer

    def write(self, records: Sequence[Any], source: str) -> None:
        """Write the rows. source: what they were made of, in words.

        Raises:
            UserError: there are none.
        """
        if not records:
            raise UserError(
                f"{source}: not one row to train on, at a max_length of {self.max_length} tokens; "
                "expected more text"
            )
        Path(self.rows).write_text(json.dumps(records))

    def records(self) -> list[Any]:
        """The rows, as they were written."""
        found: list[Any] = json.loads(Path(self.rows).read_text())
        return found

    def batches(self) -> Iterator[list[Any]]:
        """Records of each step, without end, in the order in which the Trainer visits them."""
        records, epoch = self.records(), 0
        while True:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(len(records), generator=generator).tolist()
            for at in range(0, len(order), self.batch_size):
                yield [records[i] for i in order[at : at + self.batch_size]]
            epoch += 1
