"""How fine-tuning looks: the page and the terminal tell more than a falling loss."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from loralab.config import parse
from loralab.demo import before_after
from loralab.display import Display
from loralab.gradient.events import (
    Answered,
    Answering,
    Remark,
    StepDone,
    TrainingEnded,
    TrainingEvent,
    TrainingStarted,
)
from loralab.planning import plan
from loralab.report import build_report
from loralab.report.training import summarise_training
from loralab.run import Run

EVIL = "<script>alert(1)</script>[bold]x[/] \x1b[2J"
CONFIG = {
    "kind": "sft",
    "name": "views",
    "model": "smollm2",
    "task": {"name": "conciseness"},
    "training": {"steps": 20},
}


def write_run(path: Path, steps: int = 20, after: float | None = 1.0, examples: int = 12) -> Run:
    """A run whose loss falls from 3 to 1 and whose `after` share of answers is right."""
    with Run.create(path, CONFIG) as run:
        run.note(kernel="native", rows=100, rows_cut=3)
        run.log_metrics(
            {"step": 0, "phase": "before", "held_out_reward": 0.0, "held_out_correct": 0.0}
        )
        for step in range(1, steps + 1):
            run.log_metrics(
                {
                    "step": step,
                    "loss": 3.0 - 2.0 * (step - 1) / 19,
                    "grad_norm": 0.5,
                    "lr": 1e-4,
                    "tokens": 100 * step,
                    "tokens_per_second": 350.0,
                }
            )
        phases = [("before", 0, 0.0)]
        if after is not None:
            scores = {"held_out_reward": after, "held_out_correct": after, "failed": 0}
            run.log_metrics({"step": steps, "phase": "after", **scores})
            phases.append(("after", steps, after))
        for phase, step, share in phases:
            run.log_completions(
                [
                    {
                        "step": step,
                        "phase": phase,
                        "split": "test",
                        "example": f"test-{i}",
                        "prompt": "What?",
                        "gold": "That",
                        "completion": f"{EVIL} {phase}",
                        "reward": float(i < share * examples),
                        "correct": i < share * examples,
                    }
                    for i in range(examples)
                ]
            )
    return Run.open(path)


@pytest.mark.parametrize(
    ("after", "tone", "said"),
    [
        (1.0, "good", "Loss fell from 2.95 to 1.05 in 20 steps. Held-out reward rose from 0 to 1."),
        (1 / 12, "mixed", "That may be chance"),
        (0.0, "mixed", "Held-out reward stayed at 0. Correct answers stayed at 0 %."),
        (None, "open", "Nothing was answered after it yet"),
    ],
)
def test_the_verdict_is_about_the_answers(
    tmp_path: Path, after: float | None, tone: str, said: str
) -> None:
    verdict = summarise_training(write_run(tmp_path / "run", after=after)).verdict()
    assert verdict[0] == tone
    assert said in verdict[1]


def test_the_page_shows_what_there_is(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    page = build_report(run.path).read_text()
    for part in (
        "Held-out reward rose",
        "3 training rows are longer",
        "Over the steps",
        "first and last tenth of 20 steps",
        "2,000 in all",
        "&lt;script&gt;alert(1)&lt;/script&gt;",
    ):
        assert part in page
    assert "<script" not in page
    assert "eneration" not in page.split("Over the steps")[1].split("<h2>Config</h2>")[0]
    names = {file.stem for file in (run.path / "figures").iterdir()}
    assert names >= {"loss", "held_out", "grad_norm", "lr"}
    assert before_after(run) == "loss 2.95 → 1.05, held-out 0.00 → 1.00, correct 0 % → 100 %"


@pytest.mark.parametrize(("steps", "after"), [(0, None), (1, None), (7, None)])
def test_an_unfinished_run_has_a_page_too(tmp_path: Path, steps: int, after: None) -> None:
    run = write_run(tmp_path / "run", steps=steps, after=after)
    assert f"Unfinished: {steps} of 20 steps" in build_report(run.path).read_text()


def shown(events: list[TrainingEvent], terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=110, color_system=None)
    with Display(console) as display:
        for event in events:
            display(event)
    return out.getvalue()


EVENTS: list[TrainingEvent] = [
    Answering(3, 12),
    Answered(0, 0.1, 0.08, "What?", EVIL),
    TrainingStarted("smollm2", "gsm8k", 100, 21_000, 9_000, 4_884_480, 20, None),
    StepDone(1, 20, 1.25, 0.5, 2e-4, 349.0, 95.0),
    Remark(EVIL),
    TrainingEnded(False, 1),
]


@pytest.mark.parametrize("terminal", [False, True])
def test_the_terminal_shows_steps_and_answers_as_text(terminal: bool) -> None:
    text = shown(EVENTS, terminal)
    for part in (
        "base: held-out 0.1  correct 8.0 %",
        "21,000 tokens of which 9,000 learned",
        "349 tokens/s",
        "1.25",
        "stopped after 1 steps",
        "[bold]x[/]",
    ):
        assert part in text
    assert "\x1b[2J" not in text


def test_a_terminal_shows_an_evaluation_in_flight() -> None:
    text = shown([*EVENTS[1:4], Answering(3, 12)], True)
    for part in ("answering held-out prompts: 3/12", "step 1/20", "what the base answers"):
        assert part in text


def test_a_plan_needs_no_model() -> None:
    lines = plan(parse({**CONFIG, "training": {"steps": 20, "batch_size": 3}}, "c"))
    assert lines[0].startswith("task conciseness: 2 training and 8 test")
    assert lines[1].startswith("20 steps of 3 rows each")
    values: dict[str, Any] = {**CONFIG, "training": {"epochs": 1.5}}
    assert plan(parse(values, "c"))[1].startswith("1.5 epochs of 8 rows")
