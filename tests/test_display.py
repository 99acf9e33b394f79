"""The live display: everything is there, and model text is text."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from loralab.display import Display, sparkline
from loralab.evolution.events import (
    Event,
    Finished,
    Generating,
    GenerationDone,
    Notice,
    Started,
)

EVIL = "[bold]Moon[/] \x1b[2J\x1b]0;owned\x07 \u202eetihw [/nonsense]\r\nmore"
STARTED = Started("smollm2", "conciseness", "torch", 20, 30, 2, None)


def done(generation: int, reward: float, completion: str = "The Moon.") -> GenerationDone:
    return GenerationDone(
        generation=generation,
        of=20,
        reward_mean=reward,
        reward_std=31.25,
        reward_max=reward + 40,
        correct=0.62,
        best_prompt="What causes the tides?",
        best_completion=completion,
        best_reward=-1.0,
        held_out=-77.5,
        best_held_out=-70.25,
        best_generation=3,
        seconds=4.5,
        tokens_per_second=812.0,
        time_left=83.0,
    )


def shown(events: list[Event], terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, color_system=None)
    with Display(console) as display:
        for event in events:
            display(event)
    return out.getvalue()


def test_a_log_gets_one_plain_line_a_generation() -> None:
    text = shown([STARTED, Generating(0, 3, 60), done(0, -187.0), done(1, -150.0)], False)
    lines = text.splitlines()
    assert len(lines) == 3
    for part in ("2/20", "−150", "± 31.2", "The Moon.", "62 %", "−77.5", "83.0 s left"):
        assert part in lines[2]


def test_a_terminal_gets_generation_reward_completion_and_time_left() -> None:
    text = shown([STARTED, done(0, -187.0), Generating(1, 30, 60)], True)
    for part in ("generation 1/20", "−187", "The Moon.", "What causes", "83.0 s left", "62 %"):
        assert part in text
    for part in ("812 tokens/s", "−70.2", "at generation 3"):
        assert part in text


@pytest.mark.parametrize("terminal", [False, True])
def test_model_text_is_neither_markup_nor_control(terminal: bool) -> None:
    text = shown([STARTED, done(0, -187.0, EVIL), Notice(EVIL)], terminal)
    assert "[bold]Moon[/]" in text
    assert "[/nonsense]" in text
    for control in ("\x1b[2J", "\x1b]0;", "\x07", "\u202e"):
        assert control not in text


def test_a_stop_and_a_resumption_are_said() -> None:
    again = Started("smollm2", "conciseness", "torch", 20, 30, 2, 7)
    text = shown([again, done(7, -99.0), Finished(False, 8)], False)
    assert "resumed at generation 7" in text
    assert "stopped" in text


def test_a_sparkline_goes_from_lowest_to_highest() -> None:
    assert sparkline([1.0, 2.0, 3.0], 10) == "▁▅█"
    assert sparkline([5.0] * 3, 2) == "▁▁"
    assert sparkline([], 5) == ""
