"""One run from its plan to its record: train or search, save, put to use, measure, examine.

The record holds what was seen, not what it means: `judgement` says that, and can say it again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from loralab.bench.faults.plan import Plan
from loralab.bench.faults.tasks import Small
from loralab.bench.faults.world import World
from loralab.health.findings import plain_numbers
from loralab.health.prompts import Prompt, task_prompts
from loralab.health.text import LONG_RUN, LOOPING, longest_run, repetition
from loralab.tasks.base import Example, Score, Split

TOKENS = 40
"""Of an answer that is scored."""
_EXAMINED = 16
"""Examples that the evaluation's canaries ask; its baseline is of all that are tested."""


def run_trial(plan: Plan, task: Small, world: World, seed: int) -> dict[str, Any]:
    """Everything measured of one run, as plain data."""
    from loralab.bench.faults import training
    from loralab.bench.faults.search import search

    began = time.perf_counter()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        for hold in plan.around:
            stack.enter_context(hold())
        rows: list[Any] = []
        if plan.search is not None:
            seen = search(plan, task, world, seed, folder)
            model, adapter = None, folder / "run" / "adapter"
        else:
            model, rows, seen = training.train(plan, task, world, seed, folder)
            adapter = training.save(model, plan, folder)
        trained = time.perf_counter()
        used, tokenizer = _in_use(plan, world, model, adapter)
        seen["used"] = measured(used, tokenizer, task, world)
        seen["base"] = _base_measured(plan, task, world, seed)
        if plan.evaluated:
            seen["evaluation"] = _evaluated(plan, task, world, used, tokenizer, seen)
        seen["doctor"] = _examined(plan, task, world, model, adapter, rows)
    ended = time.perf_counter()
    return {
        **seen,
        "steps": plan.steps if plan.search is None else plan.search["generations"],
        "seconds": ended - began,
        "train_seconds": trained - began,
    }


def measured(model: Any, tokenizer: Any, task: Small, world: World) -> dict[str, Any]:
    """score: share of right answers on the task's test examples; right: one by one. perplexity:
    nats a token on held-out stories. repetition: share of answers that loop."""
    from loralab.gradient.ablation import mean_loss

    answers = _answers(model, tokenizer, task_prompts(task, "test"))
    examples = task.examples("test")
    right = [
        bool(task.score(example, made.text).correct)
        for example, made in zip(examples, answers, strict=False)
    ]
    loops = [
        repetition(made.token_ids) > LOOPING or longest_run(made.token_ids) > LONG_RUN
        for made in answers
    ]
    import torch

    with torch.no_grad():
        nats = mean_loss(model, world.prose)
    return {
        "score": fmean(right),
        "right": right,
        "repetition": fmean(loops),
        **plain_numbers({"perplexity": nats}),
        "texts": [made.text for made in answers[:4]],
    }


def _base_measured(plan: Plan, task: Small, world: World, seed: int) -> dict[str, Any]:
    """`measured` of the base; once for the runs that share it."""
    key = (task.kind, task.sign, seed, plan.dtype, plan.quantization)
    if key not in world.known:
        world.known[key] = measured(*world.open(plan.dtype, plan.quantization), task, world)
    found: dict[str, Any] = world.known[key]
    return found


def _answers(model: Any, tokenizer: Any, prompts: Sequence[Prompt]) -> Sequence[Any]:
    from loralab.health.look import Subject

    subject = Subject(model, tokenizer, prompts=prompts, max_new_tokens=TOKENS)
    return subject.complete(base=False)


def _in_use(plan: Plan, world: World, model: Any, adapter: Path) -> tuple[Any, Any]:
    """The model as it will be used: the saved adapter on a fresh base, or merged into it."""
    from peft import PeftModel

    if plan.merged and model is not None:
        import copy

        return copy.deepcopy(model).merge_and_unload(), world.tokenizer
    base, tokenizer = world.open(plan.dtype, plan.quantization)
    for change in plan.on_base:
        change(base)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # missing keys: what is examined here
        return PeftModel.from_pretrained(base, str(adapter)).eval(), tokenizer


class Evaluation:
    """A task as somebody's evaluation reads it."""

    def __init__(self, task: Small, plan: Plan) -> None:
        self._task, self._plan = task, plan
        self.name, self.reward_floor = task.name, task.reward_floor
        self.gold, self.answer_options = task.gold, task.answer_options

    def examples(self, split: Split) -> Sequence[Example]:
        return self._task.examples(split)

    def prompt(self, example: Example) -> Any:
        own = self._plan.prompt
        return self._task.prompt(example) if own is None else own(self._task, example)

    def score(self, example: Example, completion: str) -> Score:
        own = self._plan.score
        return (
            self._task.score(example, completion)
            if own is None
            else own(self._task, example, completion)
        )


def _evaluated(
    plan: Plan, task: Small, world: World, used: Any, tokenizer: Any, seen: Mapping[str, Any]
) -> dict[str, float]:
    """What the evaluation reports of the gain over the base, and what the gain is. seen: the
    task's own `measured` of both."""
    theirs = Evaluation(task, plan)
    base, _ = world.open(plan.dtype, plan.quantization)

    def share(model: Any) -> float:
        answers = _answers(model, tokenizer, task_prompts(theirs, "test"))
        pairs = zip(task.examples("test"), answers, strict=False)
        return fmean(
            float(bool(theirs.score(example, made.text).correct)) for example, made in pairs
        )

    told, told_base = share(used), share(base)
    return {
        "real": seen["used"]["score"] - seen["base"]["score"],
        "reported": told - (told_base + plan.baseline_off),
        "real_score": seen["used"]["score"],
        "reported_score": told,
    }


def _examined(
    plan: Plan, task: Small, world: World, model: Any, adapter: Path, rows: Sequence[Any]
) -> dict[str, Any]:
    """What the doctor says of what was saved, or of the model in memory where that is used."""
    from loralab.examine import doctor
    from loralab.health.canaries import CanaryProbe, mean_reward
    from loralab.health.look import Subject, measure
    from loralab.health.rules import judge

    base, tokenizer = world.open(plan.dtype, plan.quantization)
    for change in plan.on_base:
        change(base)
    target: Any = model if plan.merged else adapter
    report = doctor(
        target,
        base=None if plan.merged else base,
        tokenizer=tokenizer,
        prompts=world.prompts,
        data=[_record(row) for row in rows] or None,
    )
    found = [one.to_json() for one in report.findings]
    readings = [one.to_json() for one in report.readings]
    if plan.evaluated:
        theirs = Evaluation(task, plan)
        examples = task.examples("test")
        texts = [made.text for made in _answers(base, tokenizer, task_prompts(theirs, "test"))]
        canaries = CanaryProbe(
            theirs,
            limit=_EXAMINED,
            baseline=mean_reward(theirs, theirs.score, examples, texts) + plan.baseline_off,
            baseline_examples=len(examples),
            max_new_tokens=TOKENS,
        )
        second = Subject(_with_nothing(base), tokenizer, prompts=task_prompts(task, "test", 8))
        reading = measure(second.look(), [canaries], 0)
        readings.append(reading.to_json())
        found += [one.to_json() for one in judge([reading])]
    return {"findings": found, "readings": readings, "seconds": report.seconds}


def _with_nothing(base: Any) -> Any:
    """The base with an adapter that does nothing: what canaries ask for is the base of one."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(base, LoraConfig(r=1, target_modules="all-linear"))


def _record(row: Any) -> Mapping[str, Any]:
    return {"input_ids": list(row.input_ids), "labels": list(row.labels)}
