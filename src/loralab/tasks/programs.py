"""The program in a completion: what a model wrote around and behind it is cut away."""

from __future__ import annotations

import re

LONGEST = 50_000
"""Characters of a completion that are read, from its start. Solutions have a few hundred."""

_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
_CODE = re.compile(
    r"^(?:(?:import|from|def|class|async def)\b|@|[A-Za-z_]\w*[ \t]*=[^=])", re.MULTILINE
)
_BEHIND_PROGRAM = re.compile(
    r"^(?:print\(|assert\b|if __name__\b|\[(?:DONE|BEGIN)\]|```)", re.MULTILINE
)
# The stops of Chen et al. 2021, and what chat models and few-shot prompts add.
_BEHIND_FUNCTION = re.compile(
    r"^(?:def\b|class\b|async def\b|@|print\(|if\b|#|assert\b|import\b|from\b|\[DONE\]|```)",
    re.MULTILINE,
)


def whole_program(completion: str, name: str) -> str:
    """The program of a completion that defines `name`: its code block, or its lines of code.

    Of several fenced blocks the first that defines it. Prose before, and uses, tests and prints
    behind the definition are cut.
    """
    text = completion[:LONGEST]
    blocks = [block.group(1) for block in _FENCE.finditer(text)]
    if blocks:
        text = next((block for block in blocks if _defines(block, name)), blocks[0])
    elif start := _CODE.search(text):
        text = text[start.start() :]
    defined = re.search(rf"^(?:async )?def {re.escape(name)}\b", text, re.MULTILINE)
    behind = _BEHIND_PROGRAM.search(text, defined.end() if defined else 0)
    return text[: behind.start()] if behind else text


def continued_function(prompt: str, completion: str, name: str) -> str:
    """The program where `prompt` opens the function `name` and the completion goes on.

    A completion that begins at the margin and holds the function anew (a chat model's) replaces
    the opened one, behind what the prompt has above it: imports and helpers. Any other is cut at
    the first line that begins something else at the margin.
    """
    text = completion[:LONGEST]
    if not text.lstrip("\r\n").startswith((" ", "\t")):
        if _defines(text, name):
            above = re.split(rf"^def {re.escape(name)}\b", prompt, maxsplit=1, flags=re.MULTILINE)
            return above[0] + whole_program(text, name)
        if fenced := _FENCE.search(text):
            text = fenced.group(1)
    behind = _BEHIND_FUNCTION.search(text)
    return prompt + (text[: behind.start()] if behind else text)


def _defines(text: str, name: str) -> bool:
    return re.search(rf"^(?:async )?def {re.escape(name)}\b", text, re.MULTILINE) is not None
