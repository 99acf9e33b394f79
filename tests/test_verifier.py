"""The verifier: its loss by the formula, ways to pick, a run on a tiny model, saved and loaded."""

from __future__ import annotations

import json
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import binary_cross_entropy, cross_entropy

import tiny
from loralab import pipeline
from loralab.adapters.attach import attach
from loralab.config import AdapterConfig, TrainingConfig, VerifierConfig, parse
from loralab.config.verifier import HeadConfig
from loralab.errors import UserError
from loralab.gradient.dpo import Layout
from loralab.gradient.events import Remark, StepDone
from loralab.gradient.loop import checkpoints
from loralab.gradient.rows import Row
from loralab.gradient.verifier import (
    Solution,
    Verifier,
    balanced,
    new_head,
    pick,
    train_verifier,
)
from loralab.gradient.verify import SCORES, load_verifier
from loralab.run import Run


def some_solutions(count: int = 10) -> list[Solution]:
    """A solution is right where its first token is even."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for i in range(count):
        ids = torch.randint(3, 67, (9,), generator=generator).tolist()
        prompt, answer = tuple(ids[: 2 + i % 3]), tuple(ids[5 : 6 + i % 4])
        row = Row(prompt + answer, (-100,) * len(prompt) + answer)
        made.append(Solution(str(i), row, answer[0] % 2 == 0))
    return made


def verifier_of(settings: TrainingConfig, random: bool) -> tuple[Verifier, Layout]:
    model = attach(tiny.model("llama"), AdapterConfig(rank=4, alpha=8.0), 0)
    layout = Layout.of(model.get_base_model(), tiny.tokenizer(), settings)
    head = new_head(model)
    if random:
        generator = torch.Generator().manual_seed(1)
        for name, parameter in [*model.named_parameters(), *head.named_parameters()]:
            if "lora_B" in name or (parameter.requires_grad and "lora" not in name):
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return Verifier(model, head, layout, settings.batch_size), layout


def plain_values(verifier: Verifier, row: Row) -> torch.Tensor:
    """One sequence, through the model as it is."""
    out = verifier.model(input_ids=torch.tensor([row.input_ids]), output_hidden_states=True)
    values = verifier.head(out.hidden_states[-1][0])[:, 0]
    return values[torch.tensor(row.labels) != -100]


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(("at", "lm_weight"), [("token", 0.0), ("end", 0.0), ("token", 0.5)])
def test_the_first_step_is_that_of_the_formula(fast: bool, at: Any, lm_weight: float) -> None:
    settings = TrainingConfig(steps=1, batch_size=10, lr=1e-3, max_grad_norm=0.0, fast=fast)
    verifier, layout = verifier_of(settings, random=True)
    solutions, losses, lm = some_solutions(), [], []
    for one in solutions:
        p = plain_values(verifier, one.row).sigmoid()
        p = p[-1:] if at == "end" else p
        losses.append(binary_cross_entropy(p, torch.full_like(p, float(one.right))))
        logits = verifier.model(input_ids=torch.tensor([one.row.input_ids])).logits[0, :-1]
        targets = torch.tensor(one.row.labels)[1:]
        lm.append(cross_entropy(logits, targets, reduction="none")[targets != -100])
    plain = torch.stack(losses).mean() + lm_weight * torch.cat(lm).mean()
    plain.backward()
    trained = [*verifier.model.parameters(), *verifier.head.parameters()]
    norm = float(torch.stack([p.grad.norm() for p in trained if p.grad is not None]).norm())
    for parameter in trained:
        parameter.grad = None
    history = train_verifier(
        verifier, solutions, settings, HeadConfig(at=at, lm_weight=lm_weight), 0, layout=layout
    )
    assert history.losses[0] == pytest.approx(float(plain), abs=1e-5)
    assert history.grad_norms[0] == pytest.approx(norm, rel=1e-4)
    assert "value_head" not in dict(verifier.model.named_modules())


def test_it_begins_at_ln_2_and_scores_as_one_sequence_does() -> None:
    settings = TrainingConfig(steps=12, batch_size=4, lr=2e-2)
    verifier, layout = verifier_of(settings, random=False)
    solutions = some_solutions(20)
    assert verifier.score([one.row for one in solutions]) == [0.5] * 20
    history = train_verifier(verifier, solutions, settings, HeadConfig(), 0, layout=layout)
    assert history.losses[0] == pytest.approx(log(2), abs=1e-6)
    scores = verifier.score([one.row for one in solutions])
    plain = [float(plain_values(verifier, one.row)[-1].sigmoid()) for one in solutions]
    assert scores == pytest.approx(plain, abs=1e-5)
    sides = [score > 0.5 for score in scores]
    assert sum(s == one.right for s, one in zip(sides, solutions, strict=True)) >= 16


def test_one_label_alone_teaches_nothing() -> None:
    settings = TrainingConfig(steps=1, batch_size=4)
    verifier, layout = verifier_of(settings, random=False)
    wrong = [one for one in some_solutions() if not one.right]
    with pytest.raises(UserError, match="sampled solutions are wrong"):
        train_verifier(verifier, wrong, settings, HeadConfig(), 0, layout=layout)


def test_the_loss_of_the_next_token_is_not_made_of_a_head_that_is_not_known() -> None:
    settings = TrainingConfig(steps=1, batch_size=4)
    verifier, layout = verifier_of(settings, random=True)
    verifier.model.config.final_logit_softcapping = 30.0
    with pytest.raises(UserError, match=r"verifier\.lm_weight.*soft-capped"):
        train_verifier(
            verifier, some_solutions(), settings, HeadConfig(lm_weight=0.5), 0, layout=layout
        )
    train_verifier(verifier, some_solutions(), settings, HeadConfig(), 0, layout=layout)


def test_balanced_keeps_as_many_of_both_by_the_seed() -> None:
    many = some_solutions(40)
    kept = balanced(many, 3)
    rights = sum(one.right for one in kept)
    assert 2 * rights == len(kept)
    assert rights == min(sum(one.right for one in many), sum(not one.right for one in many))
    assert balanced(many, 3) == kept != balanced(many, 4)
    assert [one.example for one in kept] == sorted((one.example for one in kept), key=int)


def test_ways_to_pick() -> None:
    def group(*answers: tuple[bool, str | None]) -> list[Solution]:
        return [Solution("x", Row((1,), (1,)), right, answer) for right, answer in answers]

    groups = [
        group((False, "a"), (True, "b"), (False, "a")),
        group((False, None), (True, "c"), (False, None)),
        group((False, None), (False, None), (True, None)),
    ]
    scores = [[0.1, 0.9, 0.2], [0.8, 0.7, 0.1], [0.3, 0.3, 0.3]]
    picked = pick(groups, scores)
    assert picked.verify == pytest.approx(1 / 3)
    assert picked.majority == pytest.approx(1 / 3)
    assert picked.pass_at_1 == pytest.approx(1 / 3)
    assert picked.pass_at_n == 1
    # 18 pairs of right (.9 .7 .3) and wrong (.1 .2 .8 .1 .3 .3): 6 + 5 + 3 + 2/2 of them.
    assert picked.auc == pytest.approx(15 / 18)
    # verify is 1, 0, 0; pass@1 a third of each; the difference is of the same examples.
    over = picked.scores["over_pass_at_1"]
    assert (over.value, over.error) == (pytest.approx(0), pytest.approx(3**-0.5 / 3**0.5))
    assert picked.scores["over_majority"].value == pytest.approx(0)
    assert picked.scores["pass_at_1"].error == pytest.approx(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and prompts of which it sometimes finds the answer."""
    path = tmp_path_factory.mktemp("verifier")
    tiny.model("llama").save_pretrained(path / "model")
    tiny.tokenizer().save_pretrained(path / "model")
    rows = [{"prompt": tiny.words(3, i), "completion": "bc"} for i in range(24)]
    (path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def config_for(folder: Path, **changes: Any) -> VerifierConfig:
    values: dict[str, Any] = {
        "kind": "verifier",
        "name": "tiny",
        "model": str(folder / "model"),
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "task": {
            "name": "supervised",
            "options": {"path": str(folder / "rows.jsonl"), "test_share": 0.4},
        },
        "solutions": {"examples": 14, "samples": 24, "temperature": 1.0},
        "verifier": {"candidates": 8},
        "adapter": {"rank": 4, "alpha": 8.0},
        "training": {"steps": 10, "batch_size": 8, "lr": 2e-2, "max_length": 40, "save_every": 4},
        "evaluation": {"every": 5},
        "generation": {"max_new_tokens": 1},
        **changes,
    }
    made = parse(values, "test")
    assert isinstance(made, VerifierConfig)
    return made


def test_long_candidates_are_judged_and_long_solutions_are_not_learned_from(
    folder: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": tiny.words(2 + i % 5, i), "completion": "bc"} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    options = {"path": str(tmp_path / "rows.jsonl"), "test_share": 0.4}

    def config_with(longest: int) -> VerifierConfig:
        return config_for(
            folder,
            task={"name": "supervised", "options": options},
            training={"steps": 2, "batch_size": 8, "max_length": longest},
        )

    said: list[str] = []
    pipeline.start(
        config_with(6),
        tmp_path / "run",
        lambda e: said.append(e.text) if isinstance(e, Remark) else None,
    )
    run = Run.open(tmp_path / "run")

    def lengths(name: str) -> list[int]:
        records = [json.loads(line) for line in (run.path / name).open()]
        return [len(r["prompt"]) + len(r["tokens"]) for r in records]

    tested = len({json.loads(line)["example"] for line in (run.path / "candidates.jsonl").open()})
    assert len(lengths("candidates.jsonl")) == 8 * tested
    assert max(lengths("candidates.jsonl")) > 6
    long = sum(length > 6 for length in lengths("solutions.jsonl"))
    whole = len(lengths("solutions.jsonl"))
    assert 0 < long < whole == 14 * 24
    assert run.environment()["rows"] <= whole - long
    assert any(f"{long} of {whole} solutions are longer" in text for text in said)
    with pytest.raises(UserError, match=r"all 336 .* longer than training\.max_length 3"):
        pipeline.start(config_with(3), tmp_path / "none", lambda event: None)


def without_times(run: Run) -> list[dict[str, Any]]:
    times = ("seconds", "tokens_per_second")
    return [{k: v for k, v in row.items() if k not in times} for row in run.metrics()]


def test_a_run_picks_better_than_chance_resumes_and_is_loaded_again(
    folder: Path, tmp_path: Path
) -> None:
    config = config_for(folder)
    _, result = pipeline.start(config, tmp_path / "whole", lambda event: None)
    assert result.complete
    run = Run.open(tmp_path / "whole")
    before, *steps, after = run.metrics()
    assert 0 < before["pass_at_1"] == after["pass_at_1"] < 0.5
    assert after["verify"] > after["pass_at_1"] + 0.1
    assert after["over_pass_at_1"] == pytest.approx(after["verify"] - after["pass_at_1"])
    assert 0 < after["errors"]["over_pass_at_1"] < after["over_pass_at_1"]
    assert before["verify"] == before["pass_at_1"]
    assert after["verify"] <= after["pass_at_n"]
    assert after["auc"] > 0.8
    assert {"judged_right", "loss"} <= steps[0].keys()
    assert steps[4]["pass_at_1"] == after["pass_at_1"]
    assert (run.path / "report.html").is_file()

    verifier, _ = load_verifier(run.path, config)
    records = [json.loads(line) for line in (run.path / "candidates.jsonl").open()]
    rows = [
        Row(tuple(r["prompt"] + r["tokens"]), (-100,) * len(r["prompt"]) + tuple(r["tokens"]))
        for r in records
    ]
    stored = [score for line in (run.path / SCORES).open() for score in json.loads(line)["scores"]]
    assert len(set(stored)) > 10
    assert verifier.score(rows) == pytest.approx(stored, abs=1e-5)

    def stop(event: Any) -> None:
        if isinstance(event, StepDone) and event.step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.start(config, tmp_path / "cut", stop)
    assert len(checkpoints(Run.open(tmp_path / "cut").checkpoints)) == 1
    pipeline.resume(tmp_path / "cut", None, lambda event: None)
    assert without_times(Run.open(tmp_path / "cut")) == without_times(run)
