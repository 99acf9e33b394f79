"""Rows: the end token is learned, padding never hides it, nothing is doubled or lost unsaid."""

from __future__ import annotations

from typing import Any

import pytest

import tiny
from loralab.engines.prompts import PromptEncoder
from loralab.errors import UserError
from loralab.gradient.collate import pad
from loralab.gradient.rows import IGNORED, Row, prepare, rows_of_task
from loralab.tasks.base import Message, Prompt
from loralab.tasks.conciseness import Conciseness


def row(prompt: Prompt, completion: str, max_length: int = 64, tokenizer: Any = None) -> Row:
    made = prepare([(prompt, completion, "here")], tokenizer or tiny.tokenizer(), max_length)
    return made.rows[0]


def learned(made: Row) -> list[int]:
    return [label for label in made.labels if label != IGNORED]


def test_text_is_one_bos_prompt_completion_and_eos() -> None:
    tokenizer = tiny.tokenizer()
    made = row("ab cd", "ef gh")
    words = tokenizer.convert_tokens_to_ids(["ab", "cd", "ef", "gh"])
    assert made.input_ids == (tiny.BOS, *words, tiny.EOS)
    assert made.labels == (IGNORED,) * 3 + (*words[2:], tiny.EOS)


def test_a_chat_prompt_is_what_the_engine_is_given() -> None:
    tokenizer = tiny.tokenizer()
    messages = [Message(role="user", content="ab cd")]
    made = row(messages, "ef gh")
    prompt = PromptEncoder(tokenizer).encode(messages)
    assert list(made.input_ids[: len(prompt)]) == prompt
    assert made.input_ids.count(tiny.BOS) == 1
    assert learned(made) == [*tokenizer.convert_tokens_to_ids(["ef", "gh"]), tiny.EOS]


def test_a_template_that_writes_the_end_token_has_it_once_and_last() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %} ha "
        "{{ m['content'] }} <eos> {% else %} {{ m['content'] }} {% endif %}{% endfor %}"
        "{% if add_generation_prompt %} ha{% endif %}"
    )
    messages = [Message(role="user", content="ab")]
    ef, gh = tokenizer.convert_tokens_to_ids(["ef", "gh"])
    assert learned(row(messages, "ef", tokenizer=tokenizer)) == [ef, tiny.EOS]
    # Text behind it is learned, and ended; a blank behind it, as most templates write, is not.
    tokenizer.chat_template = tokenizer.chat_template.replace("<eos>", "<eos> gh")
    assert learned(row(messages, "ef", tokenizer=tokenizer)) == [ef, tiny.EOS, gh, tiny.EOS]
    tokenizer.decode = lambda ids: " " * len(ids)
    assert learned(row(messages, "ef", tokenizer=tokenizer)) == [ef, tiny.EOS]


def test_padding_that_is_the_end_token_leaves_the_real_one_learned() -> None:
    made = [row("ab", "cd"), row("ab cd ef", "gh ab cd")]
    batch = pad(made, pad_id=tiny.EOS)
    at = len(made[0].input_ids) - 1
    assert batch["labels"][0, at] == tiny.EOS
    assert batch["attention_mask"][0].tolist() == [1] * (at + 1) + [0] * (7 - at)
    assert (batch["labels"][0, at + 1 :] == IGNORED).all()


def test_text_alone_is_learned_whole_after_its_bos() -> None:
    made = row("", "ab cd")
    assert made.input_ids[0] == tiny.BOS
    assert learned(made) == list(made.input_ids[1:])


def test_rows_cut_short_are_counted() -> None:
    pairs = [("ab cd", "ef gh ab", "a"), ("ab", "cd", "b")]
    made = prepare(pairs, tiny.tokenizer(), 5)
    assert made.cut == 1
    assert len(made.rows[0].input_ids) == 5
    assert made.rows[0].input_ids[-1] != tiny.EOS
    assert (made.tokens, made.learned) == (9, 4)


@pytest.mark.parametrize(
    ("prompt", "completion", "says"),
    [
        ("ab cd ef gh ab cd", "ef", "prompt alone has 7 tokens"),
        ("ab", "  ", "completion is empty"),
    ],
)
def test_a_row_with_nothing_to_learn_is_named(prompt: str, completion: str, says: str) -> None:
    pairs = [("ab", "cd", "file line 1"), (prompt, completion, "file line 2")]
    with pytest.raises(UserError, match=r"row 2 \(file line 2\) has nothing to learn") as caught:
        prepare(pairs, tiny.tokenizer(), 6)
    assert says in str(caught.value)


def test_a_task_gives_prompts_with_their_gold_answers() -> None:
    task = Conciseness()
    made = rows_of_task(task, "train", tiny.tokenizer(), 64)
    assert len(made.rows) == len(task.examples("train"))
    assert all(r.learned and r.input_ids[-1] == tiny.EOS for r in made.rows)
