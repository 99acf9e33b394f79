"""Signals in one context and in one within another."""

from __future__ import annotations

import os
import signal

import pytest

from loralab.interrupt import Interrupt


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_the_first_signal_asks_and_the_second_stops() -> None:
    said: list[str] = []
    before = signal.getsignal(signal.SIGTERM)
    with Interrupt(said.append) as one:
        terminate()
        assert one.requested
        with pytest.raises(KeyboardInterrupt):
            terminate()
    assert said == ["SIGTERM"]
    assert Interrupt.asked_by is signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    with Interrupt(said.append):
        assert Interrupt.asked_by is None


def test_what_is_asked_of_an_inner_one_is_asked_of_the_outer() -> None:
    said: list[str] = []
    with Interrupt(said.append) as outer:
        with Interrupt(said.append) as first:
            assert not first.requested
        assert not outer.requested
        with Interrupt(said.append) as second:
            terminate()
            assert (second.requested, outer.requested) == (True, False)
        assert outer.requested
        with Interrupt(said.append) as third:
            assert third.requested
        with pytest.raises(KeyboardInterrupt):
            terminate()
    with Interrupt(said.append) as after:
        assert not after.requested
    assert said == ["SIGTERM"]
