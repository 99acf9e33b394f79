"""What a config asks for, told without loading a model: what `--dry-run` prints."""

from __future__ import annotations

from loralab import tasks
from loralab.config import (
    AblationConfig,
    AnyConfig,
    ClassifyConfig,
    DistillConfig,
    DpoConfig,
    EvalConfig,
    EvolveConfig,
    GrpoConfig,
    PipelineConfig,
    PretrainConfig,
    Seq2SeqConfig,
    SftConfig,
    TrainingConfig,
    VerifierConfig,
)
from loralab.config.references import references
from loralab.errors import UserError


def plan(config: AnyConfig) -> list[str]:
    """Sizes of the run, one a line.

    Raises:
        UserError: the task or one of its options is wrong.
    """
    match config:
        case EvolveConfig():
            return _plan_evolution(config)
        case SftConfig():
            return _plan_training(config)
        case PretrainConfig():
            return _plan_pretraining(config)
        case DpoConfig():
            return _plan_preferences(config)
        case GrpoConfig():
            return _plan_policy(config)
        case VerifierConfig():
            return _plan_verifier(config)
        case ClassifyConfig() | Seq2SeqConfig():
            return _plan_task(config)
        case DistillConfig():
            return _plan_distillation(config)
        case EvalConfig():
            return [
                f"{len(config.models)} models: {', '.join(config.models)}",
                f"{len(config.measures)} measures: {', '.join(config.measures)}",
            ]
        case PipelineConfig():
            return [line for name in config.stages for line in _plan_stage(config, name)]
        case AblationConfig():
            first = config.config_of(config.variants[0].name, 0)
            count = len(config.variants) * len(config.seeds)
            names = ", ".join(variant.name for variant in config.variants)
            return [f"{count} runs: {names}, {len(config.seeds)} seeds", *_plan_training(first)]


def _plan_stage(config: PipelineConfig, name: str) -> list[str]:
    """A stage's own plan, but for rows that an earlier stage has yet to write."""
    stage = config.parsed()[name]
    read = references(stage.to_dict(), f"stage {name}")
    title = f"stage {name}: {stage.kind}" + f", reads {', '.join(map(str, read))}" * bool(read)
    if any(reference.output == "data" for reference in read):
        return [title]
    try:
        return [title, *(f"  {line}" for line in plan(stage))]
    except UserError as error:
        raise UserError(f"stage {name}: {error}") from error


def _plan_evolution(config: EvolveConfig) -> list[str]:
    task = tasks.get(config.task.name, **config.task.options)
    train, test = len(task.examples("train")), len(task.examples("test"))
    evolution = config.evolution
    prompts = min(evolution.samples_per_generation or train, train)
    held_out = min(evolution.test_samples or test, test)
    completions = evolution.generations * evolution.population * prompts
    return [
        f"task {task.name}: {train} training and {test} test examples",
        f"{evolution.generations} generations x {evolution.population} members x {prompts} prompts "
        f"= {completions:,} completions of up to {config.generation.max_new_tokens} tokens",
        f"held-out score on {held_out} examples every {evolution.eval_every} generations",
    ]


def _plan_training(config: SftConfig) -> list[str]:
    from loralab.tasks.supervised import task_of

    task, training, evaluation = task_of(config), config.training, config.evaluation
    train, test = len(task.examples("train")), len(task.examples("test"))
    held_out = len(task.examples(evaluation.split)[: evaluation.limit])
    between = "" if evaluation.every is None else f", and every {evaluation.every} steps"
    return [
        f"task {task.name}: {train} training and {test} test examples",
        _length(training),
        f"{held_out} {evaluation.split} examples answered before and after{between}, up to "
        f"{config.generation.max_new_tokens} tokens each",
    ]


def _plan_pretraining(config: PretrainConfig) -> list[str]:
    training, evaluation = config.training, config.evaluation
    rows = training.batch_size * training.grad_accumulation
    length = f"{training.epochs:g} passes" if training.steps is None else f"{training.steps} steps"
    every = "" if evaluation.every is None else f" and every {evaluation.every} steps"
    return [
        f"{length} of {rows} rows, up to {training.max_length} tokens a row",
        f"corpus: {', '.join(source.path for source in config.corpus)}",
        f"held-out loss and {len(evaluation.prompts)} texts before, after{every}",
    ]


def _plan_preferences(config: DpoConfig) -> list[str]:
    from loralab.gradient.preferences import Preferences

    data, evaluation = Preferences(config.data, config.seed), config.evaluation
    train, test = data.pairs("train"), data.pairs("test")
    held_out = len(data.pairs(evaluation.split).pairs[: evaluation.limit])
    left_out = ", ".join(f"{count} {why}" for why, count in train.dropped.items()) or "none"
    return [
        f"{len(train.pairs)} training and {len(test.pairs)} test pairs; left out of training: "
        f"{left_out}",
        _length(config.training),
        f"margin of {held_out} {evaluation.split} pairs before and after, "
        f"{config.dpo.texts} prompts answered",
    ]


def _plan_policy(config: GrpoConfig) -> list[str]:
    task = tasks.get(config.task.name, **config.task.options)
    train, test = len(task.examples("train")), len(task.examples("test"))
    training, policy, evaluation = config.training, config.grpo, config.evaluation
    batches = -(-(training.steps or 0) // policy.updates)
    completions = batches * training.batch_size * policy.group
    held_out = len(task.examples(evaluation.split)[: evaluation.limit])
    return [
        f"task {task.name}: {train} training and {test} test examples",
        f"{batches} batches of {training.batch_size} prompts x {policy.group} = {completions:,} "
        f"completions of up to {config.generation.max_new_tokens} tokens, {policy.updates} "
        f"update{'s' * (policy.updates > 1)} each",
        f"{held_out} {evaluation.split} examples answered before and after",
    ]


def _plan_verifier(config: VerifierConfig) -> list[str]:
    task = tasks.get(config.task.name, **config.task.options)
    sampled, evaluation = config.solutions, config.evaluation
    train = min(len(task.examples("train")), sampled.examples)
    held_out = len(task.examples(evaluation.split)[: evaluation.limit])
    return [
        f"task {task.name}: {train} training examples x {sampled.samples} solutions = "
        f"{train * sampled.samples:,} of up to {config.generation.max_new_tokens} tokens",
        _length(config.training),
        f"{held_out} {evaluation.split} examples x {config.verifier.candidates} candidates to pick "
        "from",
    ]


def _plan_task(config: ClassifyConfig | Seq2SeqConfig) -> list[str]:
    task, evaluation = tasks.get(config.task.name, **config.task.options), config.evaluation
    train, test = len(task.examples("train")), len(task.examples("test"))
    held_out = len(task.examples(evaluation.split)[: evaluation.limit])
    between = "" if evaluation.every is None else f", and every {evaluation.every} steps"
    return [
        f"task {task.name}: {train} training and {test} test examples",
        _length(config.training),
        f"{held_out} {evaluation.split} examples answered before and after{between}",
    ]


def _plan_distillation(config: DistillConfig) -> list[str]:
    task = tasks.get(config.task.name, **config.task.options)
    count = len(task.examples(config.split)[: config.examples])
    place = "" if config.endpoint is None else f" at {config.endpoint.url}"
    return [
        f"task {task.name}: {count} {config.split} examples x {config.samples} completions = "
        f"{count * config.samples:,} of up to {config.generation.max_new_tokens} tokens",
        f"teacher: {config.model}{place}",
    ]


def _length(training: TrainingConfig) -> str:
    rows = training.batch_size * training.grad_accumulation
    length = f"{training.epochs:g} epochs" if training.steps is None else f"{training.steps} steps"
    return f"{length} of {rows} rows each, up to {training.max_length} tokens a row"
