"""A guard over a training: it looks at what the model does, says what is wrong, and can stop it.

    trainer = SFTTrainer(..., callbacks=[GuardCallback()])

works in any script of Transformers or TRL. Before the first step, after steps 1, 5, 10, 25, 50 and
then every n, and at the end, it measures (`probes`) and judges (`rules`). Between, it looks at each
step's raw loss and gradients.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from math import isfinite, nan
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, get_args

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loralab import ranks
from loralab.errors import UserError
from loralab.health.findings import Finding, Severity, Verdict, verdict
from loralab.health.guard_view import View
from loralab.health.ledger import Ledger
from loralab.health.pace import Pace
from loralab.health.reading import Reading
from loralab.health.rule import Rule
from loralab.health.rules import causes, judge
from loralab.health.snapshot import Snapshot, halve_learning_rate
from loralab.health.telling import lines
from loralab.health.trackers import Trackers
from loralab.health.training_watch import TrainingWatch, planned_dose

Action = Literal["warn", "stop", "rollback"]

_NAN: tuple[str, Severity] = ("numbers.nan", "fail")
_LOGGED = ("kl", "perplexity", "text.newlines", "text.looping", "loss.content", "guard.share")
"""Into `state.log_history`."""

_log = logging.getLogger("loralab.guard")


class GuardCallback(TrainerCallback):  # type: ignore[misc]
    """Watches the training of a model by any Trainer.

    prompts: what the model is asked at each look: Prompt, text or messages; None takes some of the
        shipped ones.
    action: of a failure: "warn" says so; "stop" ends the training, with the weights before a step
        that is no number; "rollback" goes back to the last healthy weights and optimiser state,
        halves the learning rate, and at the second failure goes back and stops. A failure that is
        seen at the end goes back too.
    every: steps between looks after step 50; None makes it as often as keeps the time of looking
        under `budget` of the time of training.
    rules: None takes all of `rules.RULES`.
    base: what the model is compared with; None takes the model without its adapter or, of a model
        without one, the model as it is before the first step.
    texts: False looks at numbers, gradients and weights alone, as for models that write no text.
    tokenizer: None takes the Trainer's.
    folder: where readings.jsonl and findings.jsonl go; None takes the Trainer's output_dir.
    tell: what is given each line for people; None logs it to "loralab.guard".

    readings, findings: of this training so far; trackers of `report_to` are sent them too. A model
    is left as it was found by each look, and random numbers are not touched: a training that is
    only watched ends in the same bits.

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
        self.action = action
        self._prompts, self._base, self._texts = prompts, base, texts
        self._rules, self._tokenizer = rules, tokenizer
        self._folder = None if folder is None else Path(folder)
        self._tell = tell or _log.warning
        self._pace = Pace(every, budget)
        self.readings: list[Reading] = []
        self.findings: list[Finding] = []
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
    def seconds(self) -> float:
        """Time spent looking."""
        return self._pace.seconds

    @property
    def share(self) -> float:
        """Time spent looking, of the time of training without it; NaN before there is any."""
        return self._pace.share

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        self._pace.begin(state.global_step)
        began = perf_counter()
        self._leads = state.is_world_process_zero
        folder = self._folder or Path(args.output_dir)
        self._ledger = Ledger(folder if self._leads else None)
        self._trackers = Trackers(
            args.report_to if self._leads else (), Path(args.output_dir), self._say
        )
        self.readings = self._ledger.resume(state.global_step)
        self.findings, self._standing = [], set[tuple[str, Severity]]()
        self._healthy: Snapshot | None = None
        self._rolled = self._halted = False
        self._from = 0
        self._sound = True
        model, optimizer = more["model"], more.get("optimizer")
        # How far a whole model has to move nobody can say; what an adapter starts with is known.
        dose = nan
        if any(hasattr(module, "lora_A") for module in model.modules()):
            dose = planned_dose(optimizer, more.get("lr_scheduler"), state.max_steps)
        self._watch = TrainingWatch(
            model, fp16=bool(args.fp16), planned=dose, steps=state.max_steps
        )
        self._watch.begin()
        self._watch.step = state.global_step
        self._view = View(
            more,
            args,
            state.global_step,
            texts=self._texts and self._leads,
            prompts=self._prompts,
            base=self._base,
            tokenizer=self._tokenizer,
            tell=self._say,
        )
        self._spend(began)
        self._look(state, control, more)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        step = state.global_step + 1
        watch = self._watching()
        mine = self._sound = watch.gradients_ready(
            compare=self._pace.due(step) or step >= state.max_steps
        )
        if ranks.world() > 1:
            self._sound = not ranks.agreed(not mine)
            # Another's loss: all count the same steps and find the same, or some would judge, and
            # ask the others, while those train on.
            watch.nonfinite += mine and not self._sound
        if self._halted or (not self._sound and self.action != "warn"):
            # Without gradients the optimiser leaves the weights as they are.
            for parameter in more["model"].parameters():
                parameter.grad = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        watch = self._watching()
        watch.step_done(state.global_step, state.epoch)
        # Here and not when all is over: checkpoints are yet to be written and trackers listen. A
        # best checkpoint that is loaded afterwards is not these weights.
        over = control.should_training_stop or state.global_step >= state.max_steps
        last = over and not args.load_best_model_at_end
        if last or self._pace.due(state.global_step):
            self._look(state, control, more, last)
        elif not self._sound and (self.action != "warn" or _NAN not in self._standing):
            values = watch.values(self._view.rows)
            self._judge([Reading(state.global_step, values, (), 0.0)], state, control, more, False)

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
        if self._pace.last < state.global_step:
            # The weights may be the best checkpoint's by now, which nobody is to overwrite.
            best = args.load_best_model_at_end and state.best_model_checkpoint is not None
            self._look(state, control, more, last=True, acts=not best)
        self._pace.end()
        self.close()
        self._say(
            f"guard: {self.verdict}; {len(self.readings)} looks took {self.seconds:.0f} s beside "
            f"{self._pace.training:.0f} s of training ({self.share:.1%})"
        )

    def close(self) -> None:
        """Take every hook out again; also where a training broke off."""
        if self._watch is not None:
            self._watch.end()
            self._trackers.close()

    def _look(
        self,
        state: TrainerState,
        control: TrainerControl,
        more: Any,
        last: bool = False,
        acts: bool = True,
    ) -> None:
        """Measure, write down, judge, and act."""
        began = perf_counter()
        watch = self._watching()
        reading = self._view.reading(
            state.global_step,
            lambda: watch.values(self._view.rows) | {"guard.share": self.share},
        )
        self.readings.append(reading)
        self._ledger.add(reading)
        self._judge(self.readings[self._from :], state, control, more, last=last, acts=acts)
        seconds = perf_counter() - began
        self._pace.looked(state.global_step, seconds)
        self.on_cost(seconds)

    def _judge(
        self,
        readings: Sequence[Reading],
        state: TrainerState,
        control: TrainerControl,
        more: Any,
        whole: bool = True,
        last: bool = False,
        acts: bool = True,
    ) -> None:
        """Of the newest reading. whole: it is a look's, so that what it does not show is over.
        last: no step follows. acts: does what a failure asks for, and does not only tell it."""
        found = judge(readings, self._rules)
        fresh = [one for one in found if (one.rule, one.severity) not in self._standing]
        now = {(one.rule, one.severity) for one in found}
        self._standing = now if whole else self._standing | now
        self.findings += fresh
        self._ledger.report(fresh)
        self._trackers.look(readings[-1], found, fresh)
        for line in (line for one in fresh for line in lines(one)):
            self._say(line)
        row = {name: readings[-1].values.get(name, nan) for name in _LOGGED}
        state.log_history.append(
            {f"guard_{name}": v for name, v in row.items() if isfinite(v)}
            | {"step": state.global_step, "guard_findings": len(found)}
        )
        failed = any(one.severity == "fail" for one in found)
        if ranks.world() > 1:
            failed = ranks.agreed(failed)
        if not failed:
            if self.action == "rollback" and whole and not last:
                self._healthy = Snapshot(more["model"], more.get("optimizer"), state.global_step)
        elif acts and self.action != "warn" and not self._halted:
            self._act(state, control, more, last)

    def _act(self, state: TrainerState, control: TrainerControl, more: Any, last: bool) -> None:
        done = "" if last else f"stopped after step {state.global_step}"
        stops = True
        if self.action == "rollback" and self._healthy is not None:
            step = self._healthy.step
            self._healthy.restore(more["model"], more.get("optimizer"))
            done = f"went back to the weights of step {step}"
            stops = self._rolled or last
            if not stops:
                halve_learning_rate(more["optimizer"], more.get("lr_scheduler"))
                self._rolled = True
                # What came of the weights that are gone is not held against those that are back.
                self._standing.clear()
                self._from = len(self.readings)
                self._watching().forget(step)
            if not last:
                done += " and stopped" if stops else " and halved the learning rate"
        if stops:
            self._halted = True
            control.should_training_stop = True
        if done:
            self._say(f"guard: {done}")

    def _spend(self, began: float) -> None:
        seconds = perf_counter() - began
        self._pace.spent(seconds)
        self.on_cost(seconds)

    def _say(self, line: str) -> None:
        if self._leads:
            self._tell(line)

    def _watching(self) -> TrainingWatch:
        assert self._watch is not None, "on_train_begin comes first"
        return self._watch


def _nothing(seconds: float) -> None:
    """No one times the steps."""
