"""Models and what they compute, for the tests of `loralab export`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from peft import PeftModel

import tiny

PROMPT = [0, 5, 17, 33, 9, 60, 21, 8]


def save(model: Any, path: Path) -> str:
    model.save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return str(path)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=torch.tensor([PROMPT])).logits[0].float()
    return result


def load(path: Path) -> Any:
    return tf.AutoModelForCausalLM.from_pretrained(path).eval()


def adapted(model: Any, path: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(copy.deepcopy(model), path).eval())


def far(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())
