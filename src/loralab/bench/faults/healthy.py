"""Healthy runs: what a fault's run is set beside, and controls that look like trouble."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from loralab.bench.faults.faults import OUTLIER
from loralab.bench.faults.plan import Change, Control, Plan


def _as_is(_: Plan) -> None:
    """The defaults."""


def _put(plan: Plan, **values: Any) -> None:
    for name, value in values.items():
        setattr(plan, name, value)


def _lslora(plan: Plan) -> None:
    plan.type = "lslora"


def _sine(plan: Plan) -> None:
    # At the small rates of a sine of 200 B A, half a step turns it round.
    plan.type, plan.lr = "sinelora", plan.lr / 5
    plan.type_options = {"sinelora_frequency": 50.0}


def _sine_merged(plan: Plan) -> None:
    _sine(plan)
    plan.merged = True


def _evaluated(plan: Plan, task: str | None = None) -> None:
    plan.evaluated, plan.task = True, task
    plan.steps = plan.steps // 2


def _long(plan: Plan) -> None:
    plan.steps *= 4


def _search(plan: Plan) -> None:
    plan.search = {
        "generations": 30,
        "population": 32,
        "optimizer": {"name": "sgd", "lr": 1.5},
        "scale": {"granularity": "module", "fraction": 0.3},
        "samples_per_generation": 8,
        "test_samples": 8,
        "eval_every": 4,
    }
    plan.rank, plan.alpha = 2, 4.0
    # A sign near one that the base knows: surer of its form, its members would all answer alike.
    plan.task, plan.sign = "word", " Be Be."


def _search_outlier(plan: Plan) -> None:
    """The base with one layer's o_proj OUTLIER times as large and its v_proj as much smaller: the
    same function."""
    _search(plan)

    def stretch(model: Any) -> None:
        layer = model.model.layers[0].self_attn
        layer.o_proj.weight.data.mul_(OUTLIER)
        layer.v_proj.weight.data.div_(OUTLIER)

    plan.on_base.append(stretch)


SETUPS: Mapping[str, Change] = {
    "lora": _as_is,
    "lslora": _lslora,
    "sine-merged": _sine_merged,
    "long": _long,
    "evaluated": _evaluated,
    "evaluated-sum": partial(_evaluated, task="sum"),
    "evaluated-word": partial(_evaluated, task="word"),
    "search": _search,
    "search-outlier": _search_outlier,
}
"""What the healthy run beside a fault's does; healthy runs themselves."""


def _tiny(plan: Plan) -> None:
    plan.init = "tiny"


def _style(plan: Plan) -> None:
    plan.task = "style"


CONTROLS: tuple[Control, ...] = (
    Control("zero-b", "B = 0, PEFT's own start", _as_is),
    Control("orthogonal-bf16", "orthogonal pairs on a bf16 base",
            partial(_put, init="orthogonal", dtype="bfloat16")),
    Control("tiny", "small non-zero factors", _tiny),
    Control("pissa", "PiSSA with its residual", partial(_put, init="pissa")),
    Control("olora", "OLoRA with its residual", partial(_put, init="olora")),
    Control("eva", "EVA, prepared", partial(_put, init="eva")),
    Control("rank-1", "rank 1", partial(_put, rank=1, alpha=2.0)),
    Control("rank-64", "rank 64", partial(_put, rank=64, alpha=128.0, lr=5e-4)),
    Control("qlora", "an nf4 base", partial(_put, quantization="nf4", dtype="bfloat16")),
    Control("sinelora", "SineLoRA", _sine),
    Control("lslora", "LS-LoRA", _lslora),
    Control("search", "evolution with noise of the right size", _search),
    Control("plateau", "half of the run is warm-up", partial(_put, warmup=0.5)),
    Control("dropout", "dropout 0.1", partial(_put, dropout=0.1)),
    Control("attention", "q, k, v, o alone",
            partial(_put, targets=("q_proj", "k_proj", "v_proj", "o_proj"))),
    Control("code", "answers are code", partial(_put, task="code")),
    Control("list", "answers are lists", partial(_put, task="list")),
    Control("json", "answers are JSON", partial(_put, task="json")),
    Control("one-word", "answers are one word", partial(_put, task="word")),
    Control("style", "a deliberate change of style: as a pirate says it", _style),
    Control("sums", "answers are sums, worked out", partial(_put, task="sum")),
)  # fmt: skip
"""At least the issue's; those that name a task do the same whatever task is asked for."""
