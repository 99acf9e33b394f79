"""A run by gradient: TRL's own trainer, as a stranger's script would use it, with the guard on."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from loralab.adapters.attach import peft_config
from loralab.adapters.extract import state_of
from loralab.adapters.inits import initialize
from loralab.adapters.true_base import base_changed
from loralab.bench.faults.faults import CHATML, INST
from loralab.bench.faults.plan import Plan
from loralab.bench.faults.tasks import Small
from loralab.bench.faults.world import World
from loralab.config import AdapterConfig, InitConfig
from loralab.gradient.collate import as_record, as_row, pad
from loralab.gradient.loop import quiet
from loralab.gradient.rows import IGNORED, Row, RowEncoder
from loralab.health.guard import GuardCallback

_EVERY = 5
_EVALUATIONS = 12
"""At most; a long run is evaluated less often."""


class Trainer(SFTTrainer):  # type: ignore[misc]
    """TRL's, whose loss a fault may weigh or poison. weight: (token id, its factor)."""

    weight: tuple[int, float] | None = None
    poisoned: int | None = None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        value, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training and self.weight is not None:
            value = _weighed(model, inputs, *self.weight)
        if model.training and self.state.global_step + 1 == self.poisoned:
            value = value * float("nan")
        return (value, outputs) if return_outputs else value


def _weighed(model: Any, inputs: Mapping[str, Tensor], token: int, factor: float) -> Tensor:
    """Mean loss over learned tokens, `token` counting `factor` times."""
    logits = model.get_base_model()(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
    ).logits[:, :-1]
    labels = inputs["labels"][:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED
    )
    weights = torch.where(labels.flatten() == token, factor, 1.0) * (labels.flatten() != IGNORED)
    return (losses * weights).sum() / weights.sum()


def rows_for(plan: Plan, task: Small, world: World, seed: int) -> list[Row]:
    """The training rows, as the plan's faults leave them."""
    pairs = [(task.prompt(one), task.gold(one)) for one in task.examples("train")]
    random = Random(f"rows {seed}")
    for change in plan.pairs:
        pairs = change(pairs, random)
    tokenizer = world.tokenizer
    own = tokenizer.chat_template
    try:
        if plan.template is not None:
            tokenizer.chat_template = INST if "<|im_start|>" in (own or "") else CHATML
        encoder = RowEncoder(tokenizer)
        rows = [encoder.encode(prompt, answer) for prompt, answer in pairs]
    finally:
        tokenizer.chat_template = own
    for alter in plan.rows:
        rows = alter(rows, world)
    return rows


def attached(model: Any, plan: Plan, seed: int, tokenizer: Any, texts: Sequence[str]) -> Any:
    """The model with the plan's adapter."""
    from peft import get_peft_model

    settings = AdapterConfig(
        type=plan.type,  # type: ignore[arg-type]
        rank=plan.rank,
        alpha=plan.alpha,
        dropout=plan.dropout,
        target_modules=plan.targets,  # type: ignore[arg-type]
        init=InitConfig(name=plan.init, options=plan.init_options),
        type_options=plan.type_options,
    )
    config = peft_config(model, settings)
    if plan.peft_init is not None:
        config.init_lora_weights = plan.peft_init
        _own_options(config)
    torch.manual_seed(seed)
    made = get_peft_model(model, config)
    if plan.init != "zero_b":
        initialize(
            made, plan.init, seed=seed, tokenizer=tokenizer, texts=texts, **plan.init_options
        )
    for change in plan.on_model:
        change(made)
    return made


def _own_options(config: Any) -> None:
    """What PEFT makes of these names where nobody prepares them."""
    from peft import EvaConfig, LoraGAConfig

    if config.init_lora_weights == "eva":
        config.eva_config = EvaConfig()
    elif config.init_lora_weights == "lora_ga":
        config.lora_ga_config = LoraGAConfig()


def train(
    plan: Plan, task: Small, world: World, seed: int, folder: Path
) -> tuple[Any, list[Row], dict[str, Any]]:
    """The trained model, its rows, and what was seen: the log of every step, and the guard's."""
    model, tokenizer = world.open(plan.dtype, plan.quantization)
    for change in plan.on_base:
        change(model)
    rows = rows_for(plan, task, world, seed)
    encoder = RowEncoder(tokenizer)
    golds = [encoder.encode(task.prompt(one), task.gold(one)) for one in task.examples("test")]
    texts = [tokenizer.decode(row.input_ids, skip_special_tokens=True) for row in rows[:64]]
    model = attached(model, plan, seed, tokenizer, texts)
    told: list[str] = []
    guard = GuardCallback(
        world.prompts, "warn", tokenizer=tokenizer, folder=folder, tell=told.append
    )
    with quiet():
        trainer = Trainer(
            model=model,
            args=SFTConfig(
                output_dir=str(folder / "trainer"),
                max_steps=plan.steps,
                per_device_train_batch_size=plan.batch_size,
                per_device_eval_batch_size=16,
                learning_rate=plan.lr,
                lr_scheduler_type=plan.schedule,
                warmup_steps=round(plan.warmup * plan.steps),
                logging_steps=1,
                eval_strategy="steps",
                eval_steps=max(_EVERY, plan.steps // _EVALUATIONS),
                eval_on_start=True,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                bf16=False,
                seed=seed,
                max_length=None,
                remove_unused_columns=False,
                gradient_checkpointing=False,
                dataset_kwargs={"skip_prepare_dataset": True},
            ),
            train_dataset=Dataset.from_list([as_record(row) for row in rows]),
            eval_dataset=Dataset.from_list([as_record(row) for row in golds[: world.tested // 2]]),
            data_collator=lambda batch: pad([as_row(one) for one in batch], tokenizer.pad_token_id),
            processing_class=tokenizer,
            callbacks=[guard],
        )
        trainer.remove_callback(PrinterCallback)
        if plan.token_weight is not None:
            trainer.weight = (heavy_token(rows, tokenizer), plan.token_weight)
        trainer.poisoned = plan.poisoned
        for alter in plan.on_trainer:
            alter(trainer)
        logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
        trainer.train()
    model.eval()
    return model, rows, {
        "log": [dict(row) for row in trainer.state.log_history if "guard_findings" not in row],
        "readings": [one.to_json() for one in guard.readings],
        "findings": [one.to_json() for one in guard.findings],
        "guard_seconds": guard.seconds,
        "guard_share": guard.share,
    }  # fmt: skip


def heavy_token(rows: Sequence[Row], tokenizer: Any) -> int:
    """`return` where answers have it, else the commonest word of the answers."""
    learned = Counter(
        label
        for row in rows
        for label in row.labels
        if label not in (IGNORED, tokenizer.eos_token_id) and tokenizer.decode([label]).strip()
    )
    named = [token for token in learned if tokenizer.decode([token]).strip() == "return"]
    return named[0] if named else learned.most_common(1)[0][0]


def save(model: Any, plan: Plan, folder: Path) -> Path:
    """The adapter's directory, as the plan's faults leave it."""
    place = folder / "adapter"
    if base_changed(model):
        state_of(model).save(place)
    else:
        model.save_pretrained(place, save_embedding_layers=False)
    for change in plan.on_saved:
        change(place)
    return place
