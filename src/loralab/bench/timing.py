"""Timing side by side: rounds over all competitors, medians, peak memory, the machine's facts.

A shared machine drifts by tens of percent within minutes. Competitors therefore take turns
(round-robin) instead of running one after another, so that a slow minute falls on all of them.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

from loralab.errors import UserError

GB = 1e9


@dataclass(frozen=True)
class Lap:
    """One turn of one competitor.

    load, run: seconds of the clock to load its members and to generate.
    cpu: seconds of processor time that generating took; below `run` where others had the core.
    tokens: tokens made.
    """

    load: float
    run: float
    cpu: float
    tokens: int


@dataclass(frozen=True)
class Timed:
    """All laps of one competitor on one workload."""

    laps: tuple[Lap, ...]

    @property
    def tokens_per_second(self) -> float:
        """Median over the laps of tokens / seconds of generation (loading apart)."""
        return median(lap.tokens / lap.run for lap in self.laps)

    @property
    def spread(self) -> tuple[float, float]:
        """Slowest and fastest lap in tokens per second."""
        rates = [lap.tokens / lap.run for lap in self.laps]
        return min(rates), max(rates)

    @property
    def core_share(self) -> float:
        """Median share of the clock's time in which it had the core: 1 on a machine left alone."""
        return median(lap.cpu / lap.run for lap in self.laps)

    @property
    def load_seconds(self) -> float:
        """Median seconds to load the members."""
        return median(lap.load for lap in self.laps)

    @property
    def tokens(self) -> int:
        """Tokens made in a lap."""
        return self.laps[0].tokens


def take_turns(
    competitors: Mapping[str, Callable[[], Lap]],
    repeats: int,
    budget: float | None = None,
    on_lap: Callable[[str, int, Lap], None] | None = None,
) -> dict[str, Timed]:
    """Laps of every competitor, round by round.

    A competitor whose laps have together taken `budget` seconds sits out the rounds that follow
    (its median is then over fewer laps); without a budget each runs `repeats` times.
    """
    laps: dict[str, list[Lap]] = {name: [] for name in competitors}
    for turn in range(repeats):
        for name, lap_of in competitors.items():
            spent = sum(lap.load + lap.run for lap in laps[name])
            if budget is not None and laps[name] and spent >= budget:
                continue
            lap = lap_of()
            laps[name].append(lap)
            if on_lap is not None:
                on_lap(name, turn, lap)
    return {name: Timed(tuple(done)) for name, done in laps.items()}


def seconds(timed: Timed) -> float:
    """Median seconds of a lap, by the clock."""
    return median(lap.run for lap in timed.laps)


def ratio(timed: Timed, reference: Timed) -> float:
    """Median over the rounds of processor time by the reference's in the same round."""
    pairs = zip(timed.laps, reference.laps, strict=True)
    return median(lap.cpu / other.cpu for lap, other in pairs)


def peak_rss_gb() -> float:
    """Highest resident memory of this process so far, in GB (10^9 bytes).

    VmHWM and not getrusage: the latter hands a child the peak of the parent that forked it.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / GB
    raise OSError("/proc/self/status has no VmHWM: peak memory can be read on Linux alone")


def peak_in_child(module: str, words: Sequence[str], what: str) -> float:
    """`peak_rss_gb` of a fresh process, whose memory holds `what` alone.

    It runs `python -m module words`, which says {"peak_gb": g} on its last line.

    Raises:
        UserError: it failed; the last line of what it said.
    """
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"measuring the memory of {what} failed: {last}")
    return float(json.loads(done.stdout.splitlines()[-1])["peak_gb"])


def pin(core: int | None) -> int | None:
    """Bind this process, and those it starts, to one core; the last available if None.

    Returns the core, or None where the system has no affinity (macOS).

    Raises:
        UserError: the machine has no such core, or it may not be used.
    """
    if not hasattr(os, "sched_setaffinity"):
        return None
    there = os.sched_getaffinity(0)
    chosen = max(there) if core is None else core
    try:
        os.sched_setaffinity(0, {chosen})
    except OSError as error:
        raise UserError(
            f"--core {chosen}: {error.strerror}; expected one of {', '.join(map(str, there))}"
        ) from error
    return chosen


def machine() -> str:
    """The processor in words: model, cores, and the vector instructions that decide bf16 speed."""
    model, flags = platform.machine(), set[str]()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
    known = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    cores = os.cpu_count()
    return f"{model}, {cores} cores, {' '.join(known) or 'no vector flags read'}"


def versions(*packages: str) -> dict[str, str]:
    """Installed versions, "absent" for a package that is not there."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found
