"""A small training in a plain Trainer, to watch: what the guard's tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import tiny
from loralab.health import GuardCallback

PROMPTS = [tiny.words(4, 100 + at) for at in range(4)]


def adapted(seed: int = 0, dropout: float = 0.0, **options: Any) -> Any:
    torch.manual_seed(seed)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        lora_dropout=dropout,
        task_type="CAUSAL_LM",
        **options,
    )
    return get_peft_model(tiny.model("llama"), config)


def rows(count: int = 16, masked: bool = False) -> list[dict[str, Any]]:
    made = []
    for at in range(count):
        ids = [*tiny.tokenizer()(tiny.words(10, at))["input_ids"], tiny.EOS]
        labels = [-100] * len(ids) if masked else list(ids)
        made.append({"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)})
    return made


class Halt(TrainerCallback):  # type: ignore[misc]
    """Ends a training after a step, as a user who interrupts it."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self._step


class Note(TrainerCallback):  # type: ignore[misc]
    """Keeps the weights after each step."""

    def __init__(self, seen: dict[int, dict[str, Tensor]]) -> None:
        self._seen = seen

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._seen[state.global_step] = weights(more["model"])


Losses = Callable[[int], float]


class Poisoned(Trainer):  # type: ignore[misc]
    """Multiplies the loss of some steps, behind what the model returned."""

    factor: Losses = staticmethod(lambda step: 1.0)

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, *args, **kwargs)
        return loss * self.factor(self.state.global_step + 1) if model.training else loss


def trainer(
    folder: Path, model: Any, guard: GuardCallback | None, steps: int = 6, **options: Any
) -> Poisoned:
    data = options.pop("data", None)
    own = ("optimizers", "data_collator", "eval_dataset")
    more = {key: options.pop(key) for key in own if key in options}
    arguments = {
        "max_steps": steps,
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return Poisoned(
        model=model,
        args=TrainingArguments(str(folder), **(arguments | options)),
        train_dataset=rows() if data is None else data,
        processing_class=tiny.tokenizer(),
        callbacks=[] if guard is None else [guard],
        **more,
    )


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rules_of(guard: GuardCallback, severity: str = "fail") -> set[str]:
    return {one.rule for one in guard.findings if one.severity == severity}
