"""Direct preference optimisation of a model in memory (Rafailov et al. 2023, arXiv:2305.18290).

    margin = beta [(log p(y+|x) - log ref(y+|x)) - (log p(y-|x) - log ref(y-|x))]
    loss   = -log sigmoid(margin)

y+ and y- are the chosen and the rejected answer, ref the reference: the true base, or the model as
training found it. The chosen and the rejected answers of a batch lie end to end in one row, each
seeing itself alone; the head runs on answer tokens only. The reference's numbers are made on the
same batch just before the model's, by the same products, so that a model that is its reference has
a margin of 0, not of the rounding between two shapes of batch.

TRL's DPOTrainer is not used: its reference of a PEFT model is a disabled adapter, which is not the
base where an initialisation changed the weights under it, and it pads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PrinterCallback, TrainingArguments

from loralab.adapters.true_base import true_base
from loralab.config import TrainingConfig
from loralab.config.dpo import PreferenceConfig
from loralab.errors import UserError
from loralab.gradient import attention, loss
from loralab.gradient.collate import flatten, pad
from loralab.gradient.dropout import without_base_dropout
from loralab.gradient.forward import causal_of, forward_kept
from loralab.gradient.log_probs import LOG_PROBS, labelled_log_probs
from loralab.gradient.loop import History, arguments, fast_step, quiet
from loralab.gradient.parts import InParts, set_parts
from loralab.gradient.preferences import Pair
from loralab.gradient.rows import IGNORED, Row, RowEncoder

OWNERS = "owners"
"""The key of a batch that holds, for each token, the number of the sequence it belongs to."""

COLUMNS = ("margin", "accuracy", "chosen_reward", "rejected_reward")
"""What a step logs beside the loss: means over its pairs."""


@dataclass(frozen=True)
class PairRow:
    """Tokens of a pair: prompt and answer, twice."""

    chosen: Row
    rejected: Row


@dataclass(frozen=True)
class PreparedPairs:
    """cut: pairs with an answer that lost its end to max_length. too_long: pairs left out, since
    the prompt alone fills max_length."""

    rows: tuple[PairRow, ...]
    cut: int
    too_long: int


@dataclass(frozen=True)
class Preference:
    """How a model judges pairs, in rewards against its reference. A tie counts half."""

    margins: tuple[float, ...]

    @property
    def margin(self) -> float:
        return fmean(self.margins)

    @property
    def margin_std(self) -> float:
        return pstdev(self.margins)

    @property
    def accuracy(self) -> float:
        return fmean(0.5 if m == 0 else float(m > 0) for m in self.margins)


def prepare_pairs(pairs: Sequence[Pair], tokenizer: Any, max_length: int) -> PreparedPairs:
    """Rows of pairs; answers longer than max_length leaves room for lose their end."""
    encoder = RowEncoder(tokenizer)
    rows, cut, too_long = [], 0, 0
    for pair in pairs:
        whole = [encoder.encode(pair.prompt, text) for text in (pair.chosen, pair.rejected)]
        kept = [Row(row.input_ids[:max_length], row.labels[:max_length]) for row in whole]
        if not all(row.learned for row in kept):
            too_long += 1
            continue
        cut += any(len(row.input_ids) > max_length for row in whole)
        rows.append(PairRow(*kept))
    return PreparedPairs(tuple(rows), cut, too_long)


Reference = Callable[[], AbstractContextManager[None]]
"""Within it, the model is the reference."""


def reference_of(model: Any, kind: str) -> Reference:
    """What `dpo.reference` means for a model that is about to be trained; call it before.

    "base": adapters off and every weight as it was before any initialisation; of a model that is
    trained whole, as it is now. "start": the trainable weights as they are now.
    """
    if kind == "base" and hasattr(model, "peft_config"):
        return lambda: true_base(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trained]

    @contextmanager
    def swapped() -> Iterator[None]:
        now = [p.data for p in trained]
        for parameter, value in zip(trained, start, strict=True):
            parameter.data = value
        try:
            yield
        finally:
            for parameter, value in zip(trained, now, strict=True):
                parameter.data = value

    return swapped


@dataclass(frozen=True)
class Layout:
    """How batches are laid out and which head runs, for one model and its settings.

    Make it before training, which changes how the model's attention runs.
    """

    flat: bool
    whole: bool
    pad_id: int
    notes: tuple[str, ...]

    @staticmethod
    def of(causal: Any, tokenizer: Any, settings: TrainingConfig) -> Layout:
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        if not settings.fast:
            return Layout(False, True, pad_id, ())
        from_loss, from_attention = loss.reason_against(causal), attention.reason_against(causal)
        notes = []
        if from_loss:
            notes.append(f"the head runs on every token: {from_loss}")
        if from_attention:
            notes.append(f"batches are padded: {from_attention}")
        return Layout(from_attention is None, from_loss is not None, pad_id, tuple(notes))

    def batch(self, rows: Sequence[Row]) -> dict[str, Any]:
        """A batch of rows, and which of them each token is of."""
        batch = flatten(rows) if self.flat else pad(rows, self.pad_id)
        numbers = torch.arange(len(rows))
        if self.flat:
            lengths = torch.tensor([len(row.input_ids) for row in rows])
            batch[OWNERS] = numbers.repeat_interleave(lengths)[None]
        else:
            batch[OWNERS] = numbers[:, None].expand_as(batch["labels"])
        return batch

    def pairs(self, rows: Sequence[PairRow]) -> dict[str, Any]:
        """A batch of each pair's chosen answer and, behind it, the rejected one."""
        return self.batch([row for pair in rows for row in (pair.chosen, pair.rejected)])

    @contextmanager
    def running(self, causal: Any, temperature: float = 1.0) -> Iterator[None]:
        """Within it the model takes such batches and gives log-probabilities."""
        name = attention.NAME if self.flat else None
        with (
            without_base_dropout(causal),
            labelled_log_probs(causal, temperature, self.whole),
            attention.named_attention(causal, name),
        ):
            yield


def token_owners(batch: Mapping[str, Any]) -> Tensor:
    """(n,): the row of each labelled token, in the order of its log-probability."""
    owners: Tensor = batch[OWNERS][:, 1:][batch["labels"][:, 1:] != IGNORED]
    return owners


def run_batch(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Log-probabilities (n,) of a batch's labelled tokens."""
    inputs = {name: value for name, value in batch.items() if name != OWNERS}
    found: Tensor = model(**inputs)[LOG_PROBS]
    return found


def answer_log_probs(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """(pairs, 2): log-probability of the chosen and of the rejected answer, summed over tokens."""
    found = run_batch(model, batch)
    count = int(batch[OWNERS].max()) + 1
    return found.new_zeros(count).index_add(0, token_owners(batch), found).view(-1, 2)


def reference_log_probs(model: Any, batch: Mapping[str, Any], reference: Reference) -> Tensor:
    """As `answer_log_probs`, of the reference; no gradient, no dropout."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), reference():
            return answer_log_probs(model, batch)
    finally:
        model.train(training)


@torch.no_grad()
def preference(
    model: Any,
    layout: Layout,
    rows: Sequence[PairRow],
    batch_size: int,
    beta: float,
    reference: Reference,
) -> Preference:
    """How the model, as it is now, judges pairs. It is left in the mode it was in."""
    device = next(model.parameters()).device
    training, margins = model.training, list[float]()
    model.eval()
    try:
        with layout.running(causal_of(model)):
            for at in range(0, len(rows), batch_size):
                batch = to_device(layout.pairs(rows[at : at + batch_size]), device)
                before = reference_log_probs(model, batch, reference)
                change = answer_log_probs(model, batch) - before
                margins += (beta * (change[:, 0] - change[:, 1])).tolist()
    finally:
        model.train(training)
    return Preference(tuple(margins))


def train_pairs(
    model: Any,
    tokenizer: Any,
    rows: Sequence[PairRow],
    settings: TrainingConfig,
    preferences: PreferenceConfig,
    seed: int,
    callbacks: Sequence[Any] = (),
    output_dir: Path | None = None,
    *,
    reference: Reference,
    resume_from: Path | None = None,
    autocast: bool = False,
) -> History:
    """Train what is trainable in a model on pairs, in place; the arguments are as `sft.train`'s.

    reference: from `reference_of`, made before anything was trained.

    Raises:
        NonFiniteError: a loss or gradient is not finite.
        UserError: no pairs, or an optimizer that is not there.
    """
    if not rows:
        raise UserError("there are no pairs to train on")
    causal = causal_of(model)
    layout = Layout.of(causal, tokenizer, settings)
    notes = layout.notes
    with ExitStack() as stack:
        folder = output_dir or Path(stack.enter_context(TemporaryDirectory()))
        stack.enter_context(forward_kept(model, causal))
        stack.enter_context(quiet())
        keep = output_dir is not None
        trainer = _Trainer(
            model=model,
            args=arguments(TrainingArguments, model, settings, seed, folder, autocast, keep),
            data_collator=layout.pairs,
            train_dataset=rows,
            callbacks=list(callbacks),
        )
        trainer.preferences, trainer.reference = preferences, reference
        set_parts(trainer, causal)
        trainer.remove_callback(PrinterCallback)
        if settings.fast:
            notes += stack.enter_context(fast_step(model))
        stack.enter_context(layout.running(causal))
        try:
            trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
        finally:
            model.eval()
    return History.of(trainer, notes)


class _Trainer(InParts):
    mean_over_rows = True
    together = 2
    preferences: PreferenceConfig
    reference: Reference
    pairs = 0
    rewards: list[Tensor]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The loss is a mean over pairs, whatever their number of tokens.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        before = reference_log_probs(model, inputs, self.reference)
        rewards = self.preferences.beta * (answer_log_probs(model, inputs) - before)
        self.rewards.append(rewards.detach())
        margins = rewards[:, 0] - rewards[:, 1]
        smoothing = self.preferences.label_smoothing
        value = -logsigmoid(margins).sum()
        if smoothing:
            value = (1 - smoothing) * value - smoothing * logsigmoid(-margins).sum()
        value = value * (self.weight(self.pairs) / self.pairs)
        return (value, {}) if return_outputs else value

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        self.pairs, self.rewards = (int(inputs[OWNERS].max()) + 1) // 2, []
        value = super().training_step(model, inputs, num_items_in_batch)
        rewards = torch.cat(self.rewards)
        margins = rewards[:, 0] - rewards[:, 1]
        chosen, rejected = rewards.mean(dim=0).tolist()
        weight = self.weight(self.pairs)
        self.note(
            margin=weight * (chosen - rejected),
            accuracy=weight * Preference(tuple(margins.tolist())).accuracy,
            chosen_reward=weight * chosen,
            rejected_reward=weight * rejected,
        )
        return value

    def parts(self, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for part in super().parts(inputs):
            yield part | {OWNERS: part[OWNERS] - part[OWNERS].min()}


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on a device."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
