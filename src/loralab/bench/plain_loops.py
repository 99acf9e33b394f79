"""Training loops of a few lines, as a tutorial writes them: AdamW, clipping, a falling rate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from loralab.bench.gate import Gate
from loralab.bench.work import Record, Work
from loralab.gradient.collate import as_row, pad
from loralab.gradient.rows import IGNORED

Batch = Mapping[str, Any]


def peft(work: Work, gate: Gate) -> None:
    """PEFT's model on padded batches, the loss of the whole logits; fine-tuning."""
    model, tokenizer = work.adapted()
    batches = (
        pad([as_row(record) for record in records], tokenizer.pad_token_id)
        for records in work.batches()
    )
    _loop(work, gate, model, batches, lambda batch: model(**batch, use_cache=False).loss)


def llama(work: Work, gate: Gate) -> None:
    """Transformers' Llama with the weights of the decoder; pretraining."""
    from loralab.models.decoder_export import to_llama

    decoder, _ = work.load("float32")
    model: Any = to_llama(decoder)
    model.requires_grad_(True)
    batches = (_whole_rows(records) for records in work.batches())
    _loop(work, gate, model, batches, lambda batch: model(**batch, use_cache=False).loss)


def nano(work: Work, gate: Gate) -> None:
    """A GPT of the decoder's shape; pretraining."""
    from transformers import set_seed

    from loralab.bench.nano_gpt import NanoGPT

    decoder, _ = work.load("float32")
    set_seed(work.seed)
    model = NanoGPT(decoder.config)
    batches = (_whole_rows(records) for records in work.batches())

    def loss_of(batch: Batch) -> Tensor:
        loss: Tensor = model(batch["input_ids"][:, :-1], batch["labels"][:, 1:])
        return loss

    _loop(work, gate, model, batches, loss_of)


def _whole_rows(records: list[Record]) -> Batch:
    """Rows of one length, read through the borders of their documents."""
    ids = torch.tensor([record["input_ids"] for record in records])
    labels = torch.tensor([record["labels"] for record in records])
    for row, record in enumerate(records):
        starts = torch.tensor([0, *record["seq_lengths"][:-1]]).cumsum(0)
        labels[row, starts] = IGNORED
    return {"input_ids": ids, "labels": labels}


def _loop(
    work: Work,
    gate: Gate,
    model: Any,
    batches: Iterator[Batch],
    loss_of: Callable[[Batch], Tensor],
) -> None:
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=work.lr, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / work.steps)
    gate.open()
    for batch in batches:
        gate.watch(batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=work.bf16):
            loss = loss_of(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        gate.step(float(loss.detach()))
