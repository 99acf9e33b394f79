"""What every test starts from."""

from __future__ import annotations

import sys
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def _numbers_alone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards of runs look at numbers and weights: texts would cost every tiny run seconds.

    Tests of what they see say `GUARDED = True` in their module.
    """
    if getattr(request.module, "GUARDED", False):
        return
    training = sys.modules.get("loralab.gradient.guarded")
    if training is not None:
        monkeypatch.setattr(training, "WRITES", ())
    search: Any = sys.modules.get("loralab.evolution.guarded")
    if search is not None:
        for look in ("before", "end"):
            monkeypatch.setattr(search.SearchGuard, look, lambda guard, state: None)
