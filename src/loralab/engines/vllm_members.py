"""Members on their way into vLLM: a rank it allows, a file each, a place for some of them.

vLLM reads adapters from paths alone. A member's file lies in memory where there is a memory-backed
folder, under a name never used before, and is gone as soon as vLLM has read it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.nn.functional import pad

from loralab.adapters.state import AdapterState, Factors
from loralab.engines.memory_folder import MemoryFolder
from loralab.errors import UserError

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as its largest rank (`MaxLoRARanks` in its `config/lora.py`)."""

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


class MemberFiles:
    """Folders that vLLM reads members from; all are gone when this is closed or the process ends,
    and what a killed process left, when the next one makes its own.

    Raises UserError where nothing can be written.
    """

    def __init__(self) -> None:
        self._memory = MemoryFolder()
        self._disk: MemoryFolder | None = None
        self._made = 0

    def write(self, state: AdapterState) -> tuple[int, Path]:
        """Save a padded member; a number never used before, and the folder it is in."""
        made = padded(state)
        size = sum(t.numel() * t.element_size() for f in made.factors.values() for t in f)
        self._made += 1
        folder = self._root(size) / str(self._made)
        try:
            made.save(folder)
        except OSError as error:
            raise UserError(
                f"cannot write a member of {size / 1e6:.0f} MB to {folder.parent}: "
                f"{error.strerror or error}; free some space or set TMPDIR"
            ) from error
        return self._made, folder

    def remove(self, folder: Path) -> None:
        """Take away what vLLM has read."""
        shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Take away what is left."""
        self._memory.close()
        if self._disk is not None:
            self._disk.close()

    def _root(self, size: int) -> Path:
        """In memory if a member has room there, else among temporary files."""
        if shutil.disk_usage(self._memory.path).free > _ROOM * size:
            return self._memory.path
        self._disk = self._disk or MemoryFolder(tempfile.gettempdir())
        return self._disk.path


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
