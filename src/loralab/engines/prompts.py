"""Prompts to token ids: plain text as it stands, messages through the chat template."""

from __future__ import annotations

import json
from typing import Any

from loralab.errors import UserError
from loralab.tasks.base import Prompt


class PromptEncoder:
    """Encodes prompts with a Transformers tokenizer, each distinct prompt once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; may be empty.

        Text keeps the special tokens that its tokenizer adds at the front, without doubling a
        beginning-of-sequence token that the text spells out. Messages get a generation prompt; a
        last message by the assistant is continued. Raises UserError for messages where the
        tokenizer has no chat template.
        """
        key = prompt if isinstance(prompt, str) else json.dumps(list(prompt))
        key = f"{type(prompt) is str}|{key}"
        if key not in self._known:
            self._known[key] = (
                self._text(prompt) if isinstance(prompt, str) else self._messages(list(prompt))
            )
        return self._known[key]

    def _text(self, text: str) -> list[int]:
        tokenizer = self._tokenizer
        ids: list[int] = list(tokenizer(text)["input_ids"])
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        if not text and ids in ([bos], [eos]):
            return [bos] if bos is not None else []
        # Some tokenizers close every text: a prompt is there to be continued.
        closes = eos is not None and ids[-1:] == [eos]
        if closes and not text.endswith(tokenizer.eos_token):
            ids = ids[:-1]
        if not ids and bos is not None:
            ids = [bos]
        return ids

    def _messages(self, messages: list[Any]) -> list[int]:
        tokenizer = self._tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path!r} has no chat template: give the prompt "
                "as text, or use an instruction-tuned model"
            )
        continues = bool(messages) and messages[-1]["role"] == "assistant"
        encoded = tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=not continues,
            continue_final_message=continues,
            tokenize=True,
            return_dict=True,
        )
        return list(encoded["input_ids"])
