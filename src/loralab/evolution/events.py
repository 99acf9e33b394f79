"""What a live display is told while a search runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Started:
    """Everything is loaded. resumed_at: the generation that comes next, None for a new run."""

    model: str
    task: str
    kernel: str
    generations: int
    members: int
    prompts: int
    resumed_at: int | None


@dataclass(frozen=True)
class Generating:
    """Completions of the generation in flight that are done."""

    generation: int
    done: int
    of: int


@dataclass(frozen=True)
class GenerationDone:
    """A generation is in the journal.

    generation: counts from 0. rewards are over members (means over prompts); correct is a share.
    best_*: the single rollout of this generation with the highest reward. held_out: of the
    unperturbed adapter before this generation's update, None where it was not measured.
    seconds: of this generation. time_left: seconds, from the generations of this session.
    """

    generation: int
    of: int
    reward_mean: float
    reward_std: float
    reward_max: float
    correct: float | None
    best_prompt: str
    best_completion: str
    best_reward: float
    held_out: float | None
    best_held_out: float | None
    best_generation: int | None
    seconds: float
    tokens_per_second: float
    time_left: float


@dataclass(frozen=True)
class Notice:
    """Something the user should read, in one line."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The search ended, or stopped at a signal (then `complete` is False)."""

    complete: bool
    generation: int


Event = Started | Generating | GenerationDone | Notice | Finished
OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Tell no one."""
