"""A run in the terminal: generation or step, reward or loss, a completion, time left.

In a terminal one live block is redrawn; anywhere else (a pipe, a log) each generation or step is
one plain line. What a model wrote is shown as text only: never as markup, never as control
characters.
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
from loralab.gradient.events import (
    Answered,
    Answering,
    Evaluated,
    Remark,
    StepDone,
    TrainingEnded,
    TrainingEvent,
    TrainingStarted,
)
from loralab.report.text import duration, number, share, visible

BARS = "▁▂▃▄▅▆▇█"
LONGEST = 240
"""Characters of the best completion that are shown."""


class Display:
    """Give it to `evolve` or `fine_tune` as `on_event`; use it as a context manager.

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
        self._training = _Training()

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

    def __call__(self, event: Event | TrainingEvent) -> None:
        match event:
            case (
                TrainingStarted() | StepDone() | Answering() | Answered() | Evaluated()
                | Remark() | TrainingEnded()
            ):  # fmt: skip
                for line in self._training.take(event, live=self._live is not None):
                    self._say(line)
            case Started():
                # A stage of a pipeline comes after another one, which may have been a training.
                self._started, self._last, self._training = event, None, _Training()
                self._rewards.clear()
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
        if self._training.began:
            return self._training.block()
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


class _Training:
    """What is known of a fine-tuning run so far."""

    def __init__(self) -> None:
        self._started: TrainingStarted | None = None
        self._last: StepDone | None = None
        self._answered: Answered | None = None
        self._evaluated: Evaluated | None = None
        self._answering: Answering | None = None
        self._losses: list[float] = []

    @property
    def began(self) -> bool:
        return self._started is not None or self._answering is not None

    def take(self, event: TrainingEvent, live: bool) -> list[str]:
        """Note an event; the lines to say about it."""
        match event:
            case TrainingStarted():
                self._started, self._last = event, None
                self._losses.clear()
                return [_training_opening(event)]
            case StepDone():
                self._last, self._answering = event, None
                self._losses.append(event.loss)
                return [] if live else [_step_line(event)]
            case Answering():
                self._answering = event
                return []
            case Answered():
                self._answered, self._answering = event, None
                return [_answered_line(event)]
            case Evaluated():
                self._evaluated = event
                return [_evaluated_line(event)]
            case Remark():
                return [visible(event.text)]
            case TrainingEnded():
                self._answering = None
                return [] if event.complete else [f"stopped after {event.step} steps"]

    def block(self) -> RenderableType:
        started, last = self._started, self._last
        if started is None:
            return Text(self._asking() or "loading the model …", style="dim")
        done = last.step if last is not None else started.resumed_at or 0
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(f"step {done}/{started.steps}", style="bold"),
            ProgressBar(total=started.steps, completed=done, width=30),
            Text("" if last is None else f"{duration(last.time_left)} left"),
            Text("" if last is None else f"{last.tokens_per_second:,.0f} tokens/s", style="dim"),
        )
        parts: list[RenderableType] = [head]
        if last is not None:
            line = Text("loss ", style="dim")
            line.append(f"{number(last.loss)}  ", style="bold")
            line.append(sparkline(self._losses, 30), style="cyan")
            line.append(f"  gradient {number(last.grad_norm)}", style="dim")
            parts.append(line)
        if self._answering is not None:
            parts.append(Text(self._asking(), style="dim"))
        if self._answered is not None:
            parts.append(_answer_panel(self._answered))
        if self._evaluated is not None:
            parts.append(_text_panel(self._evaluated))
        return Group(*parts)

    def _asking(self) -> str:
        asked = self._answering
        return "" if asked is None else f"answering held-out prompts: {asked.done}/{asked.of}"


def _training_opening(event: TrainingStarted) -> str:
    again = "" if event.resumed_at is None else f", resumed after step {event.resumed_at}"
    tokens = f"{event.tokens:,} tokens of which {event.learned:,} learned, " * bool(event.tokens)
    return (
        f"{event.model} on {event.task}: {event.rows:,} rows, {tokens}"
        f"{event.parameters:,} parameters trained, {event.steps:,} steps{again}"
    )


def _step_line(event: StepDone) -> str:
    return (
        f"step {event.step}/{event.of}  loss {number(event.loss)}  gradient "
        f"{number(event.grad_norm)}  lr {event.lr:.3g}  {event.tokens_per_second:,.0f} tokens/s  "
        f"{duration(event.time_left)} left"
    )


def _answered_line(event: Answered) -> str:
    who = "base" if event.step == 0 else f"step {event.step}"
    correct = "" if event.correct is None else f"  correct {share(event.correct)}"
    return f"{who}: held-out {number(event.reward)}{correct}  {_excerpt(event.completion, 60)!r}"


def _evaluated_line(event: Evaluated) -> str:
    held = "" if event.loss is None else f"held-out loss {number(event.loss)}  "
    return f"step {event.step}: {held}{_excerpt(event.prompt + event.text, 80)!r}"


def _text_panel(event: Evaluated) -> RenderableType:
    body = Text()
    body.append(_excerpt(event.prompt, LONGEST) + " ", style="dim")
    body.append(_excerpt(event.text, LONGEST) or "(empty)")
    title = Text(f"step {event.step}, held-out loss {number(event.loss)}")
    return Panel(body, title=title, title_align="left", border_style="dim")


def _answer_panel(event: Answered) -> RenderableType:
    body = Text()
    body.append(_excerpt(event.prompt, LONGEST) + "\n", style="dim")
    body.append(_excerpt(event.completion, LONGEST) or "(empty)")
    who = "the base" if event.step == 0 else f"step {event.step}"
    title = Text(f"what {who} answers, held-out {number(event.reward)}")
    return Panel(body, title=title, title_align="left", border_style="dim")


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
