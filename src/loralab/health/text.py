"""Statistics of what a model wrote: repetition, layout, length, sameness, drift. No torch.

Pure functions of strings and token ids; `statistics` puts them together over many answers. None
means much alone (healthy code repeats itself, healthy lists end early): read each beside the
base's on the same prompts.
"""

from __future__ import annotations

import unicodedata
import zlib
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, groupby, pairwise
from statistics import fmean
from typing import TYPE_CHECKING

from loralab.health.languages import language_of

if TYPE_CHECKING:
    from loralab.health.look import Look

GRAM = 4
"""Length of the n-grams whose repetition is counted."""
LONG_RUN = 16
"""One token oftener than this in a row is no text; LOOPING the like for repeated 4-grams. Limits
that nothing healthy came near in published measurements of base models and of code."""
LOOPING = 0.5
ENOUGH = 8
"""Tokens of an answer under which the share of one of them says nothing."""
COPY_WORDS = 5
"""Words in a row that an answer has from its prompt before they count as copied."""


@dataclass(frozen=True)
class Answer:
    """A completion and what it answers. token_ids: with the end token, if `ended` by one.

    failed: it broke off because logits were NaN. layout: those ids that are whitespace alone.
    """

    prompt: str
    text: str
    token_ids: tuple[int, ...]
    ended: bool
    failed: bool = False
    layout: frozenset[int] = frozenset()

    @property
    def body(self) -> tuple[int, ...]:
        """Ids without the end token."""
        return self.token_ids[:-1] if self.ended else self.token_ids


def repetition(ids: Sequence[int], n: int = GRAM) -> float:
    """Share of n-grams that stood there before: 1 - distinct / all; 0 under n + 1 tokens.

    Source: Welleck et al. 2020, arXiv:1908.04319 ("rep-n" of a sequence).
    """
    grams = [tuple(ids[at : at + n]) for at in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def longest_run(ids: Sequence[int]) -> int:
    """How often one token stands in a row at most; 0 of nothing."""
    return max((sum(1 for _ in run) for _, run in groupby(ids)), default=0)


def top_token_share(ids: Sequence[int], layout: Container[int] = ()) -> float:
    """Share of the commonest token that is not layout among all; 0 of nothing."""
    counts = Counter(token for token in ids if token not in layout)
    return max(counts.values(), default=0) / len(ids) if ids else 0.0


def distinct(answers: Sequence[Sequence[int]], n: int = 2) -> float:
    """Distinct n-grams / all n-grams, over all answers together; NaN where there is none.

    Falls when answers repeat themselves and when they repeat each other. Source: Li et al. 2016,
    arXiv:1510.03055.
    """
    grams = [tuple(ids[at : at + n]) for ids in answers for at in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def compression(texts: Sequence[str]) -> float:
    """Bytes / deflated bytes of all texts, line by line; higher is more redundant; NaN of nothing.

    Source: Shaib et al. 2024, arXiv:2403.00553.
    """
    whole = "\n".join(texts).encode()
    if not any(texts):
        return float("nan")
    packer = zlib.compressobj(9, wbits=-15)
    return len(whole) / len(packer.compress(whole) + packer.flush())


def newline_share(text: str) -> float:
    """Of the characters; 0 of nothing."""
    return text.count("\n") / len(text) if text else 0.0


def whitespace_share(text: str) -> float:
    """Of the characters, newlines among them; 0 of nothing."""
    return sum(map(str.isspace, text)) / len(text) if text else 0.0


def similarity(texts: Sequence[str]) -> float:
    """Mean over pairs of answers of |X & Y| / |X | Y|, X and Y their sets of word pairs.

    Two answers of the same few words are 1, nothing and nothing too: a model that says one thing
    whatever it is asked comes to 1. NaN under two texts.
    """
    sets = [_word_pairs(text) for text in texts]
    pairs = list(combinations(sets, 2))
    return fmean(_jaccard(a, b) for a, b in pairs) if pairs else float("nan")


def copied(prompt: str, text: str, n: int = COPY_WORDS) -> float:
    """Share of an answer's words that lie in runs of n words or more taken from the prompt.

    An answer of fewer than n words has none.
    """
    source, words = prompt.split(), text.split()
    known = {tuple(source[at : at + n]) for at in range(len(source) - n + 1)}
    inside = {
        place
        for at in range(len(words) - n + 1)
        if tuple(words[at : at + n]) in known
        for place in range(at, at + n)
    }
    return len(inside) / len(words) if words else 0.0


def charset_drift(text: str, known: str) -> float:
    """Share of an answer's letters in scripts of which `known` (prompt and base's answer) has none,
    undecodable and control characters counted as letters; 0 of nothing."""
    scripts = Counter(filter(None, map(_script, text)))
    expected = {*map(_script, known)}
    total = sum(scripts.values())
    strange = sum(count for script, count in scripts.items() if script not in expected)
    return strange / total if total else 0.0


def badness(answer: Answer) -> float:
    """How far an answer is from text, to sort by: 0 is none of loops, layout and emptiness."""
    if answer.failed:
        return 3.0
    body = answer.body
    if not answer.text.strip():
        return 2.0
    run = max(0, longest_run(body) - 4) / max(1, len(body))
    return max(repetition(body), run, newline_share(answer.text))


def statistics(answers: Sequence[Answer], base: Sequence[Answer] = ()) -> dict[str, float]:
    """Values by name without the leading "text."; means over answers where nothing else is said.

    repetition4, longest_run (the maximum), top_token_share (of answers of 8 tokens or more),
    distinct2 and compression (of all together), newlines and whitespace (shares of characters),
    length (tokens, the end token left out), eos_rate, truncated (neither ended nor failed),
    similarity (over pairs), charset_drift and language_drift (against the base's answers; NaN
    without), copied; and as shares of the answers: empty (nothing visible), failed (logits were
    NaN), looping (repetition4 over 0.5), long_run (over 16).
    """
    if not answers:
        return dict.fromkeys(NAMES, float("nan"))
    bodies = [answer.body for answer in answers]
    texts = [answer.text for answer in answers]
    repeats = [repetition(body) for body in bodies]
    runs = [longest_run(body) for body in bodies]
    made = {
        "repetition4": fmean(repeats),
        "looping": fmean(one > LOOPING for one in repeats),
        "longest_run": float(max(runs)),
        "long_run": fmean(one > LONG_RUN for one in runs),
        "top_token_share": _mean(
            top_token_share(answer.body, answer.layout)
            for answer in answers
            if len(answer.body) >= ENOUGH
        ),
        "distinct2": distinct(bodies),
        "compression": compression(texts),
        "newlines": fmean(map(newline_share, texts)),
        "whitespace": fmean(map(whitespace_share, texts)),
        "empty": fmean(not text.strip() for text in texts),
        "length": fmean(map(len, bodies)),
        "eos_rate": fmean(answer.ended for answer in answers),
        "failed": fmean(answer.failed for answer in answers),
        "truncated": fmean(not (answer.ended or answer.failed) for answer in answers),
        "similarity": similarity(texts),
        "copied": fmean(copied(answer.prompt, answer.text) for answer in answers),
        "charset_drift": float("nan"),
        "language_drift": float("nan"),
    }
    if base:
        both = list(zip(answers, base, strict=True))
        made["charset_drift"] = fmean(charset_drift(a.text, a.prompt + b.text) for a, b in both)
        made["language_drift"] = _language_drift([(a.text, b.text) for a, b in both])
    return made


def _language_drift(pairs: Sequence[tuple[str, str]]) -> float:
    """Share of pairs in two known languages among those where both are known; 0 where none is."""
    known = [(a, b) for a, b in ((language_of(x), language_of(y)) for x, y in pairs) if a and b]
    return fmean(a != b for a, b in known) if known else 0.0


def _word_pairs(text: str) -> frozenset[tuple[str, ...]]:
    words = text.lower().split()
    if len(words) < 2:
        return frozenset({tuple(words)})
    return frozenset(pairwise(words))


def _jaccard(a: frozenset[tuple[str, ...]], b: frozenset[tuple[str, ...]]) -> float:
    return len(a & b) / len(a | b)


def _mean(values: Iterable[float]) -> float:
    """NaN of nothing."""
    listed = list(values)
    return fmean(listed) if listed else float("nan")


@lru_cache(maxsize=4096)
def _script(character: str) -> str | None:
    """The script of a letter by the first word of its Unicode name ("LATIN"), "�" of what is no
    character; None of the rest, which every language shares."""
    kind = unicodedata.category(character)
    if kind in ("Cc", "Co", "Cs", "Cn"):
        return None if character in "\t\n\r" else "�"
    if character == "�":
        return "�"
    if not kind.startswith("L"):
        return None
    return unicodedata.name(character, "�").split()[0]


NAMES = (
    "repetition4",
    "looping",
    "longest_run",
    "long_run",
    "top_token_share",
    "distinct2",
    "compression",
    "newlines",
    "whitespace",
    "empty",
    "length",
    "eos_rate",
    "failed",
    "truncated",
    "similarity",
    "copied",
    "charset_drift",
    "language_drift",
)


class TextProbe:
    """What the model writes to the prompts, beside what its base writes."""

    name = "text"
    measures = "repetition, layout, length, sameness, copies and drift of greedy completions"
    cost = "greedy completions"

    def measure(self, look: Look) -> dict[str, float]:
        answers, base = look.answers(), look.base_answers()
        values = {f"text.{name}": value for name, value in statistics(answers, base).items()}
        if base:
            values |= {f"base.text.{name}": value for name, value in statistics(base, base).items()}
        return values
