"""Which examples a generation trains on, and which ones it is tested on."""

from __future__ import annotations

from loralab.rollouts import stable_hash


def window(generation: int, samples: int | None, total: int) -> tuple[int, ...]:
    """Training examples of a generation: 0-127, 128-255, ... and around. None takes them all."""
    count = total if samples is None else min(samples, total)
    first = generation * count % total
    return tuple((first + offset) % total for offset in range(count))


def fixed_subset(total: int, samples: int | None, seed: int) -> tuple[int, ...]:
    """A seeded choice of examples, in their order, the same for as long as the run lives."""
    if samples is None or samples >= total:
        return tuple(range(total))
    return tuple(
        sorted(sorted(range(total), key=lambda i: stable_hash(seed, "subset", i))[:samples])
    )
