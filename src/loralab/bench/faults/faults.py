"""The faults: each changes a healthy plan once; with the cause to be named and the harm to come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from loralab.bench.faults.plan import Fault, Pair, Plan
from loralab.tasks.base import Example, Message, Prompt, Score

if TYPE_CHECKING:
    from loralab.bench.faults.world import World
    from loralab.gradient.rows import Row

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
"""Two templates; a fault takes the one that the tokenizer does not have."""

OUTLIER = 30.0


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            yield name, module


def _splines(model: Any) -> Iterator[Any]:
    for _, layer in _layers(model):
        yield layer.lora_spline["default"]


# What is wrong at the start.


def random_tenfold(plan: Plan) -> None:
    plan.targets = ("q_proj", "v_proj")

    def fill(model: Any) -> None:
        for _, layer in _layers(model):
            for factor in (layer.lora_A["default"], layer.lora_B["default"]):
                factor.reset_parameters()
                factor.weight.data.mul_(10)

    plan.on_model.append(fill)


def both_random(plan: Plan) -> None:
    plan.peft_init = False


def zero_factors(plan: Plan) -> None:
    def fill(model: Any) -> None:
        for _, layer in _layers(model):
            layer.lora_A["default"].weight.data.zero_()

    plan.on_model.append(fill)


def pissa_unsplit(plan: Plan) -> None:
    """The largest part of W as PiSSA takes it (arXiv:2404.02948), but W keeps it."""

    def fill(model: Any) -> None:
        import torch

        for _, layer in _layers(model):
            u, s, v = torch.linalg.svd(layer.get_base_layer().weight.data.float(), False)
            rank, root = layer.r["default"], (s / layer.scaling["default"]).sqrt()
            layer.lora_B["default"].weight.data.copy_(u[:, :rank] * root[:rank])
            layer.lora_A["default"].weight.data.copy_(root[:rank, None] * v[:rank])

    plan.on_model.append(fill)


def unprepared(name: str, plan: Plan) -> None:
    plan.peft_init = name


def scaled(by: float, plan: Plan) -> None:
    def scale(model: Any) -> None:
        for _, layer in _layers(model):
            layer.scaling["default"] *= by

    plan.on_model.append(scale)


def scaled_after(by: float, plan: Plan) -> None:
    def scale(folder: Path) -> None:
        import json

        path = folder / "adapter_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["lora_alpha"] *= by
        path.write_text(json.dumps(config), encoding="utf-8")

    plan.on_saved.append(scale)


# Splines.


def bent_splines(plan: Plan) -> None:
    def bend(model: Any) -> None:
        import torch

        draw = torch.Generator().manual_seed(0)
        for spline in _splines(model):
            spline.values.data += torch.randn(spline.values.shape, generator=draw)

    plan.on_model.append(bend)


def spline_option(options: Mapping[str, Any], plan: Plan) -> None:
    plan.type_options |= options


# Numbers and the optimiser.


def left_out(plan: Plan) -> None:
    """The optimiser was made before the adapter was there."""

    def other(trainer: Any) -> None:
        import torch

        base = [one for one in trainer.model.parameters() if not one.requires_grad]
        trainer.optimizer = torch.optim.AdamW(base, lr=plan.lr)

    plan.on_trainer.append(other)


def learning_rate(times: float, plan: Plan) -> None:
    plan.lr *= times


def nan_step(plan: Plan) -> None:
    plan.poisoned = max(2, plan.steps // 4)


def over_weighted(plan: Plan) -> None:
    plan.token_weight = 50.0


# Rows.


def newlines(plan: Plan) -> None:
    def blank(pairs: list[Pair], random: Random) -> list[Pair]:
        gone = set(random.sample(range(len(pairs)), int(0.7 * len(pairs))))
        return [
            (p, "\n" * random.randint(8, 24) if i in gone else a) for i, (p, a) in enumerate(pairs)
        ]

    plan.pairs.append(blank)


def end_masked(plan: Plan) -> None:
    def mask(rows: list[Row], world: World) -> list[Row]:
        from loralab.gradient.rows import IGNORED, Row

        end = world.tokenizer.eos_token_id
        return [Row(r.input_ids, tuple(IGNORED if t == end else t for t in r.labels)) for r in rows]

    plan.rows.append(mask)


def all_masked(plan: Plan) -> None:
    def mask(rows: list[Row], _: World) -> list[Row]:
        from loralab.gradient.rows import IGNORED, Row

        return [Row(r.input_ids, (IGNORED,) * len(r.labels)) for r in rows]

    plan.rows.append(mask)


def shuffled(plan: Plan) -> None:
    def swap(pairs: list[Pair], random: Random) -> list[Pair]:
        answers = [answer for _, answer in pairs]
        random.shuffle(answers)
        return [(prompt, answer) for (prompt, _), answer in zip(pairs, answers, strict=True)]

    plan.pairs.append(swap)


def few(plan: Plan) -> None:
    plan.pairs.append(lambda pairs, _: pairs[:64])
    plan.lr *= 2


def other_template(plan: Plan) -> None:
    plan.template = CHATML


# What is saved and merged.


def keys_dropped(plan: Plan) -> None:
    def drop(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        kept = {n: t for n, t in tensors.items() if "lora_spline" not in n and "v_proj" not in n}
        save_file(kept, path, metadata={"format": "pt"})

    plan.on_saved.append(drop)


def merged_as_lora(plan: Plan) -> None:
    """The merge forgets the sine."""

    @contextmanager
    def forgetful() -> Iterator[None]:
        from loralab.adapters.nonlinear import product
        from loralab.adapters.sine import SineVariant

        def shifted(_: Any, layer: Any, adapter: str, weight: Any, sign: int) -> Any:
            change = product(layer, adapter) * layer.scaling[adapter]
            return (weight + sign * change).detach().to(weight.dtype)

        with patch.object(SineVariant, "_shifted", shifted):
            yield

    plan.around.append(forgetful)


# Evaluation and reward. Each is an evaluation as somebody wrote it, beside the task's own.


def reads_context(plan: Plan) -> None:
    def ask(_: Any, example: Example) -> Prompt:
        return [Message(role="user", content=str(example.data.get("context", "")))]

    plan.prompt = ask


def first_match(plan: Plan) -> None:
    import re

    def score(task: Any, example: Example, completion: str) -> Score:
        found = re.search(r"-?\d+", completion)
        right = found is not None and found[0] == task.gold(example).split()[-1]
        return Score(float(right), right)

    plan.score = score


def off_baseline(plan: Plan) -> None:
    plan.baseline_off = -0.3


def exploitable(plan: Plan) -> None:
    """Words of the right kind, however many, count as the answer."""

    def score(task: Any, example: Example, completion: str) -> Score:
        right = task.gold(example) in completion
        return Score(float(right), right)

    plan.score = score


# Evolution.


def weak_noise(plan: Plan) -> None:
    assert plan.search is not None
    plan.search["scale"]["fraction"] /= 20


def outlier_sets_sigma(plan: Plan) -> None:
    assert plan.search is not None
    plan.search["scale"]["granularity"] = "layer"


def short_answers_pay(plan: Plan) -> None:
    """A reward for being short alone."""

    def score(task: Any, example: Example, completion: str) -> Score:
        return Score(-len(completion) / 100, task.score(example, completion).correct)

    plan.score = score


def _with(change: Callable[..., None], *arguments: Any) -> Callable[[Plan], None]:
    return partial(change, *arguments)


FAULTS: tuple[Fault, ...] = (
    Fault("random-x10-qv", "start", ("init.garbled",), "perplexity",
          "both factors random, ten times, on q and v", random_tenfold),
    Fault("init-false", "start", ("init.garbled",), "perplexity",
          "init_lora_weights=False", both_random),
    Fault("zero-factors", "start", ("init.zero_factors",), "score",
          "both factors zero", zero_factors),
    Fault("pissa-unsplit", "start", ("init.residual_missing",), "perplexity",
          "PiSSA without the residual", pissa_unsplit),
    Fault("eva-unprepared", "start", ("init.unprepared",), "score",
          "EVA without its preparation", _with(unprepared, "eva")),
    Fault("lora-ga-unprepared", "start", ("init.unprepared",), "score",
          "LoRA-GA without its preparation", _with(unprepared, "lora_ga")),
    Fault("scaling-doubled", "scale", ("scale.wrong",), "score",
          "scaling twice alpha / r", _with(scaled, 2.0)),
    Fault("scaling-x16", "scale", ("scale.wrong",), "score",
          "scaling 16 alpha / r", _with(scaled, 16.0)),
    Fault("alpha-changed", "scale", ("scale.wrong",), "score",
          "alpha 8 times as large in the saved config", _with(scaled_after, 8.0)),
    Fault("left-out", "optimiser", ("optimiser.adapter_left_out",), "score",
          "the adapter is not in the optimiser", left_out),
    Fault("spline-bent", "spline", ("spline.not_identity",), "perplexity",
          "splines that do not start at the identity", bent_splines, "lslora"),
    Fault("spline-narrow", "spline", ("spline.grid_too_narrow",), "score",
          "grid fixed at [-1, 1], clamped",
          _with(spline_option, {"k_min": -1.0, "k_max": 1.0, "boundary": "clamp"}), "lslora"),
    Fault("spline-tanh", "spline", ("spline.tanh",), "score",
          "tanh squash", _with(spline_option, {"normalize": "tanh"}), "lslora"),
    Fault("spline-output", "spline", ("spline.output_scale",), "score",
          "output scale 0.1", _with(spline_option, {"output_scale_init": 0.1}), "lslora"),
    Fault("spline-soft", "spline", ("spline.soft",), "score",
          "softmax interpolation", _with(spline_option, {"interpolation_method": "soft"}),
          "lslora"),
    Fault("spline-penalty", "spline", ("spline.penalty_off",), "score",
          "regulariser / 100", _with(spline_option, {"spline_reg_weight": 1e-4}), "lslora"),
    Fault("lr-x100", "optimiser", ("lr.too_high",), "perplexity",
          "learning rate x 100", _with(learning_rate, 100.0)),
    Fault("lr-d100", "optimiser", ("lr.too_low",), "score",
          "learning rate / 100", _with(learning_rate, 0.01)),
    Fault("nan-step", "optimiser", ("numbers.nan",), "perplexity",
          "one step's loss is NaN", nan_step),
    Fault("newlines-70", "data", ("data.newlines",), "score",
          "70 % of the targets are newlines", newlines),
    Fault("return-x50", "data", ("data.overweighted_token",), "score",
          "one token counts 50 times (`return` in code)", over_weighted),
    Fault("eos-masked", "data", ("data.eos_masked",), "score",
          "the end token is masked", end_masked),
    Fault("all-masked", "data", ("data.all_masked",), "score",
          "all labels -100", all_masked),
    Fault("shuffled", "data", ("data.shuffled",), "score",
          "responses shuffled", shuffled),
    Fault("few-64", "data", ("data.too_few",), "perplexity",
          "64 samples for many epochs", few, "long"),
    Fault("template", "data", ("template.wrong",), "score",
          "another chat template", other_template),
    Fault("sine-merge", "save", ("merge.unequal",), "score",
          "sine in the forward, plain B A in the merge", merged_as_lora, "sine-merged"),
    Fault("keys-dropped", "save", ("save.keys_dropped",), "score",
          "the saved file lacks v_proj", keys_dropped),
    Fault("keys-dropped-spline", "save", ("save.keys_dropped",), "score",
          "the saved file lacks splines and v_proj", keys_dropped, "lslora"),
    Fault("reads-context", "evaluation", ("evaluation.reads_context",), "score",
          "the evaluation asks `context`, which is empty", reads_context, "evaluated"),
    Fault("first-match", "evaluation", ("evaluation.first_match",), "score",
          "the first number is taken for the answer", first_match, "evaluated-sum"),
    Fault("baseline", "evaluation", ("evaluation.baseline",), "score",
          "the base's score from elsewhere, 0.3 lower", off_baseline, "evaluated"),
    Fault("exploitable", "evaluation", ("reward.exploitable",), "score",
          "the answer may stand among all options", exploitable, "evaluated-word"),
    Fault("short-pays", "search", ("reward.exploitable",), "score",
          "evolution with a reward for being short alone", short_answers_pay, "search"),
    Fault("noise-d20", "search", ("es.noise_too_weak",), "score",
          "ES noise / 20", weak_noise, "search"),
    Fault("outlier-sigma", "search", ("es.outlier_sigma",), "score",
          "an o_proj outlier sets its layer's sigma", outlier_sets_sigma, "search-outlier"),
)  # fmt: skip
"""In the issue's order, with its 31 among them."""
