"""A model that says how likely a solution is right (Cobbe et al. 2021, arXiv:2110.14168).

    v_t = w . h_t + b,   p(right | prompt, solution up to t) = sigmoid(v_t)

h_t is the last hidden state at a token of the solution, w and b a head that starts at zero. The
loss is the binary cross-entropy of v_t with the solution's label, at each token ("token") or at the
last ("end"), a mean within each solution and then over solutions. A finished solution's value is
that of its last token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import PrinterCallback, TrainingArguments

from loralab.config import TrainingConfig
from loralab.config.verifier import HeadConfig
from loralab.errors import UserError
from loralab.gradient import attention, loss
from loralab.gradient.dpo import OWNERS, Layout, to_device
from loralab.gradient.forward import causal_of, forward_as, forward_kept
from loralab.gradient.loop import History, Watched, arguments, fast_step, quiet
from loralab.gradient.rows import IGNORED, Row
from loralab.tasks.metrics import Estimate, mean_of

COLUMNS = ("judged_right",)
"""What a step logs beside the loss: the share of solutions on the right side of a half."""

_HEAD = "value_head"
_TRAINED = "trained.safetensors"


@dataclass(frozen=True)
class Solution:
    """A solution's tokens behind its prompt's; `answer` is what it says, to vote by."""

    example: str
    row: Row
    right: bool
    answer: str | None = None


class Verifier:
    """A model (with or without an adapter) and the head that judges by its hidden states.

    layout: made of the model before any training. batch_size: solutions in one forward pass.
    """

    def __init__(self, model: Any, head: nn.Linear, layout: Layout, batch_size: int) -> None:
        self.model = model
        self.head = head
        self._layout = layout
        self._batch_size = batch_size

    @torch.no_grad()
    def score(self, rows: Sequence[Row]) -> list[float]:
        """For each row the probability, as the verifier sees it, that its solution is right.

        The model is left in the mode it was in.
        """
        training, found = self.model.training, list[float]()
        device = self.head.weight.device
        self.model.eval()
        try:
            with judging(causal_of(self.model), self.head, self._layout):
                for at in range(0, len(rows), self._batch_size):
                    part = rows[at : at + self._batch_size]
                    batch = to_device(self._layout.batch(part), device)
                    values, owners = token_values(self.model, batch)
                    found += values[_lasts(owners)].sigmoid().tolist()
        finally:
            self.model.train(training)
        return found

    def save(self, path: Path) -> None:
        """Write the head to a safetensors file; the adapter is written as any other is."""
        tensors = {name: p.detach().cpu().contiguous() for name, p in self.head.named_parameters()}
        save_file(tensors, path, metadata={"format": "pt"})


def new_head(model: Any) -> nn.Linear:
    """A head of zeros, in float32, for a model's hidden states."""
    embeddings = causal_of(model).get_input_embeddings().weight
    width = causal_of(model).config.get_text_config(decoder=True).hidden_size
    head = nn.Linear(width, 1, device=embeddings.device, dtype=torch.float32)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def load_head(model: Any, path: Path) -> nn.Linear:
    """The head that `Verifier.save` wrote, for this model.

    Raises:
        UserError: it cannot be read, or is for another width of hidden states.
    """
    head = new_head(model)
    try:
        tensors = load_file(path)
        head.load_state_dict(tensors)
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"verifier head {path}: does not fit this model: {reason}") from error
    return head


@contextmanager
def judging(causal: Any, head: nn.Linear, layout: Layout, lm_weight: float = 0.0) -> Iterator[None]:
    """Within it, `model(..., labels=labels)` gives {"values": (n,) float32, "lm": a loss}.

    n: the labelled tokens, row by row; the value of a token is that of the solution up to it.
    """
    original = causal.forward

    def forward(self: Any, *args: Any, labels: Tensor | None = None, **kw: Any) -> Any:
        if labels is None:
            return original(*args, **kw)
        kw["use_cache"] = False
        hidden = getattr(self, self.base_model_prefix)(*args, **kw).last_hidden_state
        picked = hidden[labels != IGNORED].float()
        found = {"values": nn.functional.linear(picked, head.weight, head.bias)[:, 0]}
        if lm_weight:
            found["lm"] = lm_weight * loss.labelled_loss(
                hidden, labels, self.get_output_embeddings()
            )
        return found

    name = attention.NAME if layout.flat else None
    with forward_as(causal, forward), attention.named_attention(causal, name):
        yield


def token_values(model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(n,) values of the labelled tokens, and (n,) the row each belongs to."""
    inputs = {name: value for name, value in batch.items() if name != OWNERS}
    return model(**inputs)["values"], batch[OWNERS][batch["labels"] != IGNORED]


def _lasts(owners: Tensor) -> Tensor:
    """Where each row's last labelled token is; rows come one after the other."""
    counts = torch.bincount(owners)
    return counts.cumsum(0) - 1


def balanced(solutions: Sequence[Solution], seed: int) -> list[Solution]:
    """As many right solutions as wrong ones, in their order; which go is a choice of the seed."""
    sides = [[i for i, s in enumerate(solutions) if s.right is right] for right in (True, False)]
    least = min(map(len, sides))
    generator = torch.Generator().manual_seed(seed % 2**63)
    kept = {
        side[place]
        for side in sides
        for place in torch.randperm(len(side), generator=generator)[:least].tolist()
    }
    return [s for i, s in enumerate(solutions) if i in kept]


def check_lm_weight(causal: Any, config: HeadConfig) -> None:
    """Raise a UserError where the loss of the next token is asked of a model whose head is not
    known to be a linear layer alone."""
    reason = loss.reason_against(causal) if config.lm_weight else None
    if reason is not None:
        raise UserError(
            f"verifier.lm_weight: this model's loss of the next token is not known: {reason}; "
            "set it to 0"
        )


def train_verifier(
    verifier: Verifier,
    solutions: Sequence[Solution],
    settings: TrainingConfig,
    config: HeadConfig,
    seed: int,
    callbacks: Sequence[Any] = (),
    output_dir: Path | None = None,
    *,
    layout: Layout,
    resume_from: Path | None = None,
    autocast: bool = False,
) -> History:
    """Train head and model on labelled solutions, in place; arguments are as `sft.train`'s.

    Raises:
        NonFiniteError: a loss or gradient is not finite.
        UserError: no solutions of both labels, an lm_weight that the model does not allow, or an
            optimizer that is not there.
    """
    if len({solution.right for solution in solutions}) < 2:
        what = "right" if solutions and solutions[0].right else "wrong"
        raise UserError(
            f"all {len(solutions)} sampled solutions are {what}: a verifier has nothing to tell "
            "apart; sample more (solutions.examples, solutions.samples), or set solutions.generator"
        )
    model, causal = verifier.model, causal_of(verifier.model)
    check_lm_weight(causal, config)
    notes = layout.notes
    with ExitStack() as stack:
        folder = output_dir or Path(stack.enter_context(TemporaryDirectory()))
        stack.enter_context(forward_kept(model, causal))
        stack.enter_context(quiet())
        # A part of the model while it trains, so that optimiser and devices know it.
        causal.add_module(_HEAD, verifier.head)
        stack.callback(lambda: causal._modules.pop(_HEAD))
        keep = output_dir is not None

        def collate(part: Sequence[Solution]) -> dict[str, Any]:
            rights = torch.tensor([float(solution.right) for solution in part])
            return {**layout.batch([solution.row for solution in part]), "rights": rights}

        trainer = _Trainer(
            model=model,
            args=arguments(TrainingArguments, model, settings, seed, folder, autocast, keep),
            data_collator=collate,
            train_dataset=list(solutions),
            callbacks=list(callbacks),
        )
        trainer.at = config.at
        trainer.remove_callback(PrinterCallback)
        if settings.fast:
            notes += stack.enter_context(fast_step(model))
        stack.enter_context(judging(causal, verifier.head, layout, config.lm_weight))
        try:
            trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
        finally:
            model.eval()
    return History.of(trainer, notes)


class _Trainer(Watched):
    mean_over_rows = True
    at: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        batch = dict(inputs)
        rights = batch.pop("rights")
        owners = batch[OWNERS][batch["labels"] != IGNORED]
        given = {name: value for name, value in batch.items() if name != OWNERS}
        found = model(**given)
        values, lasts = found["values"], _lasts(owners)
        if self.at == "end":
            value = binary_cross_entropy_with_logits(values[lasts], rights)
        else:
            each = binary_cross_entropy_with_logits(values, rights[owners], reduction="none")
            summed = torch.zeros_like(rights).index_add(0, owners, each)
            value = (summed / torch.bincount(owners)).mean()
        side = (values.detach()[lasts] > 0) == rights.bool()
        weight = self.weight(len(rights))
        self.note(judged_right=weight * float(side.float().mean()))
        value = value * weight
        if "lm" in found:  # a mean over tokens, not over solutions
            value = value + found["lm"] * self.weight(len(values))
        return (value, {}) if return_outputs else value

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Whatever is trained, the head with it; the adapter in its own format comes at the end."""
        if not self.args.should_save:
            return
        tensors = {
            name: p.detach().cpu().contiguous()
            for name, p in self.model.named_parameters()
            if p.requires_grad
        }
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / _TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        tensors = load_file(Path(resume_from_checkpoint) / _TRAINED)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(tensors[name])


@dataclass(frozen=True)
class Picked:
    """Shares of examples answered right when each answer is picked in a way of its own.

    pass_at_1: any candidate, on average. verify: the one with the highest score. majority: the
    first that gives the commonest answer (candidates without an answer do not vote). pass_at_n:
    whether any is right. auc: the chance that a right candidate scores above a wrong one, over
    all examples; None where there are not both.

    over_pass_at_1, over_majority: how much more `verify` is, example by example. scores: all of
    these but auc by name, with their standard errors over the examples.
    """

    scores: Mapping[str, Estimate]
    auc: float | None

    @property
    def pass_at_1(self) -> float:
        return self.scores["pass_at_1"].value

    @property
    def verify(self) -> float:
        return self.scores["verify"].value

    @property
    def majority(self) -> float:
        return self.scores["majority"].value

    @property
    def pass_at_n(self) -> float:
        return self.scores["pass_at_n"].value


def pick(candidates: Sequence[Sequence[Solution]], scores: Sequence[Sequence[float]]) -> Picked:
    """Compare ways to pick one of each example's candidates; both are by example."""
    verify, majority = list[float](), list[float]()
    for group, given in zip(candidates, scores, strict=True):
        verify.append(float(group[max(range(len(group)), key=given.__getitem__)].right))
        votes = Counter(one.answer for one in group if one.answer is not None)
        commonest = votes.most_common(1)[0][0] if votes else None
        voted = next(one.right for one in group if one.answer == commonest or not votes)
        majority.append(float(voted))
    single = [fmean(one.right for one in group) for group in candidates]
    by_name = {
        "verify": verify,
        "majority": majority,
        "pass_at_1": single,
        "pass_at_n": [float(any(one.right for one in group)) for group in candidates],
        "over_pass_at_1": [v - p for v, p in zip(verify, single, strict=True)],
        "over_majority": [v - m for v, m in zip(verify, majority, strict=True)],
    }
    flat = [(score, one.right) for g, s in zip(candidates, scores, strict=True)
            for one, score in zip(g, s, strict=True)]  # fmt: skip
    return Picked({name: mean_of(values) for name, values in by_name.items()}, _auc(flat))


def _auc(judged: Sequence[tuple[float, bool]]) -> float | None:
    """By ranks (Mann-Whitney); a tie counts half."""
    right = sorted(score for score, is_right in judged if is_right)
    wrong = sorted(score for score, is_right in judged if not is_right)
    if not right or not wrong:
        return None
    above = torch.searchsorted(torch.tensor(wrong), torch.tensor(right))
    upto = torch.searchsorted(torch.tensor(wrong), torch.tensor(right), right=True)
    return float((above + upto).double().sum() / 2 / (len(right) * len(wrong)))
