"""Native work in torch's threads: ctypes lets go of the interpreter's lock while a kernel runs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

PARALLEL = 2**18
"""Elements from which the work is shared among torch's threads."""


def in_parts(count: int, block: int, size: int, part: Callable[[int, int], None]) -> None:
    """part(start, stop) over `count` things of `size` elements, by threads in whole blocks."""
    threads = torch.get_num_threads()
    if threads == 1 or count * size < PARALLEL:
        part(0, count)
        return
    step = -(-count // (threads * block)) * block
    starts = range(0, count, step)
    list(_pool(threads).map(part, starts, [min(at + step, count) for at in starts]))


def one_by_one(count: int, part: Callable[[int, int], None]) -> None:
    """part(start, stop) over things of unlike size: each thread takes the next when it is free."""
    threads = torch.get_num_threads()
    if threads == 1:
        part(0, count)
        return
    list(_pool(threads).map(part, range(count), range(1, count + 1)))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="loralab-native")
