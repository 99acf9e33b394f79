"""The doctor: is this adapter sound or broken, why, and what is to be done.

`diagnose` looks at a model in memory, `diagnose_adapter` at what lies on disk. Faults of the files
come first: what cannot be loaded is told in a line and not run.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

from loralab.adapters.spline_diagnostics import count_outside, spline_layers
from loralab.errors import UserError
from loralab.health.canaries import CanaryProbe
from loralab.health.causes import CAUSES, MENDS
from loralab.health.data import DataProbe
from loralab.health.divergence import DivergenceProbe, OwnDivergenceProbe
from loralab.health.findings import Example, Finding, Verdict, verdict
from loralab.health.loading_files import load_adapter
from loralab.health.look import Probe, Subject, measure
from loralab.health.parity import ParityProbe
from loralab.health.prompts import Prompt, as_prompts, task_prompts
from loralab.health.reading import Reading
from loralab.health.reading_files import AdapterFiles, read_adapter
from loralab.health.rules import causes, judge
from loralab.health.text import TextProbe
from loralab.health.token_classes import TokenClassProbe
from loralab.health.weights import WeightProbe, active_adapter
from loralab.models.load import load
from loralab.tasks.base import Task

_NO_TEXT = {"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM"}
"""PEFT's task types of models that are not asked to go on with a text."""

_INTRUDERS = 4
_TASK_PROMPTS = 16
_SHOWN = 110

_TOLD = (
    ("weights.delta_ratio.max", "largest ||dW|| / ||W||"),
    ("weights.effective_rank.mean", "mean effective rank"),
    ("kl", "KL from the base"),
    ("loss.all", "loss on known-good text"),
    ("text.looping", "completions that repeat"),
    ("parity.merge", "merged off unmerged by"),
)
"""What the report tells of a sound adapter too."""


@dataclass(frozen=True)
class Report:
    """What the doctor found.

    subject: a path, or what was in memory. kind: PEFT's type of the adapter, "MLX", "model", or
    "config". base: the base model's name. readings: what was measured; the last was judged.
    notes: what is worth knowing and no fault, and what could not be examined. seconds: it took.
    """

    subject: str
    kind: str
    base: str | None
    findings: tuple[Finding, ...]
    readings: tuple[Reading, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def verdict(self) -> Verdict:
        """ "sound", "suspect" (warnings alone) or "broken"."""
        return verdict(self.findings)

    @property
    def sound(self) -> bool:
        """Not broken; there may be warnings."""
        return self.verdict != "broken"

    @property
    def causes(self) -> tuple[str, ...]:
        """Ids of `loralab.health.causes.CAUSES`, the likeliest first."""
        return causes(self.findings)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "subject": self.subject,
            "kind": self.kind,
            "base": self.base,
            "verdict": self.verdict,
            "sound": self.sound,
            "causes": [
                {"cause": c, "what": CAUSES.get(c, c), "mend": MENDS.get(c, "")}
                for c in self.causes
            ],
            "findings": [finding.to_json() for finding in self.findings],
            "readings": [reading.to_json() for reading in self.readings],
            "notes": list(self.notes),
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def diagnose(
    model: Any,
    tokenizer: Any,
    *,
    base: Any = None,
    subject: str | None = None,
    base_name: str | None = None,
    prompts: Sequence[Any] | None = None,
    task: Task | None = None,
    data: Callable[[Any], DataProbe] | None = None,
    values: Mapping[str, float] | None = None,
    parity: ParityProbe | None = None,
    step: int = 0,
    seed: int = 0,
    max_new_tokens: int = 48,
) -> Report:
    """Look at a model in memory, beside its base, and judge.

    model: a PeftModel, or any causal language model. base: as for `Subject`. prompts: None takes
    the shipped ones; a task adds its own, and its canaries. data: makes a probe of rows, given the
    tokenizer. values: more for the reading, such as {"train.step": 0.0} of a model before its
    training.

    Raises:
        UserError: the model cannot be looked at (virtual tokens, an encoder-decoder).
    """
    began = time.perf_counter()
    asked = as_prompts(prompts)
    if task is not None:
        asked = (*asked, *_of_task(task))
    looked = Subject(
        model, tokenizer, prompts=asked, base=base, seed=seed, max_new_tokens=max_new_tokens
    )
    adapter = active_adapter(model)
    probes: list[Probe] = [
        DivergenceProbe(),
        OwnDivergenceProbe(),
        TextProbe(),
        TokenClassProbe(),
        WeightProbe(intruders=_INTRUDERS),
        parity or ParityProbe(),
    ]
    rows = None if data is None else data(tokenizer)
    if rows is not None:
        probes.append(rows)
    if task is not None:
        probes.append(CanaryProbe(task))
    with _counted(model, adapter):
        reading = measure(looked.look(), probes, step)
    if values:
        reading = replace(reading, values={**reading.values, **values})
    config = getattr(model, "peft_config", {}).get(adapter) if adapter else None
    kind = str(getattr(config, "peft_type", "model")).rpartition(".")[2]
    named = base_name or getattr(config, "base_model_name_or_path", None)
    return Report(
        subject or type(model).__name__,
        kind,
        named if isinstance(named, str) else None,
        judge([reading]),
        (reading,),
        (*_data_notes(rows), *_advice(reading)),
        time.perf_counter() - began,
    )


def diagnose_adapter(
    path: Path,
    base: Any = None,
    tokenizer: Any = None,
    *,
    dtype: str = "bfloat16",
    device: str = "auto",
    quantization: Any = None,
    **options: Any,
) -> Report:
    """Examine an adapter on disk: of PEFT, LS-LoRA and SineLoRA among its types, or of mlx-lm.

    base: the name of a model as for `loralab.load`, or a model in memory, which stays as it is
    (and needs `tokenizer`); None takes the one that the adapter's config names. options: those of
    `diagnose`.

    Raises:
        UserError: there is no adapter, its weights are pickles, or its base cannot be had.
    """
    began = time.perf_counter()
    files = read_adapter(path)
    named = base if isinstance(base, str) else files.base

    def report(
        findings: Sequence[Finding], notes: Sequence[str] = (), readings: Sequence[Reading] = ()
    ) -> Report:
        return Report(
            str(path),
            files.kind,
            named,
            tuple(findings),
            tuple(readings),
            tuple(notes),
            time.perf_counter() - began,
        )

    if not files.readable:
        return report(files.faults)
    task_type = str(files.config.get("task_type") or "")
    if task_type in _NO_TEXT:
        return report(
            files.faults, [f"only the files were examined: task_type is {task_type}, which no text"]
        )
    model, tokenizer = _base(files, base, tokenizer, dtype, device, quantization)
    loaded = load_adapter(model, files)
    if loaded.model is None:
        return report((*files.faults, *loaded.faults))
    parity = ParityProbe(missing=len(loaded.missing), unexpected=len(loaded.unexpected))
    found = diagnose(loaded.model, tokenizer, parity=parity, **options)
    findings = [_named(one, loaded.missing, loaded.unexpected) for one in found.findings]
    notes = [*loaded.notes, *_base_notes(files, base), *found.notes]
    return report((*files.faults, *findings), notes, found.readings)


def _base(
    files: AdapterFiles, base: Any, tokenizer: Any, dtype: str, device: str, quantization: Any
) -> tuple[Any, Any]:
    if base is not None and not isinstance(base, str):
        if tokenizer is None:
            raise UserError("a base in memory needs its tokenizer: doctor(..., tokenizer=...)")
        return copy.deepcopy(base), tokenizer
    name = base or files.base
    if name is None:
        raise UserError(
            f"{files.directory}: its config names no base model; say which it is: --base MODEL"
        )
    try:
        model, own = load(name, dtype, device, quantization)
    except UserError as error:
        if base is not None:
            raise
        raise UserError(f"{error}; if the base is elsewhere, say where: --base MODEL") from error
    return model, tokenizer or own


def _base_notes(files: AdapterFiles, base: Any) -> Iterator[str]:
    if isinstance(base, str) and files.base is not None and base != files.base:
        yield f"its config names the base {files.base}; it was examined on {base}"


def _of_task(task: Task) -> tuple[Prompt, ...]:
    split = task_prompts(task, "test", _TASK_PROMPTS)
    return split or task_prompts(task, "train", _TASK_PROMPTS)


@contextmanager
def _counted(model: Any, adapter: str | None) -> Iterator[None]:
    """Splines count what falls outside their grid while the model is looked at."""
    has_spline = adapter is not None and bool(spline_layers(model, adapter))
    with count_outside(model, adapter) if adapter and has_spline else nullcontext():
        yield


def _named(finding: Finding, missing: Sequence[str], unexpected: Sequence[str]) -> Finding:
    """The finding with the first of the tensors it counts."""
    of = {"parity.keys_missing": missing, "parity.keys_unexpected": unexpected}.get(finding.rule)
    if not of:
        return finding
    return replace(finding, message=f"{finding.message}, first {of[0]}")


def _data_notes(data: DataProbe | None) -> tuple[str, ...]:
    facts = None if data is None else data.facts
    if facts is None:
        return ()
    notes = []
    for name, token in (("top_token", facts.top_token), ("excess_token", facts.excess_token)):
        share = facts.values.get(f"data.{name}_share", facts.values.get(f"data.{name}"))
        if token is not None and share is not None:
            what = "most learned token" if name == "top_token" else "most above the base's share"
            notes.append(f"data: {what} {token!r}, {share:.1%}")
    if facts.template is not None:
        notes.append(f"data: rows are in the chat template of {facts.template}")
    if facts.places:
        notes.append(f"data: evaluated rows stand at {', '.join(facts.places[:3])}")
    return tuple(notes)


def _advice(reading: Reading) -> tuple[str, ...]:
    """What is worth knowing and proves nothing: healthy trainings have it too."""
    count = reading.values.get("weights.intruders", 0.0)
    if not count:
        return ()
    dimensions = "dimension" if count == 1 else "dimensions"
    return (
        f"advice: {count:.0f} intruder {dimensions} in the {_INTRUDERS} most changed modules: "
        "leading directions of W + dW unlike any of W's (arXiv:2410.21228); such models forget "
        "more of what the base knew, and a higher rank or a lower learning rate leaves fewer",
    )


def _lines(report: Report) -> Iterator[str]:
    yield f"{report.subject}: {report.verdict.upper()}"
    on = f" on {report.base}" if report.base else ""
    yield f"  {report.kind}{on}, examined in {report.seconds:.0f} s"
    for number, cause in enumerate(report.causes[:2]):
        word = "likely cause" if number == 0 else "or"
        yield f"  {word}: {cause}: {CAUSES.get(cause, cause)}"
    shown: list[Example] = []
    for finding in report.findings:
        yield f"  {finding.severity.upper()} {finding.rule}: {_line(finding.message, 400)}"
        yield f"    do: {finding.advice}"
        shown += [one for one in finding.examples if one not in shown]
    for example in shown[:2]:
        yield f"  asked:     {_line(example.prompt)}"
        yield f"    writes:    {_line(example.completion)}"
        yield f"    its base:  {_line(example.base)}"
    values = report.readings[-1].values if report.readings else {}
    told = [
        f"{what} {values[name]:.3g}" for name, what in _TOLD if isfinite(values.get(name, _NAN))
    ]
    if told:
        yield f"  measured: {', '.join(told)}"
    for note in report.notes:
        yield f"  note: {_line(note, 400)}"


_NAN = float("nan")


def _line(text: str, longest: int = _SHOWN) -> str:
    """One line that cannot steer a terminal."""
    told = text.replace("\n", "\\n").replace("\t", "\\t")
    told = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in told)
    return told if len(told) <= longest else told[: longest - 3] + "..."
