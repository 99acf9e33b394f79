"""A task whose reward misbehaves on some completions, for runs that have to live with it.

It is reached as other people's tasks are, through an entry point: `installed` writes the metadata
of a package that has it, and whoever finds that folder on its path, a scoring process too, finds
the task.
"""

from __future__ import annotations

import itertools
import os
import signal
import time
from pathlib import Path
from typing import Any, Literal, get_args
from zlib import crc32

from loralab.tasks.base import Example, Score
from loralab.tasks.conciseness import Conciseness

NAME = "faulty"
Fault = Literal["raises", "exits", "nan", "string", "huge", "hangs", "hangs_in_c", "dies"]
FAULTS: tuple[Fault, ...] = get_args(Fault)
NEEDS_A_DEADLINE = ("hangs", "hangs_in_c", "dies")
"""These take the process that scores with them, so that it must not be the run's own."""


class Faulty(Conciseness):
    """Conciseness, but for a share of all texts, the same ones in every process and every run."""

    def __init__(self, fault: Fault, share: float = 0.2) -> None:
        super().__init__()
        self.name = NAME
        self.fault, self.share = fault, share

    def unlucky(self, text: str) -> bool:
        """Whether the reward misbehaves on it; on the empty text it does not."""
        drawn = crc32(text.encode("utf-8", "surrogatepass"))
        return bool(text) and drawn < self.share * 2**32

    def score(self, example: Example, completion: str) -> Score:
        """Conciseness' score, or the fault."""
        return self._misbehave() if self.unlucky(completion) else super().score(example, completion)

    def _misbehave(self) -> Score:
        wrong: dict[str, Any] = {"nan": float("nan"), "string": "12", "huge": 1e308}
        if self.fault in wrong:
            return Score(wrong[self.fault])
        if self.fault == "raises":
            raise KeyError("answer")
        if self.fault == "exits":
            raise SystemExit(3)
        if self.fault == "hangs":
            time.sleep(1e6)
        if self.fault == "hangs_in_c":
            sum(itertools.repeat(1))  # no bytecode runs meanwhile, nor any handler of signals
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")


def installed(folder: Path) -> Path:
    """Write the metadata of a package that adds the task, for sys.path; the folder."""
    metadata = folder / "loralab_faulty-1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: loralab-faulty\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(f"[loralab.tasks]\n{NAME} = {__name__}:Faulty\n")
    return folder
