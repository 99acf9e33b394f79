"""The guard of a run, as its config wants it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loralab.config.pretrain import PretrainConfig
from loralab.config.training import GradientConfig
from loralab.gradient.events import OnTrainingEvent, Remark
from loralab.health.guard import GuardCallback

WRITES = ("sft", "dpo", "grpo")
"""Kinds whose model answers prompts in text. Of the others (a classifier, a verifier, a decoder
that has only begun to learn) numbers, gradients and weights are judged alone."""


def guards(
    config: GradientConfig | PretrainConfig,
    folder: Path,
    tokenizer: Any,
    on_event: OnTrainingEvent,
) -> list[GuardCallback]:
    """One, or none with `guard: null`. It writes into the folder, the leader's alone."""
    wanted = config.guard
    if wanted is None:
        return []
    return [
        GuardCallback(
            wanted.prompts,
            wanted.action,
            wanted.every,
            wanted.budget,
            texts=config.kind in WRITES,
            tokenizer=tokenizer,
            folder=folder,
            tell=lambda line: on_event(Remark(line)),
        )
    ]
