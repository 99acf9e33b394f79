"""A task's examples as the texts that a contamination check compares."""

from __future__ import annotations

from loralab.data.check import GRAM
from loralab.data.documents import Document
from loralab.tasks.base import Split, Task

LEAST_ANSWER = 2 * GRAM
"""Shorter answers are alike by chance: `return sorted(set(values))`, "the answer is 4"."""


def documents(task: Task, split: Split) -> list[Document]:
    """Prompt and gold answer of every example, as two texts of one place, the example's id."""
    found = []
    for example in task.examples(split):
        prompt, gold = task.prompt(example), task.gold(example)
        asked = prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)
        found.append(Document(example.id, asked))
        if gold is not None and len(gold.split()) >= LEAST_ANSWER:
            found.append(Document(example.id, gold))
    return found
