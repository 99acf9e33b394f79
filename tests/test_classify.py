"""Classifiers: the last token by the mask, the loss of an update, and a run that comes back."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel

import tiny
from loralab import pipeline
from loralab.config import ClassifyConfig, parse
from loralab.errors import UserError
from loralab.gradient.classify import collate, encode, last_token_head, predict
from loralab.gradient.loop import checkpoints
from loralab.gradient.session import Summed
from loralab.models.load import load_classifier
from loralab.run import Run
from test_sft import same_tensors, without_times

CLASSES = ("negative", "positive")


def rows(count: int, seed: int) -> str:
    """The class is in the last word."""
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        label = draw.randint(0, 1)
        words = f"{tiny.words(draw.randint(1, 4), draw.randint(0, 10**6))} {('gh', 'ab')[label]}"
        lines.append(json.dumps({"sentence": words, "label": label}))
    return "\n".join(lines) + "\n"


def encoder() -> Any:
    """A BERT, which takes the mean of each batch whatever it is told of the others."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tf.BertConfig(
            vocab_size=tiny.VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=88, max_position_embeddings=96, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, initializer_range=0.2,
        )  # fmt: skip
        return tf.BertForSequenceClassification(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models whose padding token is their end token, and sentences for them."""
    path = tmp_path_factory.mktemp("classify")
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    for kind in ("llama", "gpt2", "bert"):
        made = encoder() if kind == "bert" else tiny.model(kind)
        made.save_pretrained(path / kind)
        tokenizer.save_pretrained(path / kind)
    (path / "train.jsonl").write_text(rows(48, 1))
    (path / "test.jsonl").write_text(rows(24, 2))
    return path


def config_for(folder: Path, kind: str = "llama", **changes: Any) -> ClassifyConfig:
    values: dict[str, Any] = {
        "kind": "classify",
        "name": "tiny",
        "model": str(folder / kind),
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "task": {"name": "sst2", "options": {"path": str(folder)}},
        "adapter": {"rank": 4, "alpha": 8.0, "dropout": 0.1},
        "training": {"steps": 6, "batch_size": 4, "lr": 1e-2, "save_every": 4},
        "evaluation": {"limit": 12, "every": 4},
    }
    for key, change in changes.items():
        both = isinstance(change, dict) and isinstance(values.get(key), dict)
        values[key] = {**values[key], **change} if both else change
    made = parse(values, "test")
    assert isinstance(made, ClassifyConfig)
    return made


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_the_last_token_is_the_last_of_the_mask(kind: str, folder: Path) -> None:
    model, tokenizer = load_classifier(str(folder / kind), CLASSES, "float32")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == model.config.pad_token_id
    eos = tokenizer.eos_token_id
    texts = [[0, 9, 21], [0, 33, 8, 17, eos, eos], [0, 40, eos, 12], [0, 7, 7, 7, eos]]
    batch = collate([{"input_ids": ids} for ids in texts], eos)
    body = getattr(model, model.base_model_prefix)
    wanted = torch.stack(
        [model.score(body(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]) for ids in texts]
    )
    with last_token_head(model):
        ours = model(**batch).logits
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-4)
    # Transformers' own takes the last that is not the padding id: wrong where a text ends in it.
    theirs = model(**batch).logits
    right = [torch.allclose(a, b, atol=1e-4) for a, b in zip(theirs, wanted, strict=True)]
    assert right == [True, False, True, False]
    assert "forward" not in vars(model)


def test_the_head_is_drawn_from_the_seed(folder: Path) -> None:
    heads = [
        load_classifier(str(folder / "llama"), CLASSES, "float32", seed=seed)[0].score.weight
        for seed in (1, 1, 2)
    ]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert heads[0].shape == (2, 64)


def run_it(path: Path, config: ClassifyConfig, stop_at: int | None = None) -> Run:
    from loralab.gradient.classify import classify
    from loralab.gradient.events import StepDone

    steps: list[int] = []

    def note(event: Any) -> None:
        if isinstance(event, StepDone):
            steps.append(event.step)

    fresh = not (path / "config.yaml").exists()
    values = config.to_dict()
    with Run.create(path, values) if fresh else Run.resume(path, values) as run:
        classify(config, run, note, lambda: len(steps) + 1 == stop_at)
    return run


def losses(run: Run) -> list[float]:
    return [row["loss"] for row in run.metrics() if "loss" in row]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_run_learns_saves_and_can_be_loaded(kind: str, folder: Path, tmp_path: Path) -> None:
    config = config_for(
        folder, kind, training={"steps": 30, "batch_size": 8}, evaluation={"every": None}
    )
    run, result = pipeline.start(config, tmp_path / "run", lambda event: None)
    assert result.complete
    run = Run.open(run.path)
    before, after = (
        next(row for row in run.metrics() if row.get("phase") == phase)
        for phase in ("before", "after")
    )
    assert after["held_out_accuracy"] == after["held_out_correct"] > 0.7
    assert after["held_out_accuracy"] > before["held_out_accuracy"]
    assert 0.6 < after["held_out_f1"] <= 1
    assert sum(losses(run)[-5:]) < 0.7 * sum(losses(run)[:5])
    assert (run.path / "report.html").is_file()

    model, tokenizer = load_classifier(str(folder / kind), CLASSES, "float32", seed=99)
    loaded = PeftModel.from_pretrained(model, run.adapter).eval()
    answers = [row for row in run.completions() if row["phase"] == "after"]
    texts = [row["prompt"] for row in answers]
    assert set(texts[0].split()) <= {a + b for a in "abcdefgh" for b in "abcdefgh"}
    classes = predict(loaded, tokenizer, texts, 5, 96)
    assert [CLASSES[number] for number in classes] == [row["completion"] for row in answers]


@pytest.mark.parametrize(
    "changes",
    [{}, {"adapter": {"type": "lslora", "dropout": 0.0}}, {"full": True, "adapter": None}],
    ids=["lora", "lslora", "full"],
)
def test_a_stopped_run_goes_on_to_the_same_end(
    changes: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    config = config_for(folder, **changes)
    whole = run_it(tmp_path / "whole", config)
    cut = run_it(tmp_path / "cut", config, stop_at=3)
    assert [p.name for p in checkpoints(cut.checkpoints)] == ["checkpoint-3"]
    cut = run_it(tmp_path / "cut", config)
    assert losses(cut) == losses(whole)
    assert without_times(cut) == without_times(whole)
    if config.full:
        assert (cut.path / "model" / "model.safetensors").is_file()
        return
    from safetensors.torch import load_file

    tensors = [load_file(r.adapter / "adapter_model.safetensors") for r in (cut, whole)]
    assert any("score" in name for name in tensors[0])
    assert same_tensors(*tensors)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_an_update_does_not_depend_on_its_batches(kind: str, folder: Path, tmp_path: Path) -> None:
    runs = [
        run_it(
            tmp_path / str(size),
            config_for(
                folder,
                kind,
                adapter={"dropout": 0.0},
                training={"batch_size": size, "grad_accumulation": 6 // size, "steps": 4},
                evaluation={"limit": 1, "every": None},
            ),
        )
        for size in (6, 2)
    ]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), abs=1e-4)
    norms = [[row["grad_norm"] for row in run.metrics() if "grad_norm" in row] for run in runs]
    assert len(norms[0]) == 4
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_a_share_without_any_row_adds_nothing() -> None:
    model, ids = encoder().train(), torch.tensor([[4, 5, 6]])
    trainer: Any = SimpleNamespace(args=SimpleNamespace(average_tokens_across_devices=False))
    for label in (-100, 1):
        model.zero_grad()
        given = {"input_ids": ids, "labels": torch.tensor([label])}
        value = Summed.compute_loss(trainer, model, given, num_items_in_batch=torch.tensor(3))
        value.backward()
        gradient = model.classifier.weight.grad
        assert value.isfinite()
        assert gradient.isfinite().all()
        assert (float(value) > 0) == bool(gradient.any()) == (label == 1)


def test_what_cannot_be_classified_is_said(folder: Path, tmp_path: Path) -> None:
    config = config_for(folder, task={"name": "countdown", "options": {}})
    with pytest.raises(UserError, match="countdown has no classes"):
        pipeline.start(config, tmp_path / "a", lambda event: None)
    config = config_for(folder, adapter={"init": {"name": "pissa"}})
    with pytest.raises(UserError, match="pissa is for causal language models"):
        pipeline.start(config, tmp_path / "b", lambda event: None)
    with pytest.raises(UserError, match="packing"):
        config_for(folder, training={"packing": True})


def test_a_text_is_never_empty() -> None:
    tokenizer = tiny.tokenizer()
    assert encode(tokenizer, "") == [tiny.BOS]
