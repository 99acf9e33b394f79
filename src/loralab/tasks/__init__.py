"""Tasks by name: `get("countdown").score(example, completion)`.

Importing this package imports no task; a task's module is imported when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from loralab.registry import TASKS

if TYPE_CHECKING:
    from loralab.tasks.base import Task

__all__ = ["get", "names"]


def names() -> list[str]:
    """Every task there is, those of other people's packages included."""
    return TASKS.names()


def get(name: str, **options: Any) -> Task:
    """The task of that name, made with these options.

    Raises:
        UserError: an unknown name or option, or a value of the wrong type or range.
    """
    return cast("Task", TASKS.create(name, options))
