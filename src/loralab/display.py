"""A running search in the terminal: generation, reward, best completion, time left.

In a terminal one live block is redrawn; anywhere else (a pipe, a log) each generation is one plain
line. What a model wrote is shown as text only: never as markup, never as control characters.
"""

from __future__ import annotations

from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from loralab.evolution.events import (
    Event,
    Finished,
    Generating,
    GenerationDone,
    Notice,
    Started,
)
from loralab.report.text import duration, number, share, visible

BARS = "▁▂▃▄▅▆▇█"
LONGEST = 240
"""Characters of the best completion that are shown."""


class Display:
    """Give it to `evolve` as `on_event`; use it as a context manager.

    console: where to draw. It goes to the error stream in the CLI, so that what a command prints
    can be piped.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._started: Started | None = None
        self._last: GenerationDone | None = None
        self._flight: Generating | None = None
        self._rewards: list[float] = []

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._live = Live(
                self._block(), console=self._console, refresh_per_second=4, transient=False
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __call__(self, event: Event) -> None:
        match event:
            case Started():
                self._started = event
                self._say(_opening(event))
            case Generating():
                self._flight = event
            case GenerationDone():
                self._last, self._flight = event, None
                self._rewards.append(event.reward_mean)
                if self._live is None:
                    self._say(_line(event))
            case Notice():
                self._say(visible(event.text))
            case Finished():
                self._flight = None
                if not event.complete:
                    self._say(f"stopped after {event.generation} generations")
        if self._live is not None:
            self._live.update(self._block())

    def _say(self, text: str) -> None:
        """A line that stays, above the live block."""
        self._console.print(Text(text), soft_wrap=True)

    def _block(self) -> RenderableType:
        started, last = self._started, self._last
        if started is None:
            return Text("loading the model …", style="dim")
        done = 0 if last is None else last.generation + 1
        if last is None and started.resumed_at is not None:
            done = started.resumed_at
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(f"generation {done}/{started.generations}", style="bold"),
            ProgressBar(total=started.generations, completed=self._progress(done), width=30),
            Text("" if last is None else f"{duration(last.time_left)} left"),
            Text("" if last is None else f"{last.tokens_per_second:,.0f} tokens/s", style="dim"),
        )
        if last is None:
            return head
        return Group(head, _numbers(last, self._rewards), _best(last))

    def _progress(self, done: int) -> float:
        flight = self._flight
        return done if flight is None or not flight.of else done + flight.done / flight.of


def _opening(event: Started) -> str:
    again = "" if event.resumed_at is None else f", resumed at generation {event.resumed_at}"
    return (
        f"{event.model} on {event.task}: {event.generations} generations of {event.members} "
        f"members x {event.prompts} prompts, kernel {event.kernel}{again}"
    )


def _line(event: GenerationDone) -> str:
    parts = [
        f"generation {event.generation + 1}/{event.of}",
        f"reward {number(event.reward_mean)} ± {number(event.reward_std)}",
        f"best {number(event.best_reward)} {_excerpt(event.best_completion, 40)!r}",
    ]
    if event.correct is not None:
        parts.append(f"correct {share(event.correct)}")
    if event.held_out is not None:
        parts.append(f"held-out {number(event.held_out)}")
    parts += [f"{duration(event.seconds)}", f"{duration(event.time_left)} left"]
    return "  ".join(parts)


def _numbers(event: GenerationDone, rewards: list[float]) -> RenderableType:
    line = Text()
    line.append("reward ", style="dim")
    line.append(f"{number(event.reward_mean)} ± {number(event.reward_std)}  ", style="bold")
    line.append(sparkline(rewards, 30) + "  ", style="cyan")
    if event.correct is not None:
        line.append("correct ", style="dim")
        line.append(f"{share(event.correct)}  ")
    if event.best_held_out is not None:
        line.append("best held-out ", style="dim")
        line.append(f"{number(event.best_held_out)}")
        if event.best_generation is not None:
            line.append(f" at generation {event.best_generation}", style="dim")
    return line


def _best(event: GenerationDone) -> RenderableType:
    body = Text()
    body.append(_excerpt(event.best_prompt, LONGEST) + "\n", style="dim")
    body.append(_excerpt(event.best_completion, LONGEST) or "(empty)")
    title = Text(f"best completion, reward {number(event.best_reward)}")
    return Panel(body, title=title, title_align="left", border_style="dim")


def _excerpt(text: str, longest: int) -> str:
    """One line of at most `longest` characters, without anything that steers a terminal."""
    line = visible(" ".join(text.split()), longest=10 * longest)
    return line if len(line) <= longest else line[: longest - 1] + "…"


def sparkline(values: list[float], width: int) -> str:
    """The last `width` values as bars between their lowest and highest."""
    shown = values[-width:]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    span = high - low or 1.0
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1))] for value in shown)
