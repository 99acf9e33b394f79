"""From a journal back to the search: its first state, and any state after."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loralab import config as configs
from loralab.adapters.state import AdapterState
from loralab.adapters.truncate import Truncation, truncate
from loralab.errors import UserError
from loralab.evolution.adapter_space import AdapterSpace
from loralab.evolution.journal import Contents, Entry, Header, read
from loralab.evolution.space import Space
from loralab.evolution.start import START, Start, is_drawn, start_adapter
from loralab.evolution.strategy import SearchState, begin, tell
from loralab.evolution.weight_space import WeightSpace
from loralab.run import Run


@dataclass(frozen=True)
class Replayed:
    """What `save_generation` wrote. truncation: in weights mode, what a LoRA adapter loses."""

    generation: int
    digest: str
    adapter: Path
    truncation: Truncation | None


def first_state(
    header: Header, folder: Path, sample: Mapping[str, Tensor] | None = None
) -> SearchState:
    """The state before generation 0, from the header, and from `start/` if it was initialised.

    folder: the run directory. sample: some rows of each base weight, for `WeightSpace` to measure
    what rounding absorbs.
    """
    config = configs.parse_evolve(header.config, "the journal's header")
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[config.dtype]
    sigmas = {name: float.fromhex(text) for name, text in header.sigmas.items()}
    options, adapter = config.evolution, config.adapter
    space: Space
    if options.noise_on == "weights":
        space = WeightSpace(
            header.shapes, sigmas, dtype, options.noise_rank, config.model, sample or {}
        )
    else:
        if is_drawn(config):
            start = Start(
                start_adapter(header.shapes, adapter.rank, adapter.alpha, header.seed, config.model)
            )
        else:
            start = Start.read(folder / START)
        on_a = options.noise_on == "AB"
        space = AdapterSpace(start.adapter, sigmas, dtype, on_a, start.taken)
    return begin(options, space, header.seed, header.reward_floor)


def states(
    contents: Contents, first: SearchState, upto: int | None = None
) -> Iterator[tuple[SearchState, Entry | None]]:
    """Every state from generation 0 on, each with the entry that leads onward from it.

    The last state's entry is None if it is where the journal (or `upto`) ends.

    Raises:
        UserError: a state's digest is not the one in the journal.
    """
    header, entries = contents.header, contents.entries[:upto]
    state = first
    _verify(header, state, header.start)
    for entry in entries:
        yield state, entry
        state = tell(state, None, entry.fitness)
        _verify(header, state, entry.digest)
    yield state, None


def replay(run: Run, generation: int | None = None) -> SearchState:
    """The state of a generation (0 is the start, None the last), bit-identical to the run's.

    Raises:
        UserError: the journal does not reach that far, or cannot be trusted.
    """
    return state_of(read(run.journal_path), run.path, generation)


def state_of(contents: Contents, folder: Path, generation: int | None = None) -> SearchState:
    """As `replay`, of a journal that has been read, in its run directory."""
    reached = len(contents.entries)
    wanted = reached if generation is None else generation
    if not 0 <= wanted <= reached:
        damage = f" ({contents.damage})" if contents.damage else ""
        raise UserError(f"generation is {wanted}; the journal holds 0 to {reached}{damage}")
    for state, entry in states(contents, first_state(contents.header, folder), upto=wanted):
        if entry is None:
            return state
    raise AssertionError("states always ends in one without an entry")


def save_generation(run: Run, generation: int | None, out: Path) -> Replayed:
    """Write the adapter of a generation to a new or empty directory, in PEFT's format.

    In weights mode it is the nearest adapter of the config's rank, and `truncation.json` beside it
    says what that loses.

    Raises:
        UserError: the directory holds something or cannot be written, or as `replay`.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty: choose another --out")
    contents = read(run.journal_path)
    state = state_of(contents, run.path, generation)
    adapter, truncation = as_adapter(state, configs.parse_evolve(contents.header.config, "journal"))
    try:
        adapter.save(out)
        if truncation is not None:
            text = json.dumps(truncation_row(truncation), indent=2) + "\n"
            (out / "truncation.json").write_text(text)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    return Replayed(state.generation, state.space.digest(state.master), out, truncation)


def as_adapter(
    state: SearchState, config: configs.EvolveConfig
) -> tuple[AdapterState, Truncation | None]:
    """The state's point as an fp32 LoRA adapter; in weights mode the nearest one, and its error."""
    space = state.space
    if isinstance(space, WeightSpace):
        cut = truncate(
            space.change(state.master), config.adapter.rank, config.adapter.scaling, config.model
        )
        return cut.adapter, cut
    assert isinstance(space, AdapterSpace)
    return space.adapter(state.master), None


def truncation_row(truncation: Truncation) -> dict[str, object]:
    """Relative errors, for JSON."""
    return {"relative_error": truncation.total, "modules": dict(truncation.modules)}


def _verify(header: Header, state: SearchState, digest: str) -> None:
    if state.space.digest(state.master) == digest:
        return
    written = ", ".join(f"{k} {v}" for k, v in header.versions.items())
    raise UserError(
        f"generation {state.generation} rebuilt from the journal is not the one that was written "
        f"(digest differs): it was written with {written}; replay it with the same versions"
    )
