"""`loralab bench collapse`: the newline collapse from end to end, and the run that works after it.

HumanEval and MBPP become (prompt, solution) pairs. A collator that pads solutions on the left with
the token of a newline, and leaves the padding among the labels, is the fault: most of what is
learned is newlines, in training and validation rows alike, so both losses fall while the text
empties. The second run learns the same pairs without the padding, as the guard's advice says.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from loralab import config as configs
from loralab import durable
from loralab.bench.table import Cell, Section, Table
from loralab.bench.timing import machine, versions
from loralab.config import SftConfig
from loralab.data.convert import convert
from loralab.data.sources import read_rows
from loralab.errors import UserError
from loralab.gradient.rows import Row
from loralab.health.causes import CAUSES
from loralab.health.findings import Finding
from loralab.health.reading import Reading
from loralab.health.rules import causes

PAGE = Path("docs/collapse.md")
CONFIG = Path("benchmarks/faults/collapse.yaml")
RUNS = ("collapse", "mended")
LENGTH = 160
"""Tokens that the fault pads each solution to."""
_EACH = 10
_LOSSES, _TEXTS, _DONE = "losses.jsonl", "texts.jsonl", "done.json"
_SHOWN = ("text.newlines", "text.whitespace", "kl", "loss.all", "text.eos_rate")


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is not trained yet, write the page and its JSON."""
    given = list(sys.argv[1:] if argv is None else argv)
    options = parser().parse_args(given)
    work = Path(options.work)
    if not options.table_only:
        if not options.data:
            raise UserError("bench collapse: --data is missing; expected HumanEval and MBPP files")
        config = configs.load(options.config, options.override)
        if not isinstance(config, SftConfig):
            raise UserError(f"{options.config}: kind is {config.kind}; expected sft")
        for name in RUNS:
            if not (work / name / _DONE).is_file():
                train(config, options.data, name, work / name)
    shown = shlex.join(Path(word).name if word.startswith("/") else word for word in given)
    made = page({name: work / name for name in RUNS}, f"`loralab bench collapse {shown}`")
    made.write(Path(options.page))
    print(options.page)
    return 0


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog="loralab bench collapse", description=__doc__)
    add = made.add_argument
    add("--data", nargs="+", metavar="FILE", help="HumanEval's and MBPP's rows, as published")
    add("--work", default="runs/bench-collapse", metavar="DIR")
    add("--config", default=str(CONFIG), metavar="FILE", help="model, adapter and training")
    add("--override", action="append", default=[], metavar="KEY=VALUE", help="of the config")
    add("--page", default=str(PAGE), metavar="FILE")
    add("--table-only", action="store_true", help="of the runs that are there")
    return made


def padded(row: Row, newline: int, length: int = LENGTH) -> Row:
    """A row whose answer stands behind so many newlines that it is `length` tokens long, all of
    them learned: the fault."""
    start = next(at for at, label in enumerate(row.labels) if label >= 0)
    answer = row.input_ids[start:]
    filled = (newline,) * max(0, length - len(answer)) + answer
    return Row(row.input_ids[:start] + filled, row.labels[:start] + filled)


def train(config: SftConfig, files: Sequence[str], name: str, folder: Path) -> None:
    """One run into a folder: losses, texts and the guard's own files; begun anew if it stopped."""
    from loralab.adapters.attach import attach
    from loralab.gradient import sft
    from loralab.gradient.held_out import mean_loss
    from loralab.gradient.rows import RowEncoder
    from loralab.health.guard import GuardCallback
    from loralab.health.look import Subject
    from loralab.health.prompts import Prompt
    from loralab.models.load import load

    if folder.is_dir():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    model, tokenizer = load(config.model, config.dtype, config.device)
    pairs = [row for file in files for row in convert(read_rows(file)).rows]
    encoder = RowEncoder(tokenizer)
    rows = [encoder.encode(pair["prompt"], pair["solution"]) for pair in pairs]
    if name == "collapse":
        newline = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
        rows = [padded(row, newline) for row in rows]
    most = config.training.max_length
    rows = [Row(row.input_ids[:most], row.labels[:most]) for row in rows]
    learned = [row for at, row in enumerate(rows) if at % _EACH and row.learned]
    held = [row for row in rows[::_EACH] if row.learned][: config.evaluation.limit]
    assert config.adapter is not None
    peft = attach(model, config.adapter, config.seed)
    asked = [Prompt(text=pair["prompt"], good=pair["solution"]) for pair in pairs[::_EACH][:3]]
    subject = Subject(
        peft, tokenizer, prompts=asked, max_new_tokens=config.generation.max_new_tokens
    )
    guard = GuardCallback(tokenizer=tokenizer, folder=folder)

    def tried(step: int) -> None:
        loss = mean_loss(model, held, config.training.batch_size)
        durable.append_line(folder / _LOSSES, {"step": step, "held_out": loss})
        for prompt, made in zip(asked, subject.complete(base=False), strict=True):
            text = {"step": step, "prompt": prompt.text, "text": made.text}
            durable.append_line(folder / _TEXTS, text)

    tried(0)
    history = sft.train(
        peft,
        tokenizer,
        learned,
        config.training,
        config.seed,
        [guard, _every(config.evaluation.every or 25, tried)],
    )
    for step, loss in enumerate(history.losses, 1):
        durable.append_line(folder / _LOSSES, {"step": step, "training": loss})
    peft.save_pretrained(folder / "adapter", save_embedding_layers=False)
    share = sum(row.learned for row in learned)
    facts = {"rows": len(learned), "learned": share, "guard_share": guard.share}
    durable.write_whole(folder / _DONE, json.dumps(facts) + "\n")


def _every(steps: int, do: Any) -> Any:
    from transformers import TrainerCallback

    class Every(TrainerCallback):  # type: ignore[misc]
        """Tries the model every so many steps."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % steps == 0 or state.global_step == state.max_steps:
                do(state.global_step)

    return Every()


def page(runs: Mapping[str, Path], command: str) -> Table:
    """The story of the two runs."""
    sections = []
    data: dict[str, Any] = {}
    for name, path in runs.items():
        if not (path / _DONE).is_file():
            raise UserError(f"bench collapse: no finished run in {path}; leave out --table-only")
        readings = [Reading.from_json(row) for row in durable.read_lines(path / "readings.jsonl")]
        found = [Finding.from_json(row) for row in durable.read_lines(path / "findings.jsonl")]
        losses = durable.read_lines(path / _LOSSES)
        texts = durable.read_lines(path / _TEXTS)
        sections += [_course(name, losses, found), _looks(name, readings), _texts(name, texts)]
        sections.append(_told(name, found))
        data[name] = {"losses": losses, "texts": texts, "findings": [f.to_json() for f in found]}
    facts = {
        "command": command,
        "versions": ", ".join(f"{k} {v}" for k, v in versions("loralab", "peft", "trl").items()),
        "machine": machine(),
        "date": date.today().isoformat(),
    }
    return Table("The newline collapse", facts, sections, data)


def _course(name: str, losses: Sequence[Mapping[str, Any]], found: Sequence[Finding]) -> Section:
    training = {row["step"]: row["training"] for row in losses if "training" in row}
    held = {row["step"]: row["held_out"] for row in losses if "held_out" in row}
    rows: list[list[Cell]] = [
        [step, training.get(max(1, step)), loss] for step, loss in held.items()
    ]
    fails = [one for one in found if one.severity == "fail"]
    first = f"The guard's first FAIL: step {fails[0].step}, {fails[0].rule}." if fails else ""
    ranked = [f"{cause} ({CAUSES[cause]})" for cause in causes(found)[:2]]
    said = f"Likeliest causes: {'; '.join(ranked)}." if ranked else "The guard found nothing."
    columns = ["step", "training loss", "held-out loss"]
    notes = [line for line in (first, said) if line]
    return Section(f"{name}: the losses", "Nats a learned token.", columns, rows, notes)


def _looks(name: str, readings: Sequence[Reading]) -> Section:
    rows: list[list[Cell]] = [
        [one.step, *(_number(one.values.get(value)) for value in _SHOWN)] for one in readings
    ]
    return Section(f"{name}: what the guard measured", "", ["step", *_SHOWN], rows)


def _texts(name: str, texts: Sequence[Mapping[str, Any]]) -> Section:
    rows: list[list[Cell]] = [
        [row["step"], json.dumps(row["prompt"][-50:]), json.dumps(row["text"][:160])]
        for row in texts
    ]
    return Section(f"{name}: the text", "", ["step", "asked", "writes"], rows)


def _told(name: str, found: Sequence[Finding]) -> Section:
    rows: list[list[Cell]] = [
        [one.step, one.severity.upper(), one.rule, one.message, one.cause, one.advice]
        for one in found
    ]
    columns = ["step", "", "rule", "measured", "cause", "advice"]
    return Section(f"{name}: what the guard said", "" if rows else "Nothing.", columns, rows)


def _number(value: float | None) -> float | None:
    return None if value is None or value != value else float(value)
