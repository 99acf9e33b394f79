"""A run in one line: what it is about, before → after."""

from __future__ import annotations

from loralab.report.pretraining import summarise_pretraining
from loralab.report.summary import summarise
from loralab.report.text import change, is_number, share
from loralab.report.training import summarise_training
from loralab.run import Run


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
