"""What `loralab run` and `loralab demo` show of a run when it ends."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from loralab import pipeline
from loralab.config import load
from loralab.display import Display
from loralab.report.pretraining import summarise_pretraining
from loralab.report.summary import summarise
from loralab.report.text import change, duration, is_number, share
from loralab.report.training import summarise_training
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


def _say_how_to_go_on(run: Run, console: Console) -> None:
    console.print(
        Text(f"stopped early; continue with: loralab run --resume --run-dir {run.path}"),
        soft_wrap=True,
    )


def before_after(run: Run) -> str:
    """Training reward, held-out reward and held-out correctness, each before → after.

    Training reward is the population's mean on the training prompts, in the first and the last
    generation; held-out numbers are the unperturbed adapter's, before generation 0 and at the
    generation whose adapter was kept. Of a fine-tuning run: loss and held-out scores.
    """
    if run.config.get("kind") == "pretrain":
        return summarise_pretraining(run).line()
    if "training" in run.config:
        return summarise_training(run).line()
    summary = summarise(run)
    parts = [f"training reward {change(summary.reward.before, summary.reward.after)}"]
    if is_number(summary.held_out.before):
        parts.append(f"held-out {change(summary.held_out.before, summary.held_out.after)}")
    if is_number(summary.correct.before):
        parts.append(f"correct {share(summary.correct.before)} → {share(summary.correct.after)}")
    return ", ".join(parts)


def _times(run: Run) -> Table:
    table = Table(box=None, padding=(0, 2), show_edge=False)
    for title in ("phase", "time", "share", "calls"):
        table.add_column(title, justify="left" if title == "phase" else "right", style="dim")
    for row in Timings.load(run.timings_path).table():
        calls = str(row.calls) if row.calls else ""
        table.add_row(row.name, duration(row.seconds), f"{row.percent:.1f} %", calls)
    return table
