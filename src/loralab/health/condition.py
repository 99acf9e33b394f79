"""One comparison of a rule: a value, what it is compared with, and how that is said."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from loralab.health.reading import Reading
from loralab.health.thresholds import Limit

Against = Literal["limit", "base", "near base", "share of base"]

LABELS: Mapping[str, str] = {
    "agreement": "top-1 agreement with the base",
    "canary.options": "score of naming every option, over the base's",
    "canary.options.share": "score of naming every option, of the gold answers'",
    "canary.options.errors": "score of naming every option over the base's, standard errors",
    "canary.copied": "score of the copied prompt, over the base's",
    "canary.copied.share": "score of the copied prompt, of the gold answers'",
    "canary.copied.errors": "score of the copied prompt over the base's, standard errors",
    "canary.baseline": "reported score of the base, off the measured by",
    "canary.baseline.errors": "the same in standard errors",
    "canary.empty": "score of empty text, over the base's",
    "canary.empty.share": "score of empty text, of the gold answers'",
    "canary.empty.errors": "score of empty text over the base's, standard errors",
    "canary.gold_right": "gold answers that count as right",
    "canary.identity": "metric of an adapter that does nothing, off the base's by",
    "canary.last_answer": "score of a right answer after a wrong one, under the gold's by",
    "canary.newlines": "score of newlines, over the base's",
    "canary.newlines.share": "score of newlines, of the gold answers'",
    "canary.newlines.errors": "score of newlines over the base's, standard errors",
    "canary.prompts_distinct": "share of prompts that differ",
    "data.all_masked": "rows without a label",
    "data.blank": "rows of whitespace alone",
    "data.contaminated": "rows that hold an evaluated one",
    "data.double_bos": "rows that start twice",
    "data.duplicate_share": "rows that are copies",
    "data.empty": "rows of an end alone",
    "data.eos_missing": "rows without an end token to learn",
    "data.learned_gain.errors": "what it learned to gain from the rows' prompts, standard errors",
    "data.newline_share": "line breaks among learned tokens",
    "data.pad_is_eos_masked": "rows whose end is masked as padding",
    "data.padding_learned": "padding that is learned",
    "data.prompted": "rows with a prompt",
    "data.overexpected": "chance it gives one token, over its share of the rows",
    "data.pair_gain.errors": "what the base gains from the rows' prompts, standard errors",
    "data.passes": "passes over the rows",
    "data.rescaled_loss": "loss on the rows with the adapter scaled down",
    "data.row_loss": "loss on the rows",
    "data.rows": "rows",
    "data.shuffled": "rows that fit another prompt as well",
    "data.template_mismatch": "rows in another chat template",
    "data.excess_token": "share of one token, over what the base expects",
    "data.truncated": "rows that lost their end",
    "entropy": "next-token entropy",
    "es.correct": "share of correct answers",
    "es.correct_up": "rise of correct answers, standard errors",
    "es.distinct": "share of members whose text differs",
    "es.dominance": "noise of the loudest module, times the median's",
    "es.held_out_gap": "training reward up while held-out reward falls, standard errors",
    "es.informative": "informative pairs",
    "es.member_kl": "KL that a member's noise alone makes, nats a token",
    "es.noop": "noise lost to rounding",
    "es.repetition": "members' texts that repeat, over the first generation's",
    "es.reward_up": "rise of the reward, standard errors",
    "es.second_fall": "fall of the second measure",
    "es.second_measure": "fall of the second measure, standard errors",
    "es.ties": "tied members",
    "es.unearned": "reward of a text without merit, of the gold answers'",
    "grad.spike": "gradient norm, times its median",
    "grad.zero": "steps without gradient",
    "kl": "KL from the base",
    "loss.all": "loss on known-good text",
    "loss.content": "loss on content",
    "loss.eos": "loss on the end token",
    "loss.prompt_gain": "gain from the right prompt",
    "loss.whitespace": "loss on whitespace",
    "parity.keys_missing": "tensors missing from the file",
    "parity.keys_unexpected": "tensors that loaded nowhere",
    "parity.merge": "difference of merged and unmerged",
    "parity.reload": "difference after saving and loading",
    "setup.memory_share": "memory it needs, of what is free",
    "setup.left_out": "trainable tensors without an optimiser",
    "setup.scaling": "scaling off alpha / rank, ln",
    "setup.unprepared": "start that was never prepared",
    "spline.clamp": "splines clamped at the ends of their grid",
    "spline.deviation": "spline off the identity",
    "spline.outside": "spline inputs outside the grid",
    "spline.output_scale": "spline's output scale",
    "spline.penalty": "spline's penalty",
    "spline.reach": "narrower side of the splines' grid",
    "spline.soft": "soft interpolation",
    "spline.tanh": "tanh before the spline",
    "text.base_nll": "own text under the base",
    "text.charset_drift": "characters of another script",
    "text.copied": "text copied from the prompt",
    "text.looping": "completions that repeat",
    "text.long_run": "completions with a run of one token",
    "text.empty": "empty completions",
    "text.eos_rate": "completions that end",
    "text.failed": "completions that failed",
    "text.length": "tokens of a completion",
    "text.newlines": "newlines",
    "text.similarity": "similarity across prompts",
    "text.top_token_share": "share of one token",
    "text.whitespace": "whitespace",
    "train.dose": "sum of the learning rate, planned",
    "train.loss_rise": "rise of the training loss, of the first",
    "train.loss_share": "training loss, of the first",
    "train.nonfinite": "steps with NaN or infinity",
    "train.progress": "share of the training done",
    "train.step": "steps",
    "update.none": "trainable tensors that do not move",
    "update.ratio": "update of a step, of the adapter's norm",
    "weights.base_share": "share of W in the adapter",
    "weights.dead": "modules with both factors zero",
    "weights.delta_ratio.max": "largest ||dW|| / ||W||",
    "weights.idle": "modules with dW = 0",
    "weights.nan": "tensors with NaN or infinity",
}
"""Values in words; what is not here goes by its name."""


@dataclass(frozen=True)
class Condition:
    """Whether a value is beyond its limit.

    against: "limit" compares the value itself, "base" its distance from the base's value on the
    same prompts ("near base" holds while it lies less than the limit over it), "share of base" with
    the limit times the base's value. missing: whether it holds where the value, or its base's, is
    missing or NaN. Such a value accuses nobody; a condition that may only acquit lets it pass.
    """

    value: str
    limit: Limit
    above: bool = True
    against: Against = "limit"
    missing: bool = False

    def holds(self, reading: Reading) -> bool:
        if not self.known(reading):
            return self.missing
        x, base, limit = self.of(reading), self.base_of(reading), self.limit.value
        if self.against == "base":
            x = x - base if self.above else base - x
            return x > limit
        if self.against == "near base":
            return x - base < limit
        if self.against == "share of base":
            limit *= base
        return x > limit if self.above else x < limit

    def known(self, reading: Reading) -> bool:
        """Whether what is compared was measured."""
        if math.isnan(self.of(reading)):
            return False
        return self.against == "limit" or not math.isnan(self.base_of(reading))

    def of(self, reading: Reading) -> float:
        return reading.values.get(self.value, math.nan)

    def base_of(self, reading: Reading) -> float:
        return reading.values.get(f"base.{self.value}", math.nan)

    def bound(self) -> str:
        """The limit in words: "> 0.5", "> base + 0.3", "< 0.25 x base", "> 0.5 if known"."""
        return f"{self._bound()} if known" if self.missing else self._bound()

    def _bound(self) -> str:
        sign, number = ">" if self.above else "<", figure(self.limit.value)
        if self.against == "base":
            further = self.above == (self.limit.value >= 0)
            return f"{sign} base {'+' if further else '-'} {number.removeprefix('-')}"
        if self.against == "near base":
            return f"< base + {number}"
        return f"{sign} {number}{' x base' if self.against == 'share of base' else ''}"

    def label(self) -> str:
        return LABELS.get(self.value, self.value)


def over(value: str, limit: Limit) -> Condition:
    return Condition(value, limit)


def under(value: str, limit: Limit) -> Condition:
    return Condition(value, limit, above=False)


def over_base(value: str, limit: Limit) -> Condition:
    return Condition(value, limit, against="base")


def under_base(value: str, limit: Limit) -> Condition:
    return Condition(value, limit, above=False, against="base")


def near_base(value: str, limit: Limit) -> Condition:
    """Less than that over the base's value, or under it."""
    return Condition(value, limit, above=False, against="near base")


def if_known(condition: Condition) -> Condition:
    """The same, and it holds too where nothing was measured: what may acquit, and not accuse."""
    return replace(condition, missing=True)


def below_share(value: str, limit: Limit) -> Condition:
    """Under that share of the base's value."""
    return Condition(value, limit, above=False, against="share of base")


def cited(conditions: tuple[Condition, ...], reading: Reading) -> str:
    """The numbers that conditions look at, each value once:
    "completions that repeat 0.81, base 0.06 (> 0.5, > base + 0.3)"."""
    parts = []
    conditions = tuple(c for c in conditions if c.known(reading))
    for value in dict.fromkeys(condition.value for condition in conditions):
        own = [condition for condition in conditions if condition.value == value]
        base = own[0].base_of(reading)
        beside = "" if math.isnan(base) else f", base {figure(base)}"
        bounds = ", ".join(condition.bound() for condition in own)
        parts.append(f"{own[0].label()} {figure(own[0].of(reading))}{beside} ({bounds})")
    return "; ".join(parts)


def numbers_of(conditions: tuple[Condition, ...], reading: Reading) -> dict[str, float]:
    """The same for machines: the values, the base's where there are, and `limit.` of each bound."""
    found: dict[str, float] = {}
    for condition in (c for c in conditions if c.known(reading)):
        found[condition.value] = condition.of(reading)
        if not math.isnan(condition.base_of(reading)):
            found[f"base.{condition.value}"] = condition.base_of(reading)
        name = "" if condition.against == "limit" else f".{condition.against.replace(' ', '_')}"
        found[f"limit.{condition.value}{name}"] = condition.limit.value
    return found


def figure(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}"
