"""Members on their way into vLLM: a rank it allows, nothing that is not finite, a file each.

vLLM reads adapters from paths alone. A member's file lies in memory where there is a memory-backed
folder, under a name never used before, and is gone as soon as vLLM has read it.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from loralab.adapters.state import AdapterState, Factors
from loralab.errors import UserError

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as its largest rank (`MaxLoRARanks` in its `config/lora.py`)."""

MEMORY = Path("/dev/shm")
_ROOM = 2
"""Times a member's size that must be free in memory: containers often get 64 MB of it."""


def allowed_rank(rank: int) -> int:
    """The smallest rank of vLLM's that holds this one. Raises UserError."""
    for allowed in RANKS:
        if rank <= allowed:
            return allowed
    raise UserError(f"rank is {rank}: vLLM runs {RANKS[-1]} at most; use engine.name: batched")


def padded(state: AdapterState) -> AdapterState:
    """The same W + scaling B A, every module at one rank that vLLM allows.

    Rows of zeros are added to A (rank, in) and columns of zeros to B (out, rank); the scaling
    stays. What PEFT says beside the factors is left out: vLLM refuses some of it unread.
    """
    rank = allowed_rank(state.rank)
    factors = {
        name: f
        if f.A.shape[0] == rank
        else Factors(pad(f.A, (0, 0, 0, rank - f.A.shape[0])), pad(f.B, (0, rank - f.B.shape[1])))
        for name, f in state.factors.items()
    }
    return AdapterState(factors, state.scaling)


def check_shapes(
    name: str, state: AdapterState, shapes: Mapping[str, tuple[int, ...]], max_rank: int
) -> None:
    """Raise UserError unless each factor fits a linear module (out, in) of the model.

    vLLM itself ignores a module that it does not have, and serves the base model there.
    """
    if not state.factors:
        raise UserError(f"adapter {name!r} has no factors: load it nowhere, or ask the base model")
    if state.rank > max_rank:
        raise UserError(
            f"adapter {name!r} has rank {state.rank}: this engine was started for ranks up to "
            f"{max_rank}; raise engine.vllm.max_rank"
        )
    for module, (a, b) in state.factors.items():
        if module not in shapes:
            raise UserError(f"adapter {name!r}: {module!r} is no linear module below the head")
        if (b.shape[0], a.shape[1]) != shapes[module]:
            raise UserError(
                f"adapter {name!r}: {module} is {b.shape[0]} x {a.shape[1]}; the model's is "
                f"{' x '.join(map(str, shapes[module]))}"
            )


class Finite:
    """Finds numbers that a dtype cannot hold; a tensor that members share is looked at once."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._limit = torch.finfo(dtype).max
        self._sound: dict[int, bool] = {}

    def complaint(self, state: AdapterState) -> str | None:
        """What is wrong with the member's factors; None if nothing."""
        for module, factors in state.factors.items():
            for part, tensor in zip("AB", factors, strict=True):
                if not self._is_sound(tensor):
                    return f"{part} of {module} holds NaN or a number that is not finite"
        return None

    def _is_sound(self, tensor: Tensor) -> bool:
        key = id(tensor)
        if key not in self._sound:
            # The largest of numbers among which one is NaN is NaN, and no comparison holds of it.
            self._sound[key] = tensor.numel() == 0 or bool(tensor.abs().max() <= self._limit)
        return self._sound[key]


class MemberFiles:
    """Folders that vLLM reads members from; all are gone when this is closed or the process ends.

    Raises UserError where nothing can be written.
    """

    def __init__(self, memory: Path = MEMORY) -> None:
        self._memory = memory
        self._made = 0
        self._folders: list[Path] = []
        self._close = weakref.finalize(self, _remove, self._folders)

    def write(self, state: AdapterState) -> tuple[int, Path]:
        """Save a padded member; a number never used before, and the folder it is in."""
        made = padded(state)
        size = sum(t.numel() * t.element_size() for f in made.factors.values() for t in f)
        self._made += 1
        root = self._memory if _room(self._memory) > _ROOM * size else None
        try:
            folder = Path(tempfile.mkdtemp(prefix=f"loralab-member-{self._made}-", dir=root))
            self._folders.append(folder)
            made.save(folder)
        except OSError as error:
            raise UserError(
                f"cannot write a member of {size / 1e6:.0f} MB to "
                f"{root or tempfile.gettempdir()}: {error.strerror or error}; free some space or "
                "set TMPDIR"
            ) from error
        return self._made, folder

    def remove(self, folder: Path) -> None:
        """Take away what vLLM has read."""
        shutil.rmtree(folder, ignore_errors=True)
        self._folders.remove(folder)

    def close(self) -> None:
        """Take away what is left."""
        self._close()


def _room(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


class MemberPlaces:
    """The members loaded, and those of them that vLLM holds, `count` at the most.

    core: vLLM's LLMEngine. A member enters under a name and number never used before, so that no
    cache of an old one can answer for it, and stays until its place is needed.
    """

    def __init__(self, core: Any, count: int) -> None:
        self.count = count
        self.states: Mapping[str, AdapterState] = {}
        self._core = core
        self._files = MemberFiles()
        self._held: dict[str, Any] = {}

    def load(self, states: Mapping[str, AdapterState]) -> None:
        """Replace the members; vLLM holds none of them yet."""
        for name in list(self._held):
            self._let_go(name)
        self.states = dict(states)

    def hold(self, name: str, busy: Mapping[str, int]) -> None:
        """Have vLLM hold a member, in place of one that is not busy.

        Raises:
            UserError: its file cannot be written.
            ValueError: vLLM does not load it.
        """
        if name in self._held:
            return
        if len(self._held) >= self.count:
            self._let_go(next(held for held in self._held if not busy[held]))
        from vllm.lora.request import LoRARequest

        number, folder = self._files.write(self.states[name])
        try:
            lora = LoRARequest(f"loralab-{number}", number, str(folder))
            self._core.add_lora(lora)
            self._held[name] = lora
        finally:
            self._files.remove(folder)

    def lora(self, name: str) -> Any:
        """The LoRARequest of a member that vLLM holds."""
        return self._held[name]

    def close(self) -> None:
        """Forget the members and remove their files."""
        self._held, self.states = {}, {}
        self._files.close()

    def _let_go(self, name: str) -> None:
        self._core.remove_lora(self._held.pop(name).lora_int_id)
