"""A guard over a training: it looks at what the model does, says what is wrong, and can stop it.

    trainer = SFTTrainer(..., callbacks=[GuardCallback()])

works in any script of Transformers or TRL. Before the first step, after steps 1, 5, 10, 25, 50 and
then every n, and at the end, it measures (`probes`) and judges (`rules`). Between, it looks at each
step's raw loss and gradients.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from math import ceil, isfinite, nan
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, get_args

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loralab import ranks
from loralab.errors import UserError
from loralab.health.data import DataProbe
from loralab.health.divergence import DivergenceProbe, OwnDivergenceProbe
from loralab.health.findings import Finding, Severity, Verdict, verdict
from loralab.health.ledger import Ledger
from loralab.health.look import Probe, Subject, measure
from loralab.health.prompts import shipped_prompts
from loralab.health.reading import Reading
from loralab.health.rule import Rule
from loralab.health.rules import causes, judge
from loralab.health.setup import setup_values
from loralab.health.snapshot import Snapshot, halve_learning_rate
from loralab.health.still import has_adapter
from loralab.health.text import TextProbe
from loralab.health.token_classes import TokenClassProbe
from loralab.health.training_rows import shape_values, training_rows
from loralab.health.training_watch import TrainingWatch, planned_dose
from loralab.health.weights import WeightProbe

Action = Literal["warn", "stop", "rollback"]

FIRST = (1, 5, 10, 25, 50)
"""Steps after which it always looks, beside the start and the end."""
LEAST = 25
"""Steps between two looks later, at least, unless `every` says less."""
PROMPTS = 12
"""Of the shipped prompts, two of each kind: a look has to cost little."""
TOKENS = 48
"""Of each completion."""
DATA_ROWS = 256
"""Training rows that are looked at, from the beginning."""

_log = logging.getLogger("loralab.guard")


class GuardCallback(TrainerCallback):  # type: ignore[misc]
    """Watches the training of a model by any Trainer.

    prompts: what the model is asked at each look: Prompt, text or messages; None takes PROMPTS of
        the shipped ones.
    action: of a failure: "warn" says so; "stop" ends the training, with the weights before a step
        that is no number; "rollback" goes back to the last healthy weights and optimiser state,
        halves the learning rate, and at the second failure goes back and stops.
    every: steps between looks after step 50; None makes it as often as keeps the time of looking
        under `budget` of the time of training.
    rules: None takes all of `rules.RULES`.
    base: what the model is compared with; None takes the model without its adapter or, of a model
        without one, the model as it is before the first step.
    texts: False looks at numbers, gradients and weights alone, as for models that write no text.
    tokenizer: None takes the Trainer's.
    folder: where readings.jsonl and findings.jsonl go; None takes the Trainer's output_dir.
    tell: what is given each line for people; None logs it to "loralab.guard".

    readings, findings: of this training so far. A model is left as it was found by each look, and
    random numbers are not touched: a training that is only watched ends in the same bits.

    Raises:
        UserError: an action, every or budget that there is not.
    """

    def __init__(
        self,
        prompts: Sequence[Any] | None = None,
        action: Action = "warn",
        every: int | None = None,
        budget: float = 0.03,
        rules: Sequence[Rule] | None = None,
        *,
        base: Any = None,
        texts: bool = True,
        tokenizer: Any = None,
        folder: str | Path | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        if action not in get_args(Action):
            raise UserError(f"action is {action!r}; expected one of {', '.join(get_args(Action))}")
        if every is not None and every < 1:
            raise UserError(f"every is {every}; expected 1 step or more, or None")
        if not 0 < budget <= 1:
            raise UserError(f"budget is {budget}; expected a share of the time, over 0 and up to 1")
        self.action, self.every, self.budget = action, every, budget
        self._prompts = shipped_prompts()[:PROMPTS] if prompts is None else prompts
        self._rules, self._base, self._texts = rules, base, texts
        self._tokenizer, self._folder = tokenizer, None if folder is None else Path(folder)
        self._tell = tell or _log.warning
        self.readings: list[Reading] = []
        self.findings: list[Finding] = []
        self.seconds = 0.0
        self.on_cost: Callable[[float], None] = _nothing
        """Told the seconds of each look, by a trainer that times its steps."""
        self._watch: TrainingWatch | None = None

    @property
    def verdict(self) -> Verdict:
        """Over all that was found."""
        return verdict(self.findings)

    @property
    def causes(self) -> tuple[str, ...]:
        """The likeliest causes of all that was found, best first."""
        return causes(self.findings)

    @property
    def share(self) -> float:
        """Time spent looking, of the time of training without it."""
        spent = perf_counter() - self._began - self.seconds if self._watch is not None else 0.0
        return self.seconds / spent if spent > 0 else nan

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        self._began, self.seconds = perf_counter(), 0.0
        began = self._began
        self._leads = state.is_world_process_zero
        self._ledger = Ledger((self._folder or Path(args.output_dir)) if self._leads else None)
        self.readings = self._ledger.resume(state.global_step)
        self.findings, self._standing = [], set[tuple[str, Severity]]()
        self._healthy: Snapshot | None = None
        self._rolled = self._halted = False
        self._next: int | None = None
        self._from = 0
        self._sound = True
        self._first = self._last = state.global_step
        self._costs: list[float] = []
        model, optimizer = more["model"], more.get("optimizer")
        self._facts = setup_values(model, optimizer)
        self._rows, self._data = self._looked_at_data(more.get("train_dataloader"), args, more)
        self._probes: tuple[Probe, ...] = (
            TextProbe(),
            DivergenceProbe(),
            OwnDivergenceProbe(),
            TokenClassProbe(),
        )
        self._weights = WeightProbe()
        # How far a whole model has to move nobody can say; what an adapter starts with is known.
        dose = nan
        if any(hasattr(module, "lora_A") for module in model.modules()):
            dose = planned_dose(optimizer, more.get("lr_scheduler"), state.max_steps)
        self._watch = TrainingWatch(
            model, fp16=bool(args.fp16), planned=dose, steps=state.max_steps
        )
        self._watch.begin()
        self._watch.step = state.global_step
        self._subject = self._subject_of(model, args, state.global_step, more)
        self._spend(began)
        self._look(state, control, more)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        watch = self._watching()
        self._sound = watch.gradients_ready(compare=self._due(state.global_step + 1))
        if ranks.world() > 1:
            self._sound = not ranks.agreed(not self._sound)
        if self._halted or (not self._sound and self.action != "warn"):
            # Without gradients the optimiser leaves the weights as they are.
            for parameter in more["model"].parameters():
                parameter.grad = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        watch = self._watching()
        watch.step_done(state.global_step, state.epoch)
        if self._due(state.global_step):
            self._look(state, control, more)
        elif not self._sound and (self.action != "warn" or _NAN not in self._standing):
            reading = Reading(state.global_step, watch.values(self._rows), (), 0.0)
            self._judge([reading], state, control, more, whole=False)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if self._watch is not None and logs is not None and "loss" in logs:
            self._watch.logged(state.global_step, logs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        if self._watch is None:
            return
        if self._last < state.global_step:
            self._look(state, control, more, acting=False)
        self.close()
        cost = f"{self.share:.1%}" if isfinite(self.share) else "-"
        self._say(f"guard: {self.verdict}; {len(self.readings)} looks took {cost} of the training")

    def close(self) -> None:
        """Take every hook out again; also where a training broke off."""
        if self._watch is not None:
            self._watch.end()

    def _look(
        self, state: TrainerState, control: TrainerControl, more: Any, acting: bool = True
    ) -> None:
        """Measure, write down, judge, and act."""
        began = perf_counter()
        reading = self._measured(state.global_step, more["model"])
        self._last = state.global_step
        self.readings.append(reading)
        self._ledger.add(reading)
        self._spend(began)
        self._costs.append(perf_counter() - began)
        self._judge(self.readings[self._from :], state, control, more, acting=acting)
        self._plan(state)

    def _measured(self, step: int, model: Any) -> Reading:
        began = perf_counter()
        values: dict[str, float] = {}
        examples: tuple[Any, ...] = ()
        if self._subject is not None:
            try:
                seen = measure(self._subject.look(), self._probes, step)
            except torch.OutOfMemoryError:
                self._say("guard: no memory left to look at texts; numbers and weights are")
                self._subject = None
            else:
                values, examples = dict(seen.values), seen.examples
        values |= self._weights.measure_model(model)
        values |= self._facts | self._data | self._watching().values(self._rows)
        values["guard.share"] = self.share
        return Reading(step, values, examples, perf_counter() - began)

    def _judge(
        self,
        readings: Sequence[Reading],
        state: TrainerState,
        control: TrainerControl,
        more: Any,
        *,
        acting: bool = True,
        whole: bool = True,
    ) -> None:
        """whole: the reading is a look's, so that what it does not show is over."""
        found = judge(readings, self._rules)
        fresh = [one for one in found if (one.rule, one.severity) not in self._standing]
        now = {(one.rule, one.severity) for one in found}
        self._standing = now if whole else self._standing | now
        self.findings += fresh
        self._ledger.report(fresh)
        for one in fresh:
            self._announce(one)
        row = {name: readings[-1].values.get(name, nan) for name in _LOGGED}
        state.log_history.append(
            {f"guard_{name}": v for name, v in row.items() if isfinite(v)}
            | {"step": state.global_step, "guard_findings": len(found)}
        )
        failed = any(one.severity == "fail" for one in found)
        if ranks.world() > 1:
            failed = ranks.agreed(failed)
        if not failed:
            if self.action == "rollback" and whole:
                self._healthy = Snapshot(more["model"], more.get("optimizer"), state.global_step)
        elif acting and self.action != "warn":
            self._act(state, control, more)

    def _act(self, state: TrainerState, control: TrainerControl, more: Any) -> None:
        if self.action == "rollback" and self._healthy is not None:
            self._healthy.restore(more["model"], more.get("optimizer"))
            if not self._rolled:
                halve_learning_rate(more["optimizer"], more.get("lr_scheduler"))
                self._rolled = True
                # What came of the weights that are gone is not held against those that are back.
                self._standing.clear()
                self._from = len(self.readings)
                self._watching().forget(self._healthy.step)
                self._say(
                    f"guard: went back to the weights of step {self._healthy.step} and halved the "
                    "learning rate"
                )
                return
            self._say(f"guard: went back to the weights of step {self._healthy.step} and stopped")
        else:
            self._say(f"guard: stopped after step {state.global_step}")
        self._halted = True
        control.should_training_stop = True

    def _announce(self, finding: Finding) -> None:
        mark = "FAIL" if finding.severity == "fail" else "warn"
        self._say(f"{mark} step {finding.step} {finding.rule}: {finding.message}")
        if finding.severity == "fail":
            self._say(f"     {finding.cause}: {finding.advice}")
            for example in finding.examples[:1]:
                self._say(
                    f"     writes {_short(example.completion)}, its base {_short(example.base)}"
                )

    def _say(self, line: str) -> None:
        if self._leads:
            self._tell(line)

    def _due(self, step: int) -> bool:
        if step <= FIRST[-1]:
            return step in FIRST
        return self._next is not None and step - self._last >= self._next

    def _plan(self, state: TrainerState) -> None:
        """Steps until the next look after the first ones."""
        if self.every is not None:
            self._next = self.every
            return
        steps = state.global_step - self._first
        if steps < 1:
            return
        training = perf_counter() - self._began - self.seconds
        # The first look makes the base's numbers too, which are kept.
        cost = sum(self._costs[1:]) / max(1, len(self._costs) - 1)
        wanted = float(max(LEAST, ceil(cost * steps / (self.budget * training))))
        self._next = ceil(ranks.summed([wanted])[0] / ranks.world())

    def _spend(self, began: float) -> None:
        seconds = perf_counter() - began
        self.seconds += seconds
        self.on_cost(seconds)

    def _watching(self) -> TrainingWatch:
        assert self._watch is not None, "on_train_begin comes first"
        return self._watch

    def _subject_of(
        self, model: Any, args: TrainingArguments, step: int, more: Any
    ) -> Subject | None:
        tokenizer = self._tokenizer_of(more)
        if not self._texts or not self._leads:
            return None
        if tokenizer is None or ranks.sharding() is not None:
            why = "no tokenizer was given" if tokenizer is None else "its weights are sharded"
            self._say(f"guard: looks at numbers and weights alone, {why}")
            return None
        if _output_head(model) is None:
            self._say("guard: looks at numbers and weights alone, the model writes no text")
            return None
        base = self._base
        # A whole model that goes on from a checkpoint is not what it began as: no base then.
        if base is None and not has_adapter(model) and step == 0:
            base = "now"
        try:
            return Subject(
                model,
                tokenizer,
                prompts=self._prompts,
                base=base,
                seed=args.seed,
                max_new_tokens=TOKENS,
            )
        except UserError as error:
            self._say(f"guard: looks at numbers and weights alone: {error}")
            return None

    def _looked_at_data(
        self, loader: Any, args: TrainingArguments, more: Any
    ) -> tuple[int | None, dict[str, float]]:
        """How many rows there are, and `data.*` of the first ones; {} where they are not tokens."""
        count, tokens = training_rows(loader, DATA_ROWS)
        tokenizer = self._tokenizer_of(more)
        if not tokens or tokenizer is None or not self._leads or not self._texts:
            return count, {}
        probe = DataProbe(tokens, tokenizer, getattr(args, "max_length", None))
        values = probe.measure_model(more["model"]) | shape_values(tokens)
        # Of all rows, not of those that were looked at.
        values.pop("data.rows", None)
        return count, values

    def _tokenizer_of(self, more: Any) -> Any:
        own = self._tokenizer or more.get("processing_class")
        return getattr(own, "tokenizer", own)


_NAN: tuple[str, Severity] = ("numbers.nan", "fail")
_LOGGED = ("kl", "perplexity", "text.newlines", "text.looping", "loss.content", "guard.share")


def _output_head(model: Any) -> Any:
    ask = getattr(model, "get_output_embeddings", None)
    try:
        return None if ask is None else ask()
    except NotImplementedError:
        return None


def _short(text: str) -> str:
    cut = text if len(text) <= 60 else f"{text[:60]}..."
    return repr(cut)


def _nothing(seconds: float) -> None:
    """No one times the steps."""
