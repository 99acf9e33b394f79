"""vLLM against the batched engine on SmolLM2 in float32: greedy text of the base and 8 members."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import loralab
import tiny
from loralab.adapters.state import AdapterState
from loralab.engines.base import Completion, Request, Sampling
from loralab.engines.batched import BatchedEngine
from loralab.engines.prompts import PromptEncoder
from loralab.engines.vllm import VllmEngine
from loralab.engines.vllm_start import Options

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

MEMBERS = 8
TOKENS = 16
NEAR = 1e-3
"""Logits nearer than this may change places under another order of adding in float32."""
PROMPTS = [
    "The capital of France is",
    "Once upon a time there was a small dog who",
    "def fibonacci(n):\n",
    "12 + 35 =",
    "A recipe for bread: first",
    "In 1969 the first people",
    "The three primary colours are",
    "Dear Sir or Madam,",
    *(
        [{"role": "user", "content": text}]
        for text in (
            "Say hello in three languages.",
            "What is 7 times 8?",
            "Write one sentence about rain.",
            "Name a planet.",
            "Why is the sky blue?",
            "Translate 'good morning' to German.",
            "Give me a word that rhymes with cat.",
            "Who wrote Hamlet?",
        )
    ),
]


def gap(model: Any, state: AdapterState | None, tokens: list[int]) -> float:
    """Between the two highest logits after these tokens, by PEFT in float32."""
    own = copy.deepcopy(model)
    if state is None:
        with torch.no_grad():
            logits = own(input_ids=torch.tensor([tokens])).logits[0, -1]
    else:
        logits = tiny.PeftReference(own, {"m": state}).logits("m", tokens)[-1]
    first, second = logits.topk(2).values.tolist()
    return float(first - second)


@pytest.mark.timeout(1800)  # a minute of one core, which a busy machine stretches
def test_greedy_text_is_the_batched_engines() -> None:
    model, tokenizer = loralab.load("smollm2", dtype="float32")
    members = {
        f"m{index}": tiny.adapter(model, seed=index, rank=4, scaling=2.0, size=0.04)
        for index in range(MEMBERS)
    }
    asked = [
        Request(prompt, name, Sampling(TOKENS)) for name in (None, *members) for prompt in PROMPTS
    ]
    reference = BatchedEngine(model, tokenizer, backend="torch", threads=1)
    engine = VllmEngine(
        "smollm2", "float32", Options(max_loras=5, max_rank=4, context=256, memory_gb=1)
    )
    try:
        done: list[list[Completion]] = []
        for one in (reference, engine):
            one.load(members)
            done.append(one.generate(asked))
    finally:
        engine.close()
    assert len({c.text for c in done[0]}) > 0.7 * len(asked), "members must differ"
    encoder, gaps = PromptEncoder(tokenizer), list[float]()
    for request, expected, found in zip(asked, *done, strict=True):
        assert found.error is None
        if found.tokens == expected.tokens:
            assert found == expected
            continue
        pairs = zip(expected.tokens, found.tokens, strict=False)
        place = next(i for i, (a, b) in enumerate(pairs) if a != b)
        before = [*encoder.encode(request.prompt), *expected.tokens[:place]]
        state = None if request.adapter is None else members[request.adapter]
        gaps.append(gap(model, state, before))
    print(f"{len(asked) - len(gaps)} of {len(asked)} completions are equal; gaps {sorted(gaps)}")
    # Every difference is a near tie, and there are few of them.
    assert all(g < NEAR for g in gaps), gaps
    assert len(gaps) < 0.05 * len(asked)
