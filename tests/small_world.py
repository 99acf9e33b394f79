"""The small decoder of the fault benchmark, smaller still."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny


def made(folder: Path) -> Any:
    """A world of a few thousand weights that have learned nothing yet."""
    from loralab.bench.faults.world import Making, small_world

    stories = [f"Once there was a {tiny.words(12, at)}." for at in range(60)]
    making = Making(hidden=32, layers=2, vocabulary=300, steps=2, batch=4, lessons=50)
    return small_world(folder, stories, making, tell=lambda _: None)
