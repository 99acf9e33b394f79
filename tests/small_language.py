"""A tiny model that really speaks something: broken adapters show in what it says.

Words count on: after w comes w + 7 (mod 64), and a text ends at a word that 16 divides.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from peft import LoraConfig, get_peft_model

import tiny
from loralab.health.prompts import Prompt

FIRST = 3
"""The id of word 0."""
TRAINED = {"r": 4, "lora_alpha": 8.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def continuation(start: int) -> list[int]:
    """The words after one, up to the end."""
    words, word = [], start
    while word % 16:
        word = (word + 7) % 64
        words.append(word)
    return words


def text_of(words: Sequence[int]) -> str:
    return " ".join("abcdefgh"[w // 8] + "abcdefgh"[w % 8] for w in words)


def starts_of(split: str = "train") -> list[int]:
    """Words with something to say after them."""
    return [w for w in range(64) if len(continuation(w)) >= 6 and (w % 5 == 0) == (split == "test")]


def prompts(count: int = 8) -> tuple[Prompt, ...]:
    """Words that are never trained on, with the right texts."""
    return tuple(
        Prompt(text=text_of([w]), good=text_of(continuation(w))) for w in starts_of("test")[:count]
    )


def rows(words: Sequence[int]) -> list[dict[str, str]]:
    return [{"prompt": text_of([w]), "completion": text_of(continuation(w))} for w in words]


def write_rows(path: Path, given: Sequence[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return path


def _batch(generator: torch.Generator, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    picks = torch.randint(0, 64, (size,), generator=generator).tolist()
    made = [[tiny.BOS, *(FIRST + w for w in (p, *continuation(p))), tiny.EOS] for p in picks]
    longest = max(map(len, made))
    ids = torch.tensor([row + [tiny.PAD] * (longest - len(row)) for row in made])
    labels = ids.clone()
    for index, row in enumerate(made):
        labels[index, len(row) :] = -100
    labels[:, :2] = -100
    return ids, labels


def train(model: Any, steps: int, lr: float, seed: int = 0, size: int = 24) -> float:
    """Plain training; the last loss."""
    generator = torch.Generator().manual_seed(seed)
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=lr, weight_decay=0.0)
    model.train()
    value = float("nan")
    for _ in range(steps):
        ids, labels = _batch(generator, size)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        value = float(loss.detach())
    model.eval()
    return value


def make_base(directory: Path, hidden: int = 64, steps: int = 250) -> Path:
    """A model that speaks the language, saved with its tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = {**tiny.CONFIGS["llama"]().to_dict(), "hidden_size": hidden}
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**shape))
        if steps:
            loss = train(model, steps, 3e-3)
            assert loss < 0.2, loss
    model.generation_config.eos_token_id = tiny.EOS
    model.generation_config.pad_token_id = tiny.PAD
    model.save_pretrained(directory)
    made = tiny.tokenizer()
    made.chat_template = None
    made.save_pretrained(directory)
    return directory


def open_base(directory: Path) -> Any:
    return tf.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def adapted(base: Path, config: Any = None, steps: int = 12, **options: Any) -> Any:
    """A PEFT model on the base, trained a little on its own language."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = get_peft_model(open_base(base), config or LoraConfig(**{**TRAINED, **options}))
        if steps:
            train(model, steps, 3e-3, seed=1)
    return model.eval()
