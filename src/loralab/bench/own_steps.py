"""loralab's own training as ways: what `loralab run` calls, with a gate for a callback."""

from __future__ import annotations

from collections.abc import Sequence
from unittest.mock import patch

from loralab.bench.gate import Gate, GateCallback
from loralab.bench.work import Work
from loralab.config import PretrainConfig, TrainingConfig
from loralab.config.dpo import PreferenceConfig
from loralab.config.pretrain import SourceConfig
from loralab.errors import UserError
from loralab.gradient import attention
from loralab.gradient.collate import as_row
from loralab.gradient.native.layers import kernels
from loralab.gradient.native.switch import plain_pytorch
from loralab.gradient.rows import IGNORED, Row


def sft(work: Work, gate: Gate) -> None:
    """Fine-tuning in plain PyTorch."""
    with plain_pytorch():
        _sft(work, gate)


def sft_padded(work: Work, gate: Gate) -> None:
    """Fine-tuning in plain PyTorch, on padded batches."""
    with (
        plain_pytorch(),
        patch.object(attention, "reason_against", lambda model: "asked for by the benchmark"),
    ):
        _sft(work, gate)


def sft_native(work: Work, gate: Gate) -> None:
    """Fine-tuning with native kernels."""
    _need_kernels()
    _sft(work, gate)


def dpo(work: Work, gate: Gate) -> None:
    """Preference optimisation in plain PyTorch."""
    with plain_pytorch():
        _dpo(work, gate)


def dpo_native(work: Work, gate: Gate) -> None:
    """Preference optimisation with native kernels."""
    _need_kernels()
    _dpo(work, gate)


def pretrain(work: Work, gate: Gate) -> None:
    """Pretraining in plain PyTorch."""
    with plain_pytorch():
        _pretrain(work, gate)


def pretrain_native(work: Work, gate: Gate) -> None:
    """Pretraining with native kernels."""
    _need_kernels()
    _pretrain(work, gate)


def _need_kernels() -> None:
    if kernels() is None:
        raise UserError("the native kernels cannot be built here")


def _sft(work: Work, gate: Gate) -> None:
    from loralab.gradient.sft import train

    model, tokenizer = work.adapted()
    rows = [as_row(record) for record in work.records()]
    train(model, tokenizer, rows, _settings(work), work.seed, [GateCallback(gate)])


def _dpo(work: Work, gate: Gate) -> None:
    from loralab.gradient.dpo import PairRow, reference_of, train_pairs

    model, tokenizer = work.adapted()
    pairs = [
        PairRow(_row(r["prompt_ids"], r["chosen_ids"]), _row(r["prompt_ids"], r["rejected_ids"]))
        for r in work.records()
    ]
    train_pairs(
        model,
        tokenizer,
        pairs,
        _settings(work),
        PreferenceConfig(),
        work.seed,
        [GateCallback(gate)],
        reference=reference_of(model, "base"),
    )


def _row(prompt: Sequence[int], answer: Sequence[int]) -> Row:
    return Row((*prompt, *answer), (*[IGNORED] * len(prompt), *answer))


def _pretrain(work: Work, gate: Gate) -> None:
    from loralab.gradient.pretrain import train
    from loralab.gradient.stream import Mixture

    # Weights are in float32 whatever the products are in.
    model, tokenizer = work.load("float32")
    rows = Mixture([[as_row(record) for record in work.records()]], [None])
    config = PretrainConfig(
        kind="pretrain",
        name="bench",
        dtype="bfloat16" if work.bf16 else "float32",
        seed=work.seed,
        corpus=(SourceConfig(path=work.rows),),
        training=_settings(work),
    )
    train(model, tokenizer, rows, config, [GateCallback(gate)])


def _settings(work: Work) -> TrainingConfig:
    return TrainingConfig(
        steps=work.steps, batch_size=work.batch_size, max_length=work.max_length, lr=work.lr
    )
