"""Start from an adapter that is there, or from one taught by the model's own right answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, ClassVar

from pydantic import Field

from loralab.adapters.inits.base import Context, Facts, LoraInit
from loralab.adapters.inits.blind import ZeroB
from loralab.adapters.inits.scene import Scene
from loralab.adapters.inits.warm import resized
from loralab.adapters.state import AdapterState
from loralab.config import GenerationConfig, TrainingConfig
from loralab.engines.base import Completion
from loralab.engines.batched import BatchedEngine
from loralab.errors import UserError
from loralab.gradient.rejection import judged_by, scoring
from loralab.gradient.rows import prepare
from loralab.gradient.sft import train
from loralab.models.load import load
from loralab.rollouts import Batch, Rollout
from loralab.tasks import get

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class WarmStart:
    """A start that knows something already.

    path: a directory in PEFT's format. Another rank is made by SVD (a lower one) or by new rows
        of A with zero columns of B (a higher one); modules it does not have start at zero. Figure:
        `energy`, the mean share of ||BA||_F^2 kept.
    task, task_options: without `path`: `samples` completions of each of the first `examples`
        training examples are drawn from `teacher` (a model name; None: the base itself) at
        `temperature`; those that score `min_reward` or more (None: that are correct) and came to an
        end are kept, each text once an example, and learned by SFT in `steps` steps of `batch_size`
        rows. Figures: `kept`, `sampled`, `cut` (scored, but ended at `max_new_tokens`), `solved`
        (examples with an answer kept) and the first and last loss.
    """

    facts: ClassVar = Facts(
        formula="s·BA = that of a trained adapter, cut to rank r by SVD; or SFT on sampled answers "
        "that score",
        source="rejection sampling: STaR, arXiv:2203.14465; RFT, arXiv:2308.01825",
        unchanged="no: it has learned",
        cost="from disk: a small SVD; by sampling: examples × samples completions and an SFT",
        needs="an adapter, or a task (and, by sampling, a tokenizer)",
        needs_plain=True,
    )
    path: str | None = None
    task: str | None = None
    task_options: Mapping[str, Any] = field(default_factory=dict)
    teacher: str | None = None
    examples: Count = 64
    samples: Count = 4
    min_reward: float | None = None
    temperature: Positive = 1.0
    max_new_tokens: Count = 128
    steps: Count = 30
    batch_size: Count = 8
    lr: Positive = 2e-4
    max_length: Count = 1024

    def __post_init__(self) -> None:
        if (self.path is None) == (self.task is None):
            raise UserError("warm_start: expected either options.path (an adapter) or options.task")

    def apply(self, scene: Scene) -> Mapping[str, float]:
        if self.path is not None:
            return _from_disk(scene, Path(self.path))
        return self._by_rejection(scene)

    def _by_rejection(self, scene: Scene) -> Mapping[str, float]:
        if scene.tokenizer is None:
            raise UserError("warm_start by sampling needs the model's tokenizer: tokenizer=...")
        judged = self._sampled(scene)
        kept, cut = scoring(judged, self.min_reward)
        if not kept:
            raise UserError(
                f"warm_start: none of {len(judged)} sampled completions scored on {self.task} and "
                f"came to an end ({cut} scored without one): sample more (options.samples), lower "
                "options.min_reward, raise options.max_new_tokens, or use a better teacher"
            )
        pairs = [(r.prompt, r.text, f"{self.task} {r.example.id}") for r in kept]
        rows = prepare(pairs, scene.tokenizer, self.max_length).rows
        _start_at_zero(scene)
        settings = TrainingConfig(
            steps=self.steps, batch_size=self.batch_size, lr=self.lr, max_length=self.max_length
        )
        history = train(scene.model, scene.tokenizer, rows, settings, scene.seed)
        return {
            "sampled": float(len(judged)),
            "kept": float(len(kept)),
            "cut": float(cut),
            "solved": float(len({r.example.id for r in kept})),
            "first_loss": history.losses[0],
            "last_loss": history.losses[-1],
        }

    def _sampled(self, scene: Scene) -> list[tuple[Rollout, Completion]]:
        assert self.task is not None
        task = get(self.task, **self.task_options)
        examples = tuple(task.examples("train")[: self.examples])
        base = scene.model.get_base_model()
        name = self.teacher or base.config._name_or_path
        # A copy without PEFT's layers in it: the native engine wants plain linear modules.
        dtype = str(next(base.parameters()).dtype).removeprefix("torch.")
        model, tokenizer = load(name, dtype if dtype == "float32" else "bfloat16", "auto")
        engine = BatchedEngine(model, tokenizer)
        settings = GenerationConfig(
            max_new_tokens=self.max_new_tokens, temperature=self.temperature
        )
        batches = [
            Batch(task, "train", examples, settings, f"{scene.seed}|{sample}")
            for sample in range(self.samples)
        ]
        requests = [request for batch in batches for request in batch.requests(None)]
        answers = engine.generate(requests)
        return judged_by(batches, answers)


def _from_disk(scene: Scene, directory: Path) -> Mapping[str, float]:
    try:
        state = AdapterState.load(directory)
    except UserError as error:
        raise UserError(f"warm_start: {error}") from error
    known = {site.name: site for site in scene.sites}
    if lost := sorted(set(state.factors) - set(known)):
        raise UserError(
            f"warm_start: {directory} has factors for {lost[0]}, which this adapter does not "
            "target; add it to target_modules"
        )
    for name, factors in state.factors.items():
        given = (factors.B.shape[0], factors.A.shape[1])
        needed = (known[name].B.shape[0], known[name].A.shape[1])
        if given != needed:
            raise UserError(f"warm_start: {name} is {needed} here, {given} in {directory}")
    _start_at_zero(scene)
    energies = []
    for name, factors in state.factors.items():
        site = known[name]
        made, energy = resized(
            factors, state.scaling, site.rank, site.scaling, scene.generator(name)
        )
        site.set(made.A, made.B)
        energies.append(energy)
    return {"energy": fmean(energies), "modules_at_zero": float(len(known) - len(state.factors))}


def _start_at_zero(scene: Scene) -> None:
    for site in scene.sites:
        init: LoraInit = ZeroB()(
            site.weight(), site.rank, scene.generator(site.name), Context(site, scene)
        )
        site.set(init.A, init.B)
