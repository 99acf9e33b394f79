"""Rows that are to be learned, looked at as the trainer will see them: tokens and labels.

What a file of text holds is `loralab.data.lint`'s; here it is what tokenisation, template and
masking made of it, and whether the base model thinks that answers belong to their prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from loralab.data.check import contamination
from loralab.data.documents import Document
from loralab.engines.stopping import end_tokens
from loralab.health.pairs import IGNORED, SCALES, Pairs, heard, loss_of, pairs_of, scaled
from loralab.health.runners import ModelRunner, Runner
from loralab.health.still import base_of, causal_of, has_adapter, held_still

if TYPE_CHECKING:
    from loralab.health.look import Look, Subject

MARKS: Mapping[str, tuple[str, ...]] = {
    "ChatML": ("<|im_start|>",),
    "Llama 2": ("[INST]",),
    "Llama 3": ("<|start_header_id|>",),
    "Gemma": ("<start_of_turn>",),
    "Zephyr": ("<|user|>", "<|assistant|>"),
    "Vicuna": ("USER:", "ASSISTANT:"),
    "DeepSeek": ("<｜User｜>",),
}
"""What a row holds, all of it, that some chat template wrote."""

_DECODED_ROWS = 256
_MOST_ROWS = 20_000


@dataclass(frozen=True)
class Tokens:
    """One sequence: ids, and labels equal to them or -100."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def learned(self) -> tuple[int, ...]:
        """The ids that are learned; a first token is predicted from nothing."""
        return tuple(label for label in self.labels[1:] if label != IGNORED)

    @property
    def start(self) -> int:
        """Where the first learned token stands; the length if there is none."""
        found = (i for i, label in enumerate(self.labels) if i and label != IGNORED)
        return next(found, len(self.labels))


@dataclass(frozen=True)
class DataFacts:
    """values: `data.*` of a reading. top_token, excess_token: the text of the tokens behind
    data.top_token_share and data.excess_token. template: the one that rows are in and should not
    be. places: of rows that hold an evaluated one."""

    values: Mapping[str, float]
    top_token: str | None = None
    excess_token: str | None = None
    template: str | None = None
    places: tuple[str, ...] = field(default=())


class DataProbe:
    """`data.*` of fixed rows, measured at the first look and told again at each; and what the model
    makes of some of them as it is at this look.

    rows: what `tokens_of` takes. passes: over the rows, if the training knows them.
    evaluated: by task, texts that must not be learned; documents: the training rows as text.
    rescaled: whether to try a worsened adapter at other scalings, which costs as much as three
    looks at the rows and is judged of a finished one alone.
    """

    name = "data"
    measures = "labels, ends, template, copies and line breaks of rows; do answers fit prompts"
    cost = "32 short rows through the base, once, and through the model"

    def __init__(
        self,
        rows: Iterable[Any],
        tokenizer: Any,
        max_length: int | None = None,
        passes: float | None = None,
        documents: Sequence[Document] = (),
        evaluated: Mapping[str, Sequence[Document]] | None = None,
        ends: Collection[int] = (),
        rescaled: bool = True,
    ) -> None:
        self._rows = list(tokens_of(rows))
        self._rescaled = rescaled
        self._tokenizer = tokenizer
        self._max_length, self._passes, self._ends = max_length, passes, ends
        self._documents, self._evaluated = documents, evaluated
        self._pairs: Pairs | None = None
        self.facts: DataFacts | None = None

    def measure(self, look: Look) -> dict[str, float]:
        """Of the rows, of how the true base reads them, and of how the model does."""
        subject = look.subject
        values = self.measure_model(subject.model, subject.base_runner)
        if self._pairs is not None:
            base_loss = values["base.data.row_loss"]
            values |= learned_values(self._pairs, look.readers[0])
            if self._rescaled and values["data.row_loss"] > base_loss:
                values |= rescaled_values(subject, self._pairs, base_loss)
        return values

    def measure_model(
        self, model: Any | None, base: Callable[[], Runner] | None = None
    ) -> dict[str, float]:
        """Of the rows, and of how the true base of a model in memory reads them; None leaves out
        what needs one. base: what runs rows through that base, if there is something better than
        the model itself."""
        if self.facts is None:
            ends = {*self._ends, *ends_of(self._tokenizer, model)}
            facts = row_facts(self._rows, self._tokenizer, ends, self._max_length)
            values = dict(facts.values)
            places: tuple[str, ...] = ()
            if self._passes is not None:
                values["data.passes"] = self._passes
            if self._evaluated and self._documents:
                found = contamination(self._documents, self._evaluated).rows
                places = tuple(dict.fromkeys(overlap.train for overlap in found))
                rows = len({document.place for document in self._documents})
                values["data.contaminated"] = len(places) / rows
            excess = None
            self._pairs = None if model is None else pairs_of(self._rows[:_MOST_ROWS], ends)
            if self._pairs is not None:
                read, token = base_values(model, self._pairs, base)
                values |= read
                excess = self._tokenizer.decode([token])
            self.facts = DataFacts(values, facts.top_token, excess, facts.template, places)
        return dict(self.facts.values)


def tokens_of(rows: Iterable[Any]) -> Iterator[Tokens]:
    """Sequences from prepared rows of loralab, or from records of a dataset: objects or mappings
    with `input_ids` and `labels` (or TRL's `completion_mask` / `assistant_masks` / neither: all is
    learned), packed ones taken apart by `lengths` or `seq_lengths`. Padding is not told from text:
    give batches to `tokens_of_batch`."""
    for row in rows:
        get = row.get if isinstance(row, Mapping) else lambda key, of=row: getattr(of, key, None)
        ids: list[int] = list(get("input_ids") or ())
        labels = get("labels")
        mask = next((m for k in ("completion_mask", "assistant_masks") if (m := get(k))), None)
        if labels is None:
            labels = ids if mask is None else [t if m else IGNORED for t, m in zip(ids, mask)]  # noqa: B905
        at = 0
        for length in get("lengths") or get("seq_lengths") or (len(ids),):
            yield Tokens(tuple(ids[at : at + length]), tuple(labels[at : at + length]))
            at += length


def tokens_of_batch(batch: Mapping[str, Any]) -> Iterator[Tokens]:
    """Sequences of a collated batch (rows, tokens): input_ids, labels, attention_mask; columns that
    the mask leaves out are padding."""
    ids, labels = batch["input_ids"], batch["labels"]
    mask = batch.get("attention_mask")
    for row in range(len(ids)):
        kept = torch.ones_like(ids[row]).bool() if mask is None else mask[row].bool()
        yield Tokens(tuple(ids[row][kept].tolist()), tuple(labels[row][kept].tolist()))


def ends_of(tokenizer: Any, model: Any | None = None) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's, and with a model those it stops at."""
    if model is not None:
        return end_tokens(causal_of(model), tokenizer)
    end = tokenizer.eos_token_id
    return frozenset() if end is None else frozenset({end})


def row_facts(
    rows: Sequence[Tokens], tokenizer: Any, ends: Collection[int], max_length: int | None = None
) -> DataFacts:
    """What rows alone tell; shares of rows unless said.

    data.rows: how many. all_masked: without a learned label. empty: with labels, but of nothing
    besides end tokens; blank: of whitespace, with an end or without. eos_missing: with labels, but
    none of an end token, and not cut off. pad_is_eos_masked: of these, where an end token stands
    behind the answer, masked, and is the padding token too. double_bos: begin with it twice.
    truncated: as long as max_length, without an end. duplicate_share: equal to an earlier one.
    newline_share and top_token_share: of learned tokens, line breaks, and the most frequent other
    token. template_mismatch: with the marks of a chat template that is not the tokenizer's.
    """
    if not rows:
        return DataFacts({"data.rows": 0.0})
    count = len(rows)
    looked = rows[:_MOST_ROWS]
    learned = Counter(token for row in looked for token in row.learned)
    whole = [row for row in looked if row.learned]
    cut = [_is_cut(row, ends, max_length) for row in whole]
    endless = [
        row
        for row, is_cut in zip(whole, cut, strict=True)
        if not is_cut and not set(row.learned) & set(ends)
    ]
    masked_ends = [
        row
        for row in endless
        if tokenizer.pad_token_id in ends and set(row.input_ids[row.start :]) & set(ends)
    ]
    visible = {t for t in learned if t not in ends and tokenizer.decode([t]).strip()}
    unseen = [row for row in whole if visible.isdisjoint(row.learned)]
    blank = [row for row in unseen if not set(ends).issuperset(row.learned)]
    bos = tokenizer.bos_token_id
    tokens = sum(learned.values())
    breaks = {token for token in learned if _is_break(tokenizer, token)}
    words = Counter({t: n for t, n in learned.items() if tokenizer.decode([t]).strip()})
    top = words.most_common(1)
    sample = looked[:: max(1, len(looked) // _DECODED_ROWS)]
    foreign = [foreign_template(tokenizer.decode(row.input_ids), tokenizer) for row in sample]
    values = {
        "data.rows": float(count),
        "data.all_masked": 1 - len(whole) / len(looked),
        "data.empty": (len(unseen) - len(blank)) / max(1, len(whole)),
        "data.blank": len(blank) / max(1, len(whole)),
        "data.eos_missing": len(endless) / max(1, len(whole)),
        "data.pad_is_eos_masked": len(masked_ends) / max(1, len(whole)),
        "data.double_bos": fmean(
            bos is not None and row.input_ids[:2] == (bos, bos) for row in looked
        ),
        "data.duplicate_share": 1 - len(set(looked)) / len(looked),
        "data.template_mismatch": fmean(name is not None for name in foreign),
    }
    if max_length is not None:
        values["data.truncated"] = sum(cut) / max(1, len(whole))
    if whole:
        values["data.prompted"] = fmean(float(row.start > 1) for row in whole)
        values["data.answer_length"] = fmean(len(row.learned) for row in whole)
    if tokens:
        values["data.newline_share"] = sum(learned[token] for token in breaks) / tokens
        values["data.top_token_share"] = (top[0][1] if top else 0) / tokens
    return DataFacts(
        values,
        top_token=tokenizer.decode([top[0][0]]) if top else None,
        template=next((name for name in foreign if name is not None), None),
    )


def foreign_template(text: str, tokenizer: Any) -> str | None:
    """The chat template that a row's text has the marks of, if this tokenizer has not."""
    own = f"{getattr(tokenizer, 'chat_template', None) or ''} {tokenizer.get_added_vocab()}"
    for name, marks in MARKS.items():
        if all(mark in text for mark in marks) and not any(mark in own for mark in marks):
            return name
    return None


def base_values(
    model: Any, pairs: Pairs, base: Callable[[], Runner] | None = None
) -> tuple[dict[str, float], int]:
    """How the true base reads the rows, and the token behind data.excess_token.

    data.shuffled: share of rows whose answer is no likelier behind its own prompt than behind one
    whose answer is another: about 0 where they belong together, 0.5 where they were shuffled, and
    where the base cannot tell. pair_gain: mean difference of the two, nats a token; .se its
    standard error, .errors how many of these it is. excess_token: over all tokens but ends, the
    largest share of the targets less the base's mean chance of it there; base.data.overexpected:
    the largest of the opposite. base.data.row_loss: nats a token of the answers.
    """
    runner = base() if base else ModelRunner(causal_of(model), partial(_as_base, model))
    said = heard(runner, pairs)
    top = int(said.surplus.argmax())
    values = {
        "data.shuffled": fmean(gain <= 0 for gain in said.gains),
        "data.pair_gain": said.gain,
        "data.pair_gain.se": said.error,
        "data.pair_gain.errors": said.gain / said.error,
        "data.excess_token": float(said.surplus[top]),
        "base.data.overexpected": said.overexpected,
        "base.data.row_loss": said.loss,
    }
    return values, top


def learned_values(pairs: Pairs, now: Runner) -> dict[str, float]:
    """How a model reads the rows as it is now, beside `base_values`.

    data.learned_gain: as pair_gain; .errors as there. data.overexpected: over all tokens but ends,
    the largest mean chance less its share of the targets. data.row_loss: nats a token of the
    answers.
    """
    said = heard(now, pairs)
    return {
        "data.learned_gain": said.gain,
        "data.learned_gain.errors": said.gain / said.error,
        "data.overexpected": said.overexpected,
        "data.row_loss": said.loss,
    }


def rescaled_values(subject: Subject, pairs: Pairs, base_loss: float) -> dict[str, float]:
    """data.rescaled_loss: of an adapter that makes its rows unlikelier than the base does, the
    least nats a token of the answers at a half to a sixteenth of its scaling; {} of no adapter."""
    if not has_adapter(subject.causal):
        return {}
    tried = []
    for scale in SCALES:
        with scaled(subject.causal, scale):
            tried.append(loss_of(subject.readers()[0], pairs))
    # What a look's rows run through has the adapter as it was last asked for.
    subject.readers()
    return {"data.rescaled_loss": min(tried), "base.data.rescaled_loss": base_loss}


@contextmanager
def _as_base(model: Any) -> Iterator[Any]:
    causal = causal_of(model)
    with held_still(causal), base_of(model) if has_adapter(model) else nullcontext():
        yield causal


def _is_cut(row: Tokens, ends: Collection[int], max_length: int | None) -> bool:
    full = max_length is not None and len(row.input_ids) >= max_length
    return full and row.input_ids[-1] not in ends


def _is_break(tokenizer: Any, token: int) -> bool:
    text = tokenizer.decode([token])
    return "\n" in text and not text.strip()
