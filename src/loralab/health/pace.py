"""When a guard looks, and what its looking costs."""

from __future__ import annotations

from math import ceil, nan
from time import perf_counter

from loralab import ranks

FIRST = (1, 5, 10, 25, 50)
"""Steps after which it always looks, beside the start and the end."""
LEAST = 25
"""Steps between two looks later, at least, unless `every` says less."""


class Pace:
    """Which steps are looked at, from `begin` to `end`.

    every: steps between looks after the first ones; None makes it as many as keep the time of
        looking under `budget` of the time of training.
    seconds: spent on looking.
    """

    def __init__(self, every: int | None, budget: float) -> None:
        self._every, self._budget = every, budget
        self.seconds = 0.0
        self.last = 0
        self._between = LEAST if every is None else every
        self._costs: list[float] = []
        self._start = 0
        self._began = self._ended = nan

    def begin(self, step: int) -> None:
        """A training starts, or goes on, after this many steps."""
        self.seconds, self.last, self._start = 0.0, step, step
        self._between = LEAST if self._every is None else self._every
        self._costs = []
        self._began, self._ended = perf_counter(), nan

    def end(self) -> None:
        """Training is over: what comes after it is neither looking nor training."""
        self._ended = perf_counter()

    def due(self, step: int) -> bool:
        """Whether to look after a step."""
        if step <= FIRST[-1]:
            return step in FIRST
        return step - self.last >= self._between

    def spent(self, seconds: float) -> None:
        """On what is no look: preparing, acting."""
        self.seconds += seconds

    def looked(self, step: int, seconds: float) -> None:
        """A look after a step is over; plans the next."""
        self.seconds += seconds
        self.last = step
        self._costs.append(seconds)
        done = step - self._start
        if self._every is None and done > 0:
            # The first look makes the base's numbers too, which are kept.
            later = self._costs[1:]
            cost = sum(later) / max(1, len(later))
            wanted = max(LEAST, ceil(cost * done / (self._budget * self.training)))
            self._between = ceil(ranks.summed([float(wanted)])[0] / ranks.world())

    @property
    def share(self) -> float:
        """Time spent looking, of the time of training without it; NaN before there is any."""
        training = self.training
        return self.seconds / training if training > 0 else nan

    @property
    def training(self) -> float:
        """Seconds of training without looking."""
        until = perf_counter() if self._ended != self._ended else self._ended
        return until - self._began - self.seconds
