"""Prompts to look at a model with: 32 of our own that ship with the package, a user's, a task's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal, get_args

from loralab.errors import UserError
from loralab.tasks.base import Message, Split, Task
from loralab.tasks.base import Prompt as TaskPrompt

Kind = Literal["chat", "code", "arithmetic", "list", "json", "prose", "task", "own"]
"""The first six are the shipped kinds; "task" comes from a Task, "own" from a user."""

SHIPPED_KINDS = ("chat", "code", "arithmetic", "list", "json", "prose")


@dataclass(frozen=True)
class Prompt:
    """text: continued as it stands; or messages: through the tokenizer's chat template.

    good: a known-good answer, on which the model is teacher-forced; None takes the base's own.
    """

    text: str | None = None
    messages: tuple[Message, ...] | None = None
    kind: Kind = "own"
    good: str | None = None

    def __post_init__(self) -> None:
        if (self.text is None) == (self.messages is None):
            raise UserError("a prompt needs text or messages, and not both")
        if self.kind not in get_args(Kind):
            raise UserError(f"kind is {self.kind!r}; expected one of {', '.join(get_args(Kind))}")

    def given_to(self, tokenizer: Any) -> TaskPrompt:
        """What an engine is asked with: messages become plain text where there is no template."""
        if self.text is not None:
            return self.text
        if getattr(tokenizer, "chat_template", None):
            return list(self.messages or ())
        return self.shown + "\n\n"

    @property
    def shown(self) -> str:
        """For people, and for what is compared with the answer: the words alone."""
        if self.text is not None:
            return self.text
        return "\n\n".join(message["content"] for message in self.messages or ())


@cache
def shipped_prompts() -> tuple[Prompt, ...]:
    """32 prompts of our own writing with their known-good answers, the kinds in turn.

    Any beginning of them is balanced over the kinds: `shipped_prompts()[:12]` has two of each.
    """
    rows = json.loads((files("loralab.health") / "prompts.json").read_text(encoding="utf-8"))
    return tuple(
        Prompt(
            row.get("text"),
            tuple(row["messages"]) if "messages" in row else None,
            row["kind"],
            row["good"],
        )
        for row in rows
    )


def as_prompts(given: Sequence[Prompt | str | Sequence[Message]] | None) -> tuple[Prompt, ...]:
    """A user's prompts in any form: Prompt, plain text, or messages. None: the shipped ones.

    Raises:
        UserError: there are none.
    """
    if given is None:
        return shipped_prompts()
    if not given or isinstance(given, str):
        raise UserError("prompts: expected a list with one prompt or more")
    return tuple(
        one
        if isinstance(one, Prompt)
        else Prompt(text=one)
        if isinstance(one, str)
        else Prompt(messages=tuple(one))
        for one in given
    )


def task_prompts(task: Task, split: Split = "test", limit: int = 32) -> tuple[Prompt, ...]:
    """The first prompts of a task's split, its gold answers as known-good ones."""
    made = []
    for example in task.examples(split)[:limit]:
        prompt, good = task.prompt(example), task.gold(example)
        text = prompt if isinstance(prompt, str) else None
        messages = None if isinstance(prompt, str) else tuple(prompt)
        made.append(Prompt(text, messages, "task", good))
    return tuple(made)
