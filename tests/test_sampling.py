"""Sampling: the published generator, the filters of Transformers, the right frequencies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from loralab.engines import sampling as module
from loralab.engines.base import Sampling
from loralab.engines.sampling import philox, sample, uniforms

SETTINGS = [
    (1.0, 0, 1.0),
    (0.7, 0, 1.0),
    (1.3, 5, 1.0),
    (1.0, 1, 1.0),
    (1.0, 0, 0.7),
    (0.8, 0, 0.05),
    (0.9, 7, 0.8),
    (2.0, 1000, 0.95),
]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (0x00000000, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (0xFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_philox_gives_the_published_words(word: int, expected: tuple[int, ...]) -> None:
    """Known answers of Random123 for philox4x32-10."""
    counter, key = np.full((1, 4), word, np.uint64), np.full((1, 2), word, np.uint64)
    assert tuple(philox(counter, key)[0].tolist()) == expected


def test_philox_gives_the_published_words_of_pi() -> None:
    counter = np.array([[0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]], np.uint64)
    key = np.array([[0xA4093822, 0x299F31D0]], np.uint64)
    expected = [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]
    assert philox(counter, key)[0].tolist() == expected


def test_uniforms_are_uniform_and_independent() -> None:
    draws = uniforms([s for s in range(200) for _ in range(100)], list(range(100)) * 200)
    assert float(draws.min()) >= 0
    assert float(draws.max()) < 1
    counts = torch.histc(draws.float(), 20, 0, 1)
    # 19 degrees of freedom: 43.8 is exceeded once in a thousand.
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 43.8
    grid = draws.view(200, 100)
    for a, b in ((grid[:, :-1], grid[:, 1:]), (grid[:-1], grid[1:])):
        pairs = torch.stack([a.reshape(-1), b.reshape(-1)])
        assert abs(float(torch.corrcoef(pairs)[0, 1])) < 0.03
    assert uniforms([7, -1, 2**64 - 1, 2**40], [3, 5, 5, 1]).unique().numel() == 3
    assert uniforms([9, 7], [8, 3])[1] == uniforms([7], [3])[0]


def reference(logits: torch.Tensor, setting: tuple[float, int, float]) -> torch.Tensor:
    """Probabilities (rows, vocabulary) after the warpers of Transformers."""
    temperature, top_k, top_p = setting
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    return warpers(torch.zeros(1, 1, dtype=torch.long), logits).double().softmax(-1)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("vocabulary", [12, 3000])
def test_tokens_are_drawn_as_transformers_draws_them(
    setting: tuple[float, int, float], vocabulary: int
) -> None:
    """Chi-square of 20,000 draws against the warpers' probabilities."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 2.5 * torch.randn(1, vocabulary, generator=generator)
    draws = 20_000
    temperature, top_k, top_p = setting
    settings = [Sampling(1, temperature, top_k, top_p, seed) for seed in range(draws)]
    tokens = torch.cat(
        [
            sample(logits.expand(2000, -1), settings[i : i + 2000], [3] * 2000)
            for i in range(0, draws, 2000)
        ]
    )
    expected = reference(logits, setting)[0] * draws
    counts = tokens.bincount(minlength=vocabulary).double()
    assert bool((counts[expected == 0] == 0).all()), "a filtered token was drawn"
    # Rare tokens are pooled, so that the statistic follows its distribution.
    common = expected >= 5
    seen = torch.cat([counts[common], counts[~common].sum()[None]])
    due = torch.cat([expected[common], expected[~common].sum()[None]])
    seen, due = seen[due > 0], due[due > 0]
    freedom = len(due) - 1
    if freedom == 0:
        assert seen[0] == draws
        return
    statistic = float(((seen - due) ** 2 / due).sum())
    # Wilson-Hilferty: four standard deviations above the mean.
    assert (statistic / freedom) ** (1 / 3) < 1 - 2 / (9 * freedom) + 4 * (2 / (9 * freedom)) ** 0.5


def test_kept_tokens_are_those_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kept token, and no other, can be drawn: the uniform is swept from 0 to 1."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 40, generator=generator)
    # Ties, as bf16 logits have them, also across the edge of top-k.
    logits[1] = (logits[1] * 2).round() / 2
    sweep = torch.linspace(0, 1, 30_000, dtype=torch.float64)[:-1]
    monkeypatch.setattr(module, "_CANDIDATES", (8, 20))
    monkeypatch.setattr(module, "_BLOCK", 3)
    for temperature, top_k, top_p in SETTINGS:
        expected = reference(logits, (temperature, top_k, top_p))
        for row in range(4):
            many = logits[row].expand(len(sweep), -1)
            drawn = module._draw(many, sweep, temperature, top_k, top_p)
            frequency = drawn.bincount(minlength=40).double() / len(sweep)
            if row == 1 and top_p < 1:
                # Which of the tied tokens at the edge stays is anyone's choice.
                frequency, wanted = (
                    torch.stack([p[logits[1] == v].sum() for v in logits[1].unique()])
                    for p in (frequency, expected[row])
                )
            else:
                wanted = expected[row]
            assert torch.allclose(frequency, wanted, atol=2e-4), (temperature, top_k, top_p, row)


@pytest.mark.parametrize("setting", [(1.0, 0, 0.999), (3.0, 0, 0.9), (1.0, 20, 0.9), (1.0, 4, 1.0)])
def test_few_candidates_and_a_full_sort_agree(
    setting: tuple[float, int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(2)
    # From flat to peaked: some rows find their nucleus early, others late.
    peaked = torch.linspace(0.3, 5, 300)[torch.randperm(300, generator=generator)]
    logits = torch.randn(300, 5000, generator=generator) * peaked[:, None]
    logits = logits.bfloat16().float()
    settings = [Sampling(1, *setting, seed) for seed in range(300)]
    steps = list(range(300))
    monkeypatch.setattr(module, "_CANDIDATES", ())
    whole = sample(logits, settings, steps)
    for few in ((1,), (64, 100), (1024, 4000)):
        monkeypatch.setattr(module, "_CANDIDATES", few)
        assert torch.equal(sample(logits, settings, steps), whole)


def test_ties_past_the_candidates_are_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 tokens share the k-th logit: all may be drawn. 200 share the nucleus: the first may."""
    sweep = torch.linspace(0, 1, 5000, dtype=torch.float64)[:-1]
    tied = torch.full((500,), -9.0)
    tied[torch.randperm(500, generator=torch.Generator().manual_seed(0))[:100]] = 1.0
    drawn = module._draw(tied.expand(len(sweep), -1), sweep, 1.0, 2, 1.0)
    assert torch.equal(drawn.unique(), (tied == 1).nonzero()[:, 0])
    level = torch.full((500,), -torch.inf)
    level[torch.randperm(500, generator=torch.Generator().manual_seed(1))[:200]] = 1.0
    monkeypatch.setattr(module, "_CANDIDATES", (64,))
    drawn = module._draw(level.expand(len(sweep), -1), sweep, 1.0, 0, 0.3)
    assert torch.equal(drawn.unique(), (level == 1).nonzero()[:60, 0])


@pytest.mark.parametrize("length", [4, 5000])
def test_a_draw_on_a_border_takes_a_token_with_weight(length: int) -> None:
    weights = torch.zeros(5, length)
    weights[:, 1] = weights[:, 2] = 1.0
    # 1.0 stands for a draw just under it that rounding has put on the total.
    draws = torch.tensor([0.0, 0.49, 0.5, 0.99, 1.0], dtype=torch.float64)
    assert module._invert(weights, draws).tolist() == [1, 1, 2, 2, 2]


def test_a_row_does_not_depend_on_the_others() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(24, 700, generator=generator)
    settings = [Sampling(1, *SETTINGS[i % 8], seed=i) for i in range(23)] + [Sampling(1)]
    steps = [i % 5 for i in range(24)]
    together = sample(logits, settings, steps)
    assert together[-1] == logits[-1].argmax()
    order = torch.randperm(24, generator=generator)
    mixed = sample(logits[order], [settings[i] for i in order], [steps[i] for i in order])
    assert torch.equal(mixed, together[order])
    for row in range(24):
        assert sample(logits[row : row + 1], [settings[row]], [steps[row]])[0] == together[row]


def test_many_rows_are_drawn_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(40, 500, generator=torch.Generator().manual_seed(4))
    settings = [Sampling(1, 1.0, 0, 0.9 if i % 3 else 1.0, i) for i in range(40)]
    whole = sample(logits, settings, [2] * 40)
    same = [Sampling(1, 1.0, seed=i) for i in range(40)]
    plain = sample(logits, same, [2] * 40)
    monkeypatch.setattr(module, "_WORKING_LOGITS", 3000)
    assert torch.equal(sample(logits, settings, [2] * 40), whole)
    assert torch.equal(sample(logits, same, [2] * 40), plain)


def test_a_tiny_temperature_is_greedy_and_infinities_are_never_drawn() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.99, -torch.inf]])
    for top_k, top_p in ((0, 1.0), (2, 1.0), (0, 0.9)):
        settings = [Sampling(1, 1e-30, top_k, top_p, seed) for seed in range(50)]
        assert bool((sample(logits.expand(50, -1), settings, [0] * 50) == 1).all())
    hot = [Sampling(1, 1e6, seed=seed) for seed in range(500)]
    assert sorted(sample(logits.expand(500, -1), hot, [0] * 500).unique().tolist()) == [0, 1, 2]
