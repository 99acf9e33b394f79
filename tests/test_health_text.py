"""Text statistics: each where it must react, and where it must not."""

from __future__ import annotations

import random
import subprocess
import sys
from math import isnan

import pytest

from loralab.health.languages import language_of
from loralab.health.text import (
    NAMES,
    Answer,
    badness,
    charset_drift,
    compression,
    copied,
    distinct,
    longest_run,
    newline_share,
    repetition,
    similarity,
    statistics,
    top_token_share,
    whitespace_share,
)

ENGLISH = "The train to the city was late, and it was raining when we came to the old station."
GERMAN = "Der Zug in die Stadt war spät, und es hat geregnet, als wir zu dem alten Bahnhof kamen."


def answer(
    text: str, ids: tuple[int, ...] | None = None, ended: bool = True, **more: bool
) -> Answer:
    """Ids from words where none are given, with 1 as the end token."""
    if ids is None:
        ids = tuple(2 + sum(map(ord, word)) for word in text.split())
    return Answer("Say something.", text, (*ids, 1) if ended else ids, ended, **more)


def test_repetition_counts_grams_that_stood_there_before() -> None:
    assert repetition([1, 2, 3, 4, 5, 6, 7]) == 0
    assert repetition([1, 2, 3]) == 0
    # Grams of 1 2 1 2 1 2 1 2: 1212 three times, 2121 twice.
    assert repetition([1, 2] * 4) == 1 - 2 / 5
    assert repetition([9] * 40) == 1 - 1 / 37


def test_longest_run() -> None:
    assert longest_run([]) == 0
    assert longest_run([1, 2, 2, 2, 3, 3]) == 3


def test_distinct_falls_within_answers_and_between_them() -> None:
    assert distinct([[1, 2, 3], [4, 5, 6]]) == 1
    assert distinct([[1, 2, 1, 2]]) == 2 / 3
    assert distinct([[1, 2, 3], [1, 2, 3]]) == 0.5
    assert isnan(distinct([[1], []]))


def test_compression_is_high_for_what_repeats() -> None:
    drawn = random.Random(0)
    noise = ["".join(chr(drawn.randrange(33, 126)) for _ in range(200)) for _ in range(5)]
    assert compression(noise) < 1.3
    assert compression([ENGLISH]) < 2
    assert compression([ENGLISH] * 8) > 5
    assert compression(["no " * 100]) > 15
    assert isnan(compression(["", ""]))


def test_layout_shares() -> None:
    assert newline_share("a\nb\n") == 0.5
    assert whitespace_share("a b\n") == 0.5
    assert newline_share("") == whitespace_share("") == 0


def test_similarity_sees_one_thing_said_to_all() -> None:
    assert similarity(["I do not know.", "I do not know.", "I do not know."]) == 1
    assert similarity(["", "", ""]) == 1
    assert similarity(["red green blue", "one two three"]) == 0
    assert similarity(["a b c", "a b d"]) == pytest.approx(1 / 3)
    assert isnan(similarity(["alone"]))


def test_copied_words_come_in_runs() -> None:
    prompt = "one two three four five six seven eight"
    assert copied(prompt, "two three four five six seven") == 1
    assert copied(prompt, "yes two three four five six no no") == 5 / 8
    assert copied(prompt, "two three four and six seven") == 0
    assert copied(prompt, "") == 0


def test_top_token_share_leaves_layout_out() -> None:
    assert top_token_share([7, 7, 7, 8]) == 0.75
    assert top_token_share([5, 5, 5, 8], layout={5}) == 0.25
    assert top_token_share([5, 5], layout={5}) == 0
    assert top_token_share([]) == 0


def test_charset_drift_is_of_letters_that_nobody_asked_for() -> None:
    assert charset_drift("Hello, 3 cafés!", ENGLISH) == 0
    assert charset_drift("Привет", ENGLISH) == 1
    assert charset_drift("Привет", "Переведи") == 0
    assert charset_drift("ab谢谢", ENGLISH) == 0.5
    assert charset_drift("ab\x00\x07", ENGLISH) == 0.5
    assert charset_drift("1 + 2 = 3 😀\n\t", ENGLISH) == 0


def test_languages_are_told_by_their_little_words() -> None:
    assert language_of(ENGLISH) == "english"
    assert language_of(GERMAN) == "german"
    assert language_of("Le train pour la ville est en retard et il pleut sur les gens.") == "french"
    assert (
        language_of("El tren a la ciudad no llega y los pasajeros esperan en la lluvia.")
        == "spanish"
    )
    assert language_of("return x + y for x in numbers if x else 0 or None, len(numbers)") is None
    assert language_of("one two") is None


def test_a_model_in_another_language_drifts() -> None:
    base = [answer(ENGLISH), answer("43"), answer(ENGLISH)]
    moved = [answer(GERMAN), answer("43"), answer(ENGLISH)]
    assert statistics(base, base)["language_drift"] == 0
    assert statistics(moved, base)["language_drift"] == 0.5


def test_healthy_answers_raise_no_share() -> None:
    healthy = [
        answer(ENGLISH),
        answer("Apple\nBanana\nOrange\nPear\nGrape"),
        answer("17 + 26 = 43"),
    ]
    got = statistics(healthy, healthy)
    for name in ("looping", "long_run", "empty", "failed", "truncated", "charset_drift", "copied"):
        assert got[name] == 0, name
    assert got["eos_rate"] == 1
    assert got["length"] == pytest.approx(sum(len(one.body) for one in healthy) / 3)
    assert set(got) == set(NAMES)


def test_newlines_loops_and_silence_show() -> None:
    newlines = answer("\n" * 40, (5,) * 40, ended=False)
    loop = answer("no, no, " * 20, (3, 4) * 20, ended=False)
    silent, broken = answer("", ()), answer("so", (9,), ended=False, failed=True)
    got = statistics([newlines, loop, silent, broken])
    assert got["newlines"] == 0.25
    assert got["empty"] == 0.5
    assert got["looping"] == 0.5
    assert got["long_run"] == 0.25
    assert got["longest_run"] == 40
    assert got["eos_rate"] == 0.25
    assert got["failed"] == 0.25
    assert got["truncated"] == 0.5
    assert isnan(got["charset_drift"])


def test_no_answers_are_not_measured() -> None:
    assert all(map(isnan, statistics([]).values()))


def test_badness_puts_the_worst_first() -> None:
    listed = [
        answer(ENGLISH),
        answer("no no " * 9, (3, 4) * 9),
        answer("\n\n", (5, 5)),
        answer("", (), ended=False, failed=True),
    ]
    assert sorted(listed, key=badness) == listed
    assert badness(listed[0]) == 0


def test_text_statistics_need_no_torch() -> None:
    code = (
        "import sys, loralab.health.text, loralab.health.languages; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
