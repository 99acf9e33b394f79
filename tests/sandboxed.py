"""Runs code that defines `add` against two tests of it, in the sandbox."""

from __future__ import annotations

import pytest

from loralab import sandbox

needs_isolation = pytest.mark.skipif(
    bool(sandbox.why_not_isolated()), reason=sandbox.why_not_isolated() or "isolated"
)
TESTS = ["assert add(1, 2) == 3", "assert add(20, 22) == 42"]


def run(code: str, timeout: float = 5.0, **options: object) -> sandbox.Outcome:
    return sandbox.run(code, timeout=timeout, tests=TESTS, names=["add"], **options)  # type: ignore[arg-type]
