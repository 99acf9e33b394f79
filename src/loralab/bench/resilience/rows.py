"""What a case came to: trials, and a row of the table over them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loralab.bench.table import Cell

COLUMNS = ("case", "trials", "survived", "bit-identical", "how it was said, most often")


@dataclass(frozen=True)
class Trial:
    """One disturbed run.

    survived: it ended as it should, in the end, and nothing that was written before was lost.
    identical: its journal and adapters are the undisturbed run's, None where that is not asked.
    said: the line that told of it. wrong: what was not as it should, for who reads the JSON.
    """

    survived: bool
    identical: bool | None
    said: str
    wrong: str | None = None


@dataclass(frozen=True)
class Row:
    """Trials of one case."""

    case: str
    trials: Sequence[Trial]

    def cells(self) -> list[Cell]:
        """A line of the table."""
        asked = [trial.identical for trial in self.trials if trial.identical is not None]
        said = Counter(trial.said for trial in self.trials if trial.said).most_common(1)
        return [
            self.case,
            len(self.trials),
            f"{sum(trial.survived for trial in self.trials)} / {len(self.trials)}",
            f"{sum(asked)} / {len(asked)}" if asked else "-",
            f"`{said[0][0]}`" if said else "nothing, as there is nothing to mend",
        ]


def ending(difference: str | None, code: int, said: str, error: str) -> Trial:
    """The trial of a run that was to end as the undisturbed one did. error: the line it failed
    with, if it did."""
    good = code == 0 and difference is None
    wrong = None if good else f"exit code {code}; {difference or 'same bytes'}; {error}"
    return Trial(good, difference is None, said, wrong)


def general(line: str) -> str:
    """A line with N for each number: which generation it was is each trial's own."""
    return re.sub(r"\b\d+\b", "N", line)


def shown(line: str, path: Path) -> str:
    """A line without this machine's folders."""
    return line.strip().replace(f"{path}/", "").replace(str(path), "RUN")
