"""Noise that is never stored: any piece of it is drawn again from a key.

Each tensor's noise comes from its own Philox stream (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3"), keyed by a 128-bit BLAKE2b hash of
(seed, generation, pair, tensor name). So tensors of equal shape never share noise, nor do runs
with neighbouring seeds, which they would if a seed were a sum or a position in one stream.

Antithetic members come in pairs, 2i with +noise and 2i + 1 with -noise (Mirrored sampling,
Brockhoff et al. 2010), the sign following from the parity of the member.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import TypeVar

import numpy as np
from numpy.random import Generator, Philox

from loralab.evolution.layout import Floats, Layout

T = TypeVar("T")


def key(seed: int, generation: int, pair: int, name: str) -> int:
    """The 128-bit Philox key of one tensor's noise."""
    text = f"{seed}|{generation}|{pair}|{name}"
    digest = blake2b(text.encode(), digest_size=16, person=b"loralab.noise").digest()
    return int.from_bytes(digest, "little")


def fill(out: Floats, seed: int, generation: int, pair: int, name: str) -> None:
    """Fill a contiguous array with standard normals of its key (NumPy's float32 ziggurat)."""
    stream = Generator(Philox(key=key(seed, generation, pair, name)))
    stream.standard_normal(out=out, dtype=np.float32)


def draw(
    layout: Layout, seed: int, generation: int, pair: int, out: Floats | None = None
) -> Floats:
    """Standard normals for every tensor of the layout, as one flat vector (layout.size,)."""
    noise = np.empty(layout.size, dtype=np.float32) if out is None else out
    for name, part in layout.parts(noise):
        fill(part, seed, generation, pair, name)
    return noise


def pairs(population: int, antithetic: bool) -> int:
    """How many independent draws a population needs."""
    return population // 2 if antithetic else population


def pair_and_sign(member: int, antithetic: bool) -> tuple[int, int]:
    """Which draw a member uses, and with which sign."""
    return (member // 2, -1 if member % 2 else 1) if antithetic else (member, 1)


def pair_weights(fitness: Sequence[float], antithetic: bool) -> list[float]:
    """Coefficient of each draw in sum_i fitness_i * sign_i * noise_i."""
    if not antithetic:
        return list(fitness)
    return [plus - minus for plus, minus in zip(fitness[::2], fitness[1::2], strict=True)]


def in_threads(work: Callable[[int], T], items: Iterable[int], threads: int) -> list[T]:
    """Apply `work` to each item; the results do not depend on `threads`.

    Drawing and casting release the interpreter lock, so threads pay.
    """
    if threads <= 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, items))
