"""Stopping at a signal without losing the work in flight."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, ClassVar

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Ended:
    """How a run of nothing but pieces went. complete: False if it stopped at a signal."""

    complete: bool


class Interrupt:
    """Within this context the first SIGINT or SIGTERM only sets `requested`; the next one stops.

    One within another, as a stage's within its pipeline's, shares its request: an inner one begins
    as its outer one is, and hands on what was asked of it when it ends.

    Outside the main thread, where Python allows no handlers, it does nothing.
    """

    asked_by: ClassVar[signal.Signals | None] = None
    """Which signal the last outermost one was asked to stop by, None if by none."""
    _innermost: ClassVar[Interrupt | None] = None

    def __init__(self, on_request: Callable[[str], None]) -> None:
        self.requested = False
        self._on_request = on_request
        self._before: dict[signal.Signals, Any] = {}
        self._outer: Interrupt | None = None

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
            self._outer, Interrupt._innermost = Interrupt._innermost, self
            if self._outer is None:
                Interrupt.asked_by = None
            elif self._outer.requested:
                self.requested = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            Interrupt._innermost = self._outer
            # A signal from here on is the outer one's own; one before was for both.
            if self._outer is not None and self.requested:
                self._outer.requested = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        Interrupt.asked_by = signal.Signals(number)
        self._on_request(signal.Signals(number).name)
