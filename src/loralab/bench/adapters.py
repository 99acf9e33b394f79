"""`loralab bench adapters`: the cost of a training step by kind of adapter, side by side.

One step is forward, backward and AdamW on one batch, on one core. The ways take turns in one
process and share the base model's weights; the floor is forward and backward (to the embeddings)
of the frozen base without any adapter, which no adapter can undercut. Ratios compare processor
time, round by round: being descheduled falls out of them, a crowded cache does not.
"""

from __future__ import annotations

import argparse
import copy
import gc
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from loralab.adapters.sine import SineLoraConfig
from loralab.adapters.spline import LSLoraConfig
from loralab.bench import command
from loralab.bench.command import Say, asked, bound, told
from loralab.bench.table import Cell, Section, Table
from loralab.bench.timing import (
    Lap,
    Timed,
    peak_in_child,
    peak_rss_gb,
    pin,
    ratio,
    seconds,
    take_turns,
)
from loralab.errors import UserError
from loralab.gradient import fast
from loralab.models.load import load

PAGE = Path("docs/bench-adapters.md")
QUICK: dict[str, Any] = {"tokens": 16, "laps": 1, "peaks": ()}
SEQUENCE = 256
"""Tokens of one sequence, at most."""


@dataclass(frozen=True)
class Row:
    """One way to train: the adapter's configuration class, None for none, and its forward."""

    label: str
    config: type[LoraConfig] | None
    fast: bool = False


FLOOR, FAST_LORA = "floor", "fast-lora"
ROWS = {
    FLOOR: Row("no adapter", None),
    "peft-lora": Row("LoRA, PEFT", LoraConfig),
    FAST_LORA: Row("LoRA, loralab", LoraConfig, fast=True),
    "peft-lslora": Row("LS-LoRA, PEFT and autograd", LSLoraConfig),
    "fast-lslora": Row("LS-LoRA, loralab", LSLoraConfig, fast=True),
    "peft-sinelora": Row("SineLoRA, PEFT and autograd", SineLoraConfig),
}


@dataclass(frozen=True)
class Options:
    """What to measure."""

    model: str = "smollm2"
    dtype: str = "bfloat16"
    tokens: int = 512
    rank: int = 16
    laps: int = 7
    rows: tuple[str, ...] = tuple(ROWS)
    peaks: tuple[str, ...] = tuple(ROWS)
    core: int | None = None


class Entrant:
    """A model with one kind of adapter, ready to take steps."""

    def __init__(self, name: str, base: Any, options: Options) -> None:
        self.row = ROWS[name]
        self.loss = float("nan")
        self.model = sharing_weights(base)
        self.ids = batch(self.model.config.vocab_size, options.tokens)
        self.optimizer: torch.optim.Optimizer | None = None
        if self.row.config is not None:
            self._adapt(self.row.config, options.rank)
        self.model.train()

    def _adapt(self, config: type[LoraConfig], rank: int) -> None:
        self.model = get_peft_model(
            self.model, config(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        )
        generator = torch.Generator().manual_seed(0)
        trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        for name, parameter in trained:
            noise = torch.randn(parameter.shape, generator=generator)
            if "lora_spline" in name:
                parameter.data += 0.005 * noise
            else:
                parameter.data.copy_(noise * (0.02 if "lora_B" in name else rank**-0.5 / 8))
        if self.row.fast:
            fast.patch(self.model)
            left = fast.report(self.model).left
            if left:
                raise RuntimeError(f"{self.row.label}: left to PEFT: {left}")
        self.optimizer = torch.optim.AdamW(
            [p for _, p in trained], lr=1e-6, weight_decay=0.0, fused=True
        )

    def step(self) -> None:
        """Forward, backward and update; without an adapter, backward to the embeddings."""
        embedded = self.model.get_input_embeddings()(self.ids)
        if self.optimizer is None:
            embedded.requires_grad_()
        loss: Tensor = self.model(inputs_embeds=embedded, labels=self.ids, use_cache=False).loss
        loss.backward()  # type: ignore[no-untyped-call]
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.loss = float(loss.detach())

    def lap(self) -> Lap:
        """One timed step."""
        gc.collect()
        cpu, start = time.process_time(), time.perf_counter()
        self.step()
        run, cpu = time.perf_counter() - start, time.process_time() - cpu
        return Lap(0.0, run, cpu, self.ids.numel())


def sharing_weights(model: Any) -> Any:
    """A copy of a model with modules of its own and the same parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def batch(vocabulary: int, tokens: int) -> Tensor:
    """Random ids (sequences, length): as few sequences of at most `SEQUENCE` as hold `tokens`."""
    sequences = -(-tokens // SEQUENCE)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (sequences, tokens // sequences), generator=generator)


def run(options: Options, base: Any = None, say: Say = lambda _: None) -> Table:
    """Measure, and make the table.

    base: a frozen model in place of `options.model`.

    Raises:
        UserError: an unknown row, a number that is too small, or a model that cannot be loaded.
    """
    command.check_counts(options)
    for name in (*options.rows, *options.peaks):
        if name not in ROWS:
            raise UserError(f"row {name!r} is unknown; expected of {', '.join(ROWS)}")
    if options.tokens < 2:
        raise UserError(f"tokens is {options.tokens}; expected 2 or more")
    core = pin(options.core)
    torch.set_num_threads(1)
    if base is None:
        base, _ = load(options.model, options.dtype)
    entrants = {name: Entrant(name, base, options) for name in options.rows}
    for name, entrant in entrants.items():
        entrant.step()
        say(f"{name}: loss {entrant.loss:.4f}")
    losses = {name: entrant.loss for name, entrant in entrants.items()}
    timed = take_turns(
        {name: entrant.lap for name, entrant in entrants.items()},
        options.laps,
        on_lap=lambda name, turn, lap: say(f"{name} {turn}: {lap.run:.3f} s, {lap.cpu:.3f} CPU"),
    )
    peaks = {name: _peak_in_child(name, options, say) for name in options.peaks}
    shape = next(iter(entrants.values())).ids.shape
    facts = command.facts(
        *("loralab", "torch", "transformers", "peft"),
        core=bound(core),
        step=(
            f"{' x '.join(map(str, shape))} tokens, {options.dtype}, {told(options.model)}; "
            f"adapters of rank {options.rank} on every linear of the decoder, kept in float32 "
            "(PEFT's default); AdamW, fused"
        ),
        laps=f"rows take turns; {options.laps} of each after one to warm up",
    )
    data = {
        "options": asked(options),
        "peak_gb": peaks,
        "rows": {
            name: {
                "loss": losses[name],
                "step_seconds": seconds(times),
                "ratios": {
                    reference: ratio(times, timed[reference])
                    for reference in (FLOOR, FAST_LORA)
                    if reference in timed
                },
                "laps": [asdict(lap) for lap in times.laps],
            }
            for name, times in timed.items()
        },
    }
    return Table("Adapters benchmark", facts, [_section(timed, losses, peaks)], data)


def peak_of(name: str, options: Options, base: Any = None) -> float:
    """Peak memory in GB of this process after two steps of one row."""
    torch.set_num_threads(1)
    if base is None:
        base, _ = load(options.model, options.dtype)
    entrant = Entrant(name, base, options)
    entrant.step()
    entrant.step()
    return peak_rss_gb()


def _peak_in_child(name: str, options: Options, say: Say) -> float:
    words = [
        *("--peak-of", name, "--model", options.model, "--dtype", options.dtype),
        *("--tokens", str(options.tokens), "--rank", str(options.rank)),
    ]
    peak = peak_in_child("loralab.bench.adapters", words, name)
    say(f"{name}: peak {peak:.2f} GB")
    return peak


def _section(
    timed: Mapping[str, Timed], losses: Mapping[str, float], peaks: Mapping[str, float]
) -> Section:
    rows: list[list[Cell]] = []
    for name, times in timed.items():
        runs = [lap.run for lap in times.laps]
        rows.append(
            [
                ROWS[name].label,
                seconds(times),
                f"{min(runs):.3g} to {max(runs):.3g}",
                *(
                    f"{ratio(times, timed[reference]):.3f}" if reference in timed else None
                    for reference in (FLOOR, FAST_LORA)
                ),
                f"{losses[name]:.4f}",
                peaks.get(name),
                f"{times.core_share:.0%}",
            ]
        )
    columns = [
        *("way", "step s", "fastest to slowest", "x no adapter", "x LoRA, loralab"),
        *("loss", "peak GB", "core"),
    ]
    notes = [
        "`step s`: median by the clock. Ratios: median over the rounds of processor time. `loss`: "
        "of the first step; the two ways to run one kind of adapter must agree up to bf16's "
        "rounding. `peak GB`: highest resident memory (10^9 bytes) of a fresh process that loads "
        "the model and takes two steps. `core`: share of the time in which the row had the core "
        "to itself."
    ]
    return Section("One training step", "", columns, rows, notes)


def _parser() -> argparse.ArgumentParser:
    default = Options()
    parser = argparse.ArgumentParser(prog="loralab bench adapters", description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="tiny sizes, one lap: does it all run?")
    add("--model", help=f"default {default.model}")
    add("--dtype", choices=["bfloat16", "float32"])
    add("--tokens", type=int, help=f"of a step, default {default.tokens}")
    add("--rank", type=int, help=f"default {default.rank}")
    add("--laps", type=int, help=f"steps of each row, default {default.laps}")
    add("--rows", nargs="+", metavar="NAME", help=f"of {', '.join(ROWS)}")
    add("--peaks", nargs="*", metavar="ROW", help="rows to measure the memory of; default all")
    add("--core", type=int, help="default: the last one")
    add("--out", type=Path, help=f"page to write, default {PAGE} (none with --quick or --json)")
    add("--json", type=Path, metavar="FILE", help="write the raw measurements here")
    add("--peak-of", choices=list(ROWS), help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; 0 when measured, 2 for what the user can mend."""
    return command.main(
        _parser(),
        argv,
        PAGE,
        lambda given, say: run(Options(**given), say=say),
        QUICK,
        lambda row, given: peak_of(row, Options(**given)),
    )


if __name__ == "__main__":
    sys.exit(main())
