"""What `loralab run` and `loralab demo` show of a run when it ends."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from loralab import pipeline
from loralab.config import load
from loralab.display import Display
from loralab.report.line import before_after
from loralab.report.stages import cells, header, read_table
from loralab.report.text import duration
from loralab.run import Run
from loralab.timings import Timings


def demo(overrides: Sequence[str], run_dir: str | None, console: Console) -> bool:
    """Evolve the packaged model on conciseness; True if it ran to its end.

    Raises:
        UserError: an override is wrong, or the run cannot be made.
    """
    from pathlib import Path

    config = load("demo", overrides)
    directory = Path(run_dir) if run_dir else pipeline.default_directory(config.name)
    with Display(console) as display:
        run, result = pipeline.start(config, directory, display)
    say_end(run, result.complete, console)
    return result.complete


def say_end(run: Run, complete: bool, console: Console) -> None:
    """The table of times, one line from before to after, and where the report is."""
    if run.config.get("kind") == "ablation":
        _say_ablation(run, complete, console)
        return
    if run.config.get("kind") == "pipeline":
        _say_stages(run, complete, console)
        return
    if run.config.get("kind") == "eval":
        console.print(Text(f"numbers  {run.path / 'eval.json'}"), soft_wrap=True)
        if not complete:
            _say_how_to_go_on(run, console)
        return
    console.print(_times(run))
    console.print(Text(before_after(run), style="bold"), soft_wrap=True)
    whole = run.path / "model"
    kept = f"model    {whole}" if whole.is_dir() else f"adapter  {run.adapter}"
    console.print(Text(kept), soft_wrap=True)
    console.print(Text(f"report   {run.path / 'report.html'}"), soft_wrap=True)
    if not complete:
        _say_how_to_go_on(run, console)


def _say_ablation(run: Run, complete: bool, console: Console) -> None:
    table = run.path / "ablation.md"
    if table.exists():
        console.print(Text(table.read_text(encoding="utf-8")), soft_wrap=True)
    console.print(Text(f"table    {table}"), soft_wrap=True)
    if not complete:
        _say_how_to_go_on(run, console)


def _say_stages(run: Run, complete: bool, console: Console) -> None:
    found = read_table(run)
    if found is not None:
        shown = Table(box=None, padding=(0, 2), show_edge=False)
        for number, title in enumerate(header(found)[:-1]):  # the last is long
            shown.add_column(title, justify="left" if number < 2 else "right", style="dim")
        for row in found["rows"]:
            shown.add_row(*map(Text, cells(row, found["columns"])[:-1]))
        console.print(shown)
    console.print(Text(f"report   {run.path / 'report.html'}"), soft_wrap=True)
    if not complete:
        _say_how_to_go_on(run, console)


def _say_how_to_go_on(run: Run, console: Console) -> None:
    console.print(
        Text(f"stopped early; continue with: loralab run --resume --run-dir {run.path}"),
        soft_wrap=True,
    )


def _times(run: Run) -> Table:
    table = Table(box=None, padding=(0, 2), show_edge=False)
    for title in ("phase", "time", "share", "calls"):
        table.add_column(title, justify="left" if title == "phase" else "right", style="dim")
    for row in Timings.load(run.timings_path).table():
        calls = str(row.calls) if row.calls else ""
        table.add_row(row.name, duration(row.seconds), f"{row.percent:.1f} %", calls)
    return table
