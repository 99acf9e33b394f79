"""Pages of the key-value cache, shared between rows that begin alike."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence

PAGE = 16
"""Positions a page holds, as in attention.h."""

_Key = tuple[int, int, tuple[int, ...]]


class PagePool:
    """Hands out page numbers; a page goes back when its last row is dropped.

    The memory is reserved as address space and taken from the machine only where touched, so the
    pool needs no size beforehand. It is kept from one session to the next: paging in fresh memory
    cost up to 3 ms a step. Full pages of prompts are found again by their chain: (page of
    the block before, or minus the member, and the block's 16 tokens).
    """

    def __init__(self, page_bytes: int) -> None:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        self.capacity = max(1, total // page_bytes)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        self._memory = self._reserve(page_bytes, flags)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._touched = 0
        self.clear()

    def clear(self) -> None:
        """Forget every row; the lowest pages are handed out first."""
        self._free = list(range(self._touched - 1, -1, -1))
        self._users: dict[int, int] = {}
        self._known: dict[_Key, int] = {}
        self._key_of: dict[int, _Key] = {}

    def _reserve(self, page_bytes: int, flags: int) -> mmap.mmap:
        """Address space for all pages; less of it where the system is strict about promises."""
        while True:
            try:
                return mmap.mmap(-1, self.capacity * page_bytes, flags=flags)
            except OSError as error:
                if self.capacity == 1:
                    raise MemoryError(f"no memory for a cache page of {page_bytes} B") from error
                self.capacity //= 2

    def take(self) -> int:
        """A page of one's own. Raises MemoryError when the machine's memory is spoken for."""
        if self._free:
            page = self._free.pop()
        elif self._touched < self.capacity:
            page = self._touched
            self._touched += 1
        else:
            raise MemoryError(f"all {self.capacity} pages of the cache are in use")
        self._users[page] = 1
        return page

    def take_prefix(self, member: int, tokens: Sequence[int], pages: list[int]) -> int:
        """Append the pages of a prompt to `pages`; return how many positions they already hold.

        The block with the last token is never shared: its logits have to be computed, and the
        row goes on writing there.
        """
        whole = (len(tokens) - 1) // PAGE
        done = 0
        link = -2 - member
        fresh = False
        for block in range(whole):
            key = (link, member, tuple(tokens[block * PAGE : (block + 1) * PAGE]))
            page = None if fresh else self._known.get(key)
            if page is None:
                fresh = True
                page = self.take()
                self._known[key] = page
                self._key_of[page] = key
            else:
                self._users[page] += 1
                done += PAGE
            pages.append(page)
            link = page
        pages.append(self.take())
        return done

    def release(self, pages: Sequence[int]) -> None:
        """Give pages back; those that nobody uses any more are free again."""
        for page in pages:
            self._users[page] -= 1
            if not self._users[page]:
                del self._users[page]
                key = self._key_of.pop(page, None)
                if key is not None:
                    del self._known[key]
                self._free.append(page)
