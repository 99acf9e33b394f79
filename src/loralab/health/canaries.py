"""Whether a score means anything: texts without merit must earn little of what the gold answers do
and no more than the base, nor may an adapter that does nothing change a metric.

An evaluation that scores prompt and completion together, takes the first answer it finds, asks one
question over and over, or compares with a baseline from elsewhere gives a number like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf, isfinite, nan, sqrt
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from loralab.tasks.base import Example, Measured, Optioned, Prompt, Score, Split, Task

if TYPE_CHECKING:
    from loralab.health.look import Look, Subject

Scorer = Callable[[Example, str], Score]
Prompter = Callable[[Example], Prompt]

GOLD = "gold"
_LEAD = "Let me think about it for a moment.\n"
_TURN = "\nNo, that is wrong.\n"
_LEAST_ERROR = 0.01


class CanaryProbe:
    """Of a task's first examples, and of the base alone, so that it is measured once for a subject.

    canary.empty, .newlines, .copied (the prompt), .options (all answers listed, where the task has
    a few): mean reward of that text less the base's mean reward; .errors behind it: how many
    standard errors of the pairs that is; .share: what it earns over the least that any of these
    texts or the base does, of what the gold answers earn over that (a weak base earns nothing, so
    that more than it is little).
    canary.gold: the gold answers' mean reward less the base's. canary.gold_right: share of the gold
    answers that count as right, where the task knows right from wrong.
    canary.last_answer: share of answers that count where a wrong one stands before the right one,
    less 1; under 0 the first answer is taken.
    canary.prompts_distinct: distinct prompts / examples.
    canary.identity: largest change of any metric by an adapter of zeros on the base.
    canary.baseline: |reported score of the base - mean reward measured here|, where one is given;
    canary.baseline.errors: how many standard errors that is.

    score, prompt: of the evaluation to be examined; None are the task's own. baseline: what it
    reports of the base, measured on the first `baseline_examples` of the split (None: on those that
    are looked at here) with as many tokens as `max_new_tokens`.
    """

    name = "canaries"
    measures = "whether empty, copied or listed answers earn what answers should, on a task"
    cost = "the base's answers on the task's examples, twice, once for a subject"

    def __init__(
        self,
        task: Task,
        split: Split = "test",
        limit: int = 16,
        *,
        score: Scorer | None = None,
        prompt: Prompter | None = None,
        baseline: float | None = None,
        baseline_examples: int | None = None,
        max_new_tokens: int = 64,
    ) -> None:
        self._task = task
        self._examples = tuple(task.examples(split)[:limit])
        self._score = score or task.score
        self._prompt = prompt or task.prompt
        self._baseline, self._of = baseline, baseline_examples
        self._max_new_tokens = max_new_tokens

    def measure(self, look: Look) -> dict[str, float]:
        if not self._examples:
            return {}
        return dict(look.subject.once(self, lambda: self._measured(look.subject)))

    def _measured(self, subject: Subject) -> dict[str, float]:
        earned = unearned(self._task, self._examples, self._score, self._prompt)
        values = {
            "last_answer": last_answer(self._task, self._examples, self._score),
            "gold_right": gold_right(self._task, self._examples, self._score),
            "prompts_distinct": distinct_prompts(self._examples, self._prompt),
        }
        if subject.has_base and not subject.only_kept:
            requests = [self._prompt(example) for example in self._examples]
            plain, same = base_answers(subject, requests, self._max_new_tokens)
            base = rewards(self._task, self._score, self._examples, plain)
            values |= compared(earned, base)
            if same is not None:
                values["identity"] = self._change(plain, same)
            if self._baseline is not None:
                values |= self._off(base, earned)
        else:
            values |= dict.fromkeys(earned, nan) | shares(earned)
        return {f"canary.{name}": value for name, value in values.items()}

    def _off(
        self, base: Sequence[float], earned: Mapping[str, Sequence[float]]
    ) -> dict[str, float]:
        off = abs((self._baseline or 0.0) - fmean(base))
        error = sampling_error(base, self._of, [one for own in earned.values() for one in own])
        return {"baseline": off, "baseline.errors": off / error}

    def _change(self, plain: Sequence[str], same: Sequence[str]) -> float:
        """The largest difference of any metric between two sets of answers."""
        before, after = (self._metrics(answers) for answers in (plain, same))
        return max(abs(before[name] - after[name]) for name in before)

    def _metrics(self, answers: Sequence[str]) -> dict[str, float]:
        own: Mapping[str, float] = {}
        if isinstance(self._task, Measured):
            own = self._task.metrics(list(zip(self._examples, answers, strict=True)))
        return {"reward": mean_reward(self._task, self._score, self._examples, answers), **own}


def unearned(
    task: Task, examples: Sequence[Example], score: Scorer, prompt: Prompter
) -> dict[str, list[float]]:
    """Rewards by kind of text without merit, of the form that earns most; and of the gold answers,
    where every example has one."""

    def best(*texts: Callable[[Example], str]) -> list[float]:
        made = [rewards(task, score, examples, [text(one) for one in examples]) for text in texts]
        return max(made, key=fmean)

    values = {
        "empty": best(lambda _: ""),
        "newlines": best(*(lambda _, n=n: "\n" * n for n in (1, 64))),
        "copied": best(lambda example: shown(prompt(example))),
    }
    golds = [task.gold(example) for example in examples]
    if None not in golds:
        values[GOLD] = rewards(task, score, examples, [str(gold) for gold in golds])
    if isinstance(task, Optioned):
        values["options"] = best(
            *(
                lambda example, s=s, d=d: s.join(list(task.answer_options(example))[::d])
                for s in ("/", ", ", " or ", "\n")
                for d in (1, -1)
            )
        )
    return values


def compared(earned: Mapping[str, Sequence[float]], base: Sequence[float]) -> dict[str, float]:
    """Of each kind its mean less the base's, `.errors` of that, and `shares`."""
    values = shares(earned, base)
    for name, own in earned.items():
        gaps = [a - b for a, b in zip(own, base, strict=True)]
        values[name] = fmean(gaps)
        if name != GOLD and len(gaps) > 1:
            scale = max(abs(value) for value in (*own, *base)) or 1.0
            error = max(stdev(gaps) / sqrt(len(gaps)), _LEAST_ERROR * scale)
            values[f"{name}.errors"] = fmean(gaps) / error
    return values


def shares(earned: Mapping[str, Sequence[float]], base: Sequence[float] = ()) -> dict[str, float]:
    """`.share` of each kind: what it earns over the least of all these and the base, of what gold
    earns over it; infinite where gold earns no more than that and it does. {} without gold."""
    if GOLD not in earned:
        return {}
    means = {name: fmean(own) for name, own in earned.items() if name != GOLD}
    least = min([*means.values(), *([fmean(base)] if base else [])])
    best = fmean(earned[GOLD]) - least
    found = {}
    for name, mean in means.items():
        over = mean - least
        found[f"{name}.share"] = over / best if best > 0 else inf if over > 0 else nan
    return found


def sampling_error(base: Sequence[float], of: int | None, others: Sequence[float]) -> float:
    """Standard error by which a mean over the first `of` examples may be off one over these of
    them; one answer that comes out otherwise in another kernel is always allowed for.

    others: rewards that other texts had. An answer of the least and one of the best are thought
    into the sample, since what never occurred in it may in the rest. The rest alone is unknown,
    hence the factor 1 - n / of.
    """
    n = len(base)
    low, high = min([*base, *others]), max([*base, *others])
    rest = max(0.0, 1 - n / of) if of is not None else 0.0
    return max(stdev([*base, low, high]) * sqrt(rest / n), (high - low) / n, _LEAST_ERROR)


def gold_right(task: Task, examples: Sequence[Example], score: Scorer) -> float:
    """Share of gold answers that count as right; NaN where the task does not say."""
    golds = [(example, task.gold(example)) for example in examples]
    told = [_correct(score, example, gold) for example, gold in golds if gold is not None]
    known = [bool(one) for one in told if one is not None]
    return fmean(known) if known else nan


def last_answer(task: Task, examples: Sequence[Example], score: Scorer) -> float:
    """Share of answers that are right where a wrong one stands before the gold, less 1.

    A gold answer that is right by its last line or word and wrong as a whole is such an answer by
    itself: its working stands before. Else only examples count whose gold is right behind other
    words too: a task that wants nothing but the answer, or a program, is no first-match. NaN where
    none does.
    """
    golds = [(example, task.gold(example)) for example in examples]
    right = []
    for at, (example, gold) in enumerate(golds):
        if gold is None or "```" in gold or not gold.split():
            continue
        if _correct(score, example, gold) is False:
            ends = (gold.strip().splitlines()[-1], gold.split()[-1])
            if any(_correct(score, example, end) for end in ends if end != gold):
                right.append(False)
            continue
        if not _correct(score, example, _LEAD + gold):
            continue
        others = (golds[(at + step) % len(golds)][1] for step in range(1, len(golds)))
        wrong = next((o for o in others if o and _correct(score, example, o) is False), None)
        if wrong is not None:
            right.append(bool(_correct(score, example, wrong + _TURN + gold)))
    return fmean(right) - 1 if right else nan


def distinct_prompts(examples: Sequence[Example], prompt: Prompter) -> float:
    """Distinct prompts / examples."""
    return len({shown(prompt(example)) for example in examples}) / len(examples)


def mean_reward(
    task: Task, score: Scorer, examples: Sequence[Example], answers: Sequence[str]
) -> float:
    """Of `rewards`."""
    return fmean(rewards(task, score, examples, answers))


def rewards(
    task: Task, score: Scorer, examples: Sequence[Example], answers: Sequence[str]
) -> list[float]:
    """The task's reward floor where scoring fails, as in an evaluation."""
    return [
        _reward(task, score, example, answer)
        for example, answer in zip(examples, answers, strict=True)
    ]


def shown(prompt: Prompt) -> str:
    """The words of a prompt."""
    return prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)


def _reward(task: Task, score: Scorer, example: Example, answer: str) -> float:
    try:
        reward = score(example, answer).reward
    except Exception:  # other people's code, and what is examined here
        return task.reward_floor
    return reward if isfinite(reward) else task.reward_floor


def _correct(score: Scorer, example: Example, answer: str) -> bool | None:
    try:
        return score(example, answer).correct
    except Exception:  # as in `_reward`
        return False


def base_answers(
    subject: Subject, requests: Sequence[Any], max_new_tokens: int
) -> tuple[list[str], list[str] | None]:
    """The base's greedy answers, and those with an adapter of zeros on it, by the same engine;
    None where it can add none (a quantised base)."""
    from loralab.engines.base import Request, Sampling
    from loralab.engines.batched import BatchedEngine

    sampling = Sampling(max_new_tokens)
    with subject.as_base() as causal:
        engine = BatchedEngine(causal, subject.tokenizer, backend="torch")

        def answers(adapter: str | None) -> list[str]:
            asked = [Request(one, adapter, sampling) for one in requests]
            return [made.text for made in engine.generate(asked)]

        plain, identity = answers(None), identity_adapter(causal)
        if identity is None:
            return plain, None
        engine.load({"identity": identity})
        return plain, answers("identity")


def identity_adapter(causal: Any) -> Any:
    """An adapter of zeros on every plain linear layer but the head, as engines take one; None
    where there is none (a quantised model)."""
    import torch

    from loralab.adapters.state import AdapterState, Factors
    from loralab.adapters.targets import linear_weights

    factors = {
        name: Factors(torch.ones(1, weight.shape[1]), torch.zeros(weight.shape[0], 1))
        for name, weight in linear_weights(causal).items()
        if weight.is_floating_point() and not _is_adapter(name)
    }
    return AdapterState(factors, 1.0) if factors else None


def _is_adapter(name: str) -> bool:
    """A layer that PEFT has put in beside the model's own."""
    return any(part.startswith(("lora_", "modules_to_save")) for part in name.split("."))
