"""Group-relative policy optimisation of a model in memory (Shao et al. 2024, arXiv:2402.03300).

    A_i  = (R_i - mean R) / std R                    over the completions of one prompt
    loss = - sum w_t [min(q_t A_i, clip(q_t) A_i) - beta KL_t],   q_t = p(t) / p_old(t)
    KL_t = ref(t) / p(t) - log(ref(t) / p(t)) - 1    (arXiv: 2402.03300, eq. 4)

p_old is the model that sampled the tokens, ref the true base, w_t the weights of a mean over tokens
or over completions. Completions come from the batched engine with the adapter as it stands; a group
in which all rewards are equal teaches nothing, and without a KL term it is not even run.

TRL's GRPOTrainer is not used: its reference of a PEFT model is a disabled adapter, which is not the
base where an initialisation changed the weights under it, it pads, and it makes whole logits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, TrainingArguments

from loralab.config import TrainingConfig
from loralab.config.grpo import PolicyConfig
from loralab.errors import UserError
from loralab.gradient.dpo import (
    Layout,
    Reference,
    reference_of,
    run_batch,
    to_device,
    token_owners,
)
from loralab.gradient.forward import causal_of, forward_kept
from loralab.gradient.loop import History, Watched, arguments, fast_step, quiet
from loralab.gradient.rows import Row

COLUMNS = (
    "completions",
    "reward_mean",
    "reward_std",
    "correct",
    "flat_groups",
    "length",
    "clipped",
    "kl",
)
"""What a step logs beside the loss.

completions: sampled since the beginning. reward_mean, reward_std, correct, length (tokens): of the
completions that the step learns from. flat_groups: share of groups with equal rewards. clipped:
share of tokens whose ratio the clip holds back. kl: mean estimate over tokens, where beta is not 0.
"""

_EPSILON = 1e-4


@dataclass(frozen=True)
class Sampled:
    """One completion: its tokens with the prompt's before them, and what it earned."""

    row: Row
    reward: float
    correct: bool | None


Group = Sequence[Sampled]
"""Completions of one prompt."""

SampleGroups = Callable[[Any, int], Sequence[Group]]
"""(model as it is now, number of the batch from 0) -> the groups of that batch's prompts.

At least one completion is in them; whoever samples says why there is none.
"""


def advantages(rewards: Sequence[float], scale: str) -> list[float]:
    """How much better each completion is than its group, in standard deviations or as it is."""
    mean, spread = fmean(rewards), pstdev(rewards)
    by = spread + _EPSILON if scale == "group" else 1.0
    return [(reward - mean) / by for reward in rewards]


def train_policy(
    model: Any,
    tokenizer: Any,
    sample: SampleGroups,
    settings: TrainingConfig,
    policy: PolicyConfig,
    seed: int,
    callbacks: Sequence[Any] = (),
    output_dir: Path | None = None,
    *,
    resume_from: Path | None = None,
    autocast: bool = False,
) -> History:
    """Train what is trainable in a model on what it samples, in place.

    The arguments are as `sft.train`'s. A run that is resumed between two updates on one batch
    samples that batch anew.

    Raises:
        NonFiniteError: a loss or gradient is not finite.
        UserError: several processes, or an optimizer that is not there.
    """
    causal = causal_of(model)
    layout = Layout.of(causal, tokenizer, settings)
    notes = layout.notes
    one = settings.model_copy(update={"batch_size": 1})
    with ExitStack() as stack:
        folder = output_dir or Path(stack.enter_context(TemporaryDirectory()))
        stack.enter_context(forward_kept(model, causal))
        stack.enter_context(quiet())
        keep = output_dir is not None
        trainer = _Trainer(
            model=model,
            args=arguments(TrainingArguments, model, one, seed, folder, autocast, keep),
            data_collator=lambda steps: {"step": torch.tensor(steps)},
            train_dataset=range(settings.steps or 0),
            callbacks=list(callbacks),
        )
        if trainer.accelerator.num_processes > 1:
            raise UserError("kind: grpo trains in one process; run it without accelerate launch")
        trainer.policy, trainer.layout, trainer.sample = policy, layout, sample
        trainer.reference = reference_of(model, "base")
        trainer.per_batch = settings.batch_size * policy.group
        trainer.remove_callback(PrinterCallback)
        if settings.fast:
            notes += stack.enter_context(fast_step(model))
        stack.enter_context(layout.running(causal, policy.temperature))
        try:
            trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
        finally:
            model.eval()
    return History.of(trainer, notes)


@dataclass
class _Piece:
    """What one forward pass takes. weights: of each token. old: p_old, known after a first pass."""

    batch: dict[str, Any]
    advantages: Tensor
    weights: Tensor
    tokens: int
    old: Tensor | None = None
    reference: Tensor | None = None


class _Trainer(Watched):
    policy: PolicyConfig
    layout: Layout
    sample: SampleGroups
    reference: Reference
    pieces: Sequence[_Piece] | None = None
    per_batch: int
    told: dict[str, float]

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return SequentialSampler(self.train_dataset)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Counted where they are made: a batch from the loader is only its number."""

    def training_step(
        self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        model.train()
        step = int(inputs["step"])
        number, update = divmod(step, self.policy.updates)
        if update == 0 or self.pieces is None:
            self.pieces = self._collect(model, number)
        self.note(**self.told)
        total = torch.zeros((), device=self.args.device)
        sums: defaultdict[str, float] = defaultdict(float)
        for piece in self.pieces:
            with self.compute_loss_context_manager():
                value, told = self._loss(model, piece)
            for name, part in told.items():
                sums[name] += part
            self.accelerator.backward(value)
            total += value.detach()
            self.tokens_here += piece.tokens
            self.state.num_input_tokens_seen += piece.tokens
        if count := sums.pop("learned", 0.0):
            self.note(**{name: part / count for name, part in sums.items()})
        self._check("the loss", float(total))
        return total

    def _collect(self, model: Any, number: int) -> list[_Piece]:
        """Sample a batch, judge it group by group, and lay out what there is to learn from."""
        policy = self.policy
        groups = [group for group in self.sample(model, number) if group]
        every = [one for group in groups for one in group]
        flat = sum(len({one.reward for one in group}) == 1 for group in groups)
        judged = [one.correct for one in every if one.correct is not None]
        rewards = [one.reward for one in every]
        self.told = {
            "completions": (number + 1) * self.per_batch,
            "reward_mean": fmean(rewards),
            "reward_std": pstdev(rewards),
            "flat_groups": flat / len(groups),
            "length": fmean(one.row.learned for one in every),
            **({"correct": fmean(judged)} if judged else {}),
        }
        rows, gains, weights = list[Row](), list[float](), list[float]()
        tokens = sum(one.row.learned for one in every)
        for group in groups:
            for one, gain in zip(
                group, advantages([x.reward for x in group], policy.scale), strict=True
            ):
                if gain == 0 and policy.beta == 0:
                    continue
                rows.append(one.row)
                gains.append(gain)
                over = tokens if policy.mean == "token" else len(every) * one.row.learned
                weights.append(1 / over)
        size = policy.micro_batch or max(len(rows), 1)
        return [
            self._piece(rows[at : at + size], gains[at : at + size], weights[at : at + size])
            for at in range(0, len(rows), size)
        ]

    def _piece(self, rows: list[Row], gains: list[float], weights: list[float]) -> _Piece:
        batch = to_device(self.layout.batch(rows), self.args.device)
        owners = token_owners(batch)
        return _Piece(
            batch,
            torch.tensor(gains, device=owners.device)[owners],
            torch.tensor(weights, device=owners.device)[owners],
            sum(len(row.input_ids) for row in rows),
        )

    def _loss(self, model: Any, piece: _Piece) -> tuple[Tensor, dict[str, float]]:
        """A piece's share of the loss, and sums over its learned tokens."""
        policy = self.policy
        if policy.beta and piece.reference is None:
            with torch.no_grad(), self.reference():
                piece.reference = run_batch(model, piece.batch)
        now = run_batch(model, piece.batch)
        if piece.old is None:
            piece.old = now.detach()
        ratio = (now - piece.old).exp()
        high = policy.clip if policy.clip_high is None else policy.clip_high
        free = ratio * piece.advantages
        held = ratio.clamp(1 - policy.clip, 1 + high) * piece.advantages
        gain = torch.minimum(free, held)
        told = {"learned": float(len(now)), "clipped": float((held < free).sum())}
        if piece.reference is not None:
            away = piece.reference - now
            divergence = away.exp() - away - 1
            told["kl"] = float(divergence.detach().sum())
            gain = gain - policy.beta * divergence
        return -(piece.weights * gain).sum(), told
