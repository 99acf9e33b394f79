"""`loralab bench collapse`: the newline collapse from end to end, and the run that works after it.

HumanEval and MBPP become (prompt, solution) pairs. Solutions are padded to one length on the left,
as prompts are for generation, with a newline for the padding token, and the padding is left among
the labels: that is the fault. Most of what is learned is newlines, in training and validation rows
alike, so both losses fall while the text empties. The second run learns the same pairs with the
newlines taken out, as the guard's advice says.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from loralab import config as configs
from loralab import durable
from loralab.bench import command
from loralab.bench.collapse_page import BASE, DONE, LOSSES, PADDED, PAGE, TEXTS, page
from loralab.bench.collapse_problems import Problem, problems_of, score
from loralab.config import SftConfig
from loralab.errors import UserError
from loralab.gradient.rows import Row
from loralab.health.text import newline_share

CONFIG = Path("benchmarks/faults/collapse.yaml")
RUNS = (PADDED, "mended", BASE)
LENGTH = 128
"""Tokens that the fault pads each solution to."""
_EACH = 10
"""Of so many pairs one is held out."""


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
            if not (work / name / DONE).is_file():
                tell(f"bench collapse: {name}")
                run(config, problems_of(options.data), name, work / name)
    shown = shlex.join(["loralab", "bench", "collapse", *map(command.told, given)])
    made = page({name: work / name for name in RUNS}, f"`{shown}`")
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


def run(config: SftConfig, problems: Sequence[Problem], name: str, folder: Path) -> None:
    """One run into a folder: losses, texts and the guard's own files; begun anew if it stopped.

    The one named BASE trains nothing and is scored alone, beside the published solutions.
    """
    from loralab.adapters.attach import attach
    from loralab.gradient.rows import RowEncoder
    from loralab.health.look import Subject
    from loralab.health.prompts import Prompt
    from loralab.models.load import load

    if folder.is_dir():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    model, tokenizer = load(config.model, config.dtype, config.device)
    assert config.adapter is not None
    peft = attach(model, config.adapter, config.seed)
    held = problems[::_EACH]

    def complete(asked: Sequence[Problem]) -> list[str]:
        prompts = [Prompt(text=one.prompt, good=one.solution) for one in asked]
        longest = config.generation.max_new_tokens
        subject = Subject(peft, tokenizer, prompts=prompts, max_new_tokens=longest)
        return [made.text for made in subject.complete(base=False)]

    facts: dict[str, Any] = {}
    if name == BASE:
        facts["gold"] = score(held, [one.solution for one in held], tests=True)
    else:
        encoder = RowEncoder(tokenizer)
        rows = [encoder.encode(one.prompt, one.solution) for one in problems]
        facts |= _train(config, peft, tokenizer, problems, rows, name, folder, complete)
        peft.save_pretrained(folder / "adapter", save_embedding_layers=False)
    facts["score"] = score(held, complete(held), tests=True)
    durable.write_whole(folder / DONE, json.dumps(facts) + "\n")


def _train(
    config: SftConfig,
    peft: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    clean: Sequence[Row],
    name: str,
    folder: Path,
    complete: Callable[[Sequence[Problem]], list[str]],
) -> dict[str, Any]:
    """Train on nine pairs of ten, clean or padded, with the guard on; what there is to say of it.

    Between, the rest is tried: its loss as this run would measure it, its loss without padding,
    and what the model writes.
    """
    from loralab.gradient import sft
    from loralab.gradient.held_out import mean_loss
    from loralab.health.guard import GuardCallback

    wanted, settings = config.guard, config.training
    if wanted is None:
        raise UserError("bench collapse: guard is null; expected a guard, which it is about")
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    rows = [padded(row, newline) for row in clean] if name == PADDED else clean
    rows, clean = (
        [Row(row.input_ids[: settings.max_length], row.labels[: settings.max_length]) for row in of]
        for of in (rows, clean)
    )
    learned = [row for at, row in enumerate(rows) if at % _EACH and row.learned]
    usable = [
        (one, row, own)
        for one, row, own in zip(problems[::_EACH], rows[::_EACH], clean[::_EACH], strict=True)
        if own.learned
    ]
    # From all over, as the files stand one behind the other.
    limit = config.evaluation.limit or len(usable)
    tried = usable[:: max(1, len(usable) // limit)][:limit]

    def look(step: int) -> None:
        asked = [one for one, _, _ in tried]
        texts = complete(asked)
        found = score(asked, texts, tests=False)
        size = settings.batch_size
        clean_loss = mean_loss(peft, [own for _, _, own in tried], size)
        own_loss = clean_loss
        if name == PADDED:
            own_loss = mean_loss(peft, [row for _, row, _ in tried], size)
        losses = {"held_out": own_loss, "clean": clean_loss}
        durable.append_line(folder / LOSSES, {"step": step, **losses, **found})
        durable.append_lines(
            folder / TEXTS,
            [
                {"step": step, "prompt": one.prompt, "text": text}
                for one, text in zip(asked, texts, strict=True)
            ],
        )
        tell(f"step {step}: {losses}, {found}")

    guard = GuardCallback(
        wanted.prompts,
        wanted.action,
        wanted.every,
        wanted.budget,
        tokenizer=tokenizer,
        folder=folder,
        tell=tell,
    )
    look(0)
    every = _every(config.evaluation.every or 25, look)
    history = sft.train(peft, tokenizer, learned, settings, config.seed, [guard, every])
    for step, loss in enumerate(history.losses, 1):
        durable.append_line(folder / LOSSES, {"step": step, "training": loss})
    tokens = [label for row in learned for label in row.labels if label >= 0]
    breaks = {token for token in set(tokens) if newline_share(tokenizer.decode([token])) == 1}
    return {
        "rows": len(learned),
        "learned": len(tokens),
        "newlines": fmean(token in breaks for token in tokens),
        "guard_share": guard.share,
    }


def _every(steps: int, do: Callable[[int], None]) -> Any:
    from transformers import TrainerCallback

    class Every(TrainerCallback):  # type: ignore[misc]
        """Tries the model every so many steps."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % steps == 0 or state.global_step == state.max_steps:
                do(state.global_step)

    return Every()


def tell(line: str) -> None:
    """For who waits for it."""
    print(line, file=sys.stderr, flush=True)
