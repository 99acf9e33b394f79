"""Pretraining as a run: it learns, it resumes to the same bits, and what it leaves behind."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
from loralab import config as configs
from loralab import pipeline
from loralab.config import PretrainConfig
from loralab.engines.base import Request, Sampling
from loralab.engines.batched import BatchedEngine
from loralab.errors import UserError
from loralab.gradient.events import Evaluated, TrainingEvent
from loralab.gradient.held_out import mean_loss
from loralab.gradient.loop import checkpoints
from loralab.gradient.pretrain import Pretrained, build, pretrain
from loralab.models.decoder import DecoderConfig, DecoderForCausalLM
from loralab.models.load import load
from loralab.run import Run

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stories of few words, and pairs."""
    path = tmp_path_factory.mktemp("pretrain")
    stories = [f"the {tiny.words(2 + i % 9, i)} end" for i in range(120)]
    (path / "stories.txt").write_text("##".join(stories))
    pairs = [{"prompt": f"say {i}: ", "solution": f"it is {i}"} for i in range(20)]
    (path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return path


def config_for(folder: Path, **changes: Any) -> PretrainConfig:
    values: dict[str, Any] = {
        "kind": "pretrain",
        "name": "tiny",
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "decoder": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 48,
        },
        "tokenizer": {"vocab_size": 320},
        "corpus": [{"path": str(folder / "stories.txt"), "separator": "##", "test_share": 0.1}],
        "training": {
            "steps": 9, "batch_size": 3, "lr": 1e-2, "max_length": 32, "save_every": 4,
            "packing": True,
        },
        "evaluation": {"limit": 6, "every": 3, "prompts": ["the ", ""]},
        "generation": {"max_new_tokens": 8, "temperature": 0.8, "top_k": 10},
    }  # fmt: skip
    for key, change in changes.items():
        both = isinstance(change, dict) and isinstance(values.get(key), dict)
        values[key] = {**values[key], **change} if both else change
    made = configs.parse(values, "test")
    assert isinstance(made, PretrainConfig)
    return made


def run_it(
    path: Path, config: PretrainConfig, stop_at: int | None = None
) -> tuple[Pretrained, Run]:
    """Start the run, or resume the one that is there; stop after a step."""
    steps: list[int] = []

    def note(event: TrainingEvent) -> None:
        if hasattr(event, "time_left"):
            steps.append(event.step)

    exists = (path / "config.yaml").exists()
    run = Run.resume(path, config.to_dict()) if exists else Run.create(path, config.to_dict())
    with run:
        return pretrain(config, run, note, lambda: bool(steps) and steps[-1] + 1 == stop_at), run


def without_times(run: Run) -> list[dict[str, Any]]:
    times = ("seconds", "tokens_per_second")
    return [{k: v for k, v in row.items() if k not in times} for row in run.metrics()]


def weights_of(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.path / "model" / "model.safetensors")


EXPERTS = {"decoder": {
    "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 48, "num_experts": 3, "num_experts_per_tok": 2,
    "attention": "fused", "attention_sinks": 2, "cache_size": 48,
}}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [{}, {"training": {"grad_accumulation": 2}}, EXPERTS, {"dtype": "bfloat16"}],
    ids=["plain", "accumulation", "experts", "bf16"],
)
def test_a_resumed_run_ends_in_the_same_bits(
    folder: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = config_for(folder, **changes)
    whole, run = run_it(tmp_path / "whole", config)
    assert whole.complete
    assert len(set(whole.losses)) == 9
    first, cut = run_it(tmp_path / "cut", config, stop_at=2)
    assert (first.complete, first.steps) == (False, 2)
    # Killed without a word after step 6: the checkpoint of step 4 is the last.
    _, cut = run_it(tmp_path / "cut", config, stop_at=6)
    curve = (cut.path / "evaluation.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in curve] == ["step", "0", "3", "6"]
    newest = checkpoints(cut.checkpoints)[-1]
    newest.rename(newest.with_name("lost"))
    assert [path.name for path in checkpoints(cut.checkpoints)] == ["checkpoint-4"]
    last, cut = run_it(tmp_path / "cut", config)
    assert last.complete
    assert last.losses == whole.losses
    assert without_times(cut) == without_times(run)
    assert cut.completions() == run.completions()
    assert (cut.path / "evaluation.csv").read_bytes() == (run.path / "evaluation.csv").read_bytes()
    a, b = weights_of(cut), weights_of(run)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns_and_leaves_a_model_that_loads(folder: Path, tmp_path: Path) -> None:
    config = config_for(folder, training={"steps": 60, "batch_size": 8}, evaluation={"every": 20})
    heard: list[Any] = []
    _, result = pipeline.start(config, tmp_path / "run", heard.append)
    assert result.complete
    run = Run.open(tmp_path / "run")
    with (run.path / "evaluation.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [int(row["step"]) for row in table] == [0, 20, 40, 60]
    losses = [float(row["loss"]) for row in table]
    assert losses[0] == pytest.approx(math.log(320), rel=0.05)
    assert losses[-1] < 0.55 * losses[0]
    assert losses == sorted(losses, reverse=True)
    for row in table:
        assert float(row["perplexity"]) == pytest.approx(math.exp(float(row["loss"])))
    assert int(table[-1]["tokens"]) == run.metrics()[-2]["tokens"] > 60 * 8 * 28
    assert [e.step for e in heard if isinstance(e, Evaluated)] == [0, 20, 40, 60]

    model, tokenizer = load(run.path / "model", dtype="float32")
    assert type(model) is DecoderForCausalLM
    # What is on disk scores and writes what the run said it did.
    texts = [row for row in run.completions() if row["phase"] == "after"]
    settings = config.generation
    engine = BatchedEngine(model, tokenizer, backend="torch")
    again = engine.generate([Request("the ", None, Sampling(max_new_tokens=8))])
    assert again[0].finish_reason in ("stop", "length")
    assert len(texts) == 2
    assert all(len(tokenizer(row["completion"])["input_ids"]) <= 8 + 4 for row in texts)
    assert settings.temperature == 0.8
    page = (run.path / "report.html").read_text()
    assert "Held-out perplexity fell" in page
    assert (run.path / "figures" / "perplexity.png").is_file()


def test_looking_at_it_does_not_change_the_training(folder: Path, tmp_path: Path) -> None:
    often, _ = run_it(tmp_path / "a", config_for(folder, evaluation={"every": 1}))
    never, _ = run_it(tmp_path / "b", config_for(folder, evaluation={"every": None}))
    assert often.losses == never.losses
    other, _ = run_it(tmp_path / "c", config_for(folder, seed=1))
    assert other.losses != never.losses


@pytest.mark.parametrize("changes", [{}, EXPERTS], ids=["plain", "experts"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_fast_step_trains_as_the_plain_one_does(
    folder: Path, tmp_path: Path, changes: dict[str, Any], accumulation: int
) -> None:
    curves = []
    for fast in (True, False):
        config = config_for(
            folder,
            training={
                "fast": fast,
                "packing": False,
                "steps": 5,
                "grad_accumulation": accumulation,
            },
            evaluation={"every": None},
            **changes,
        )  # fmt: skip
        result, _ = run_it(tmp_path / str(fast), config)
        curves.append(result.losses)
    assert curves[0] == pytest.approx(curves[1], abs=2e-4)


def test_sources_mix_by_weight_and_prompts_are_not_learned(folder: Path, tmp_path: Path) -> None:
    corpus = [
        {"path": str(folder / "stories.txt"), "separator": "##", "weight": 1.0},
        {"path": str(folder / "pairs.jsonl"), "format": "pairs", "weight": 3.0},
    ]
    config = config_for(folder, corpus=corpus, training={"steps": 40, "batch_size": 8})
    result, run = run_it(tmp_path / "run", config)
    assert result.losses[-1] < 0.5 * result.losses[0]
    model, tokenizer = load(run.path / "model", dtype="float32")
    asked = Request("say 7: ", None, Sampling(max_new_tokens=12))
    [answer] = BatchedEngine(model, tokenizer, backend="torch").generate([asked])
    assert answer.text.startswith("it is")


def test_the_held_out_loss_is_that_of_plain_rows(folder: Path) -> None:
    model = build(config_for(folder), tiny.tokenizer())
    from loralab.gradient.rows import Row

    generator = torch.Generator().manual_seed(0)
    rows = [
        Row(ids, ids)
        for ids in (
            tuple(torch.randint(3, 60, (5 + i,), generator=generator).tolist()) for i in range(7)
        )
    ]
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row.input_ids])
        total += float(model(ids, labels=ids).loss.detach()) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert mean_loss(model, rows, 3) == pytest.approx(total / count, rel=1e-5)
    assert mean_loss(model, [], 3) is None


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"training": {"max_length": 64}}, "max_length 64 is more than decoder.max_position"),
        ({"decoder": {"cache_size": 16}}, "decoder: cache_size 16 is less than"),
        ({"decoder": {"num_attention_heads": 3}}, "even multiple"),
        ({"tokenizer": {"path": "/nothing/there"}}, "tokenizer.path '/nothing/there'"),
        ({"corpus": []}, "corpus"),
    ],
)
def test_what_a_user_can_mend_is_said_in_one_line(
    folder: Path, tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(UserError, match=match) as caught:
        pipeline.start(config_for(folder, **changes), tmp_path / "run", lambda event: None)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_weights_are_given_to_all_sources_or_none(folder: Path) -> None:
    source = {"path": str(folder / "stories.txt")}
    with pytest.raises(UserError, match="every source of the corpus has a weight, or none"):
        config_for(folder, corpus=[source, {**source, "weight": 2.0}])


@pytest.mark.parametrize(
    ("name", "millions", "fused"),
    [
        ("pretrain-tiny", 1.0, False),
        ("pretrain-29m", 29.1, True),
        ("pretrain-253m", 253.1, False),
        ("pretrain-12gb", 110.1, False),
    ],
)
def test_the_shipped_sizes(name: str, millions: float, fused: bool) -> None:
    config = configs.load(name)
    assert isinstance(config, PretrainConfig)
    with torch.device("meta"):
        shape = DecoderConfig(**config.decoder.model_dump(), vocab_size=config.tokenizer.vocab_size)
        model = DecoderForCausalLM(shape)
    count = sum(p.numel() for p in model.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.1)
    assert any(n.endswith("qkv") for n, _ in model.named_modules()) == fused
    assert config.training.packing
    if name == "pretrain-12gb":
        shape_is = (shape.hidden_size, shape.num_hidden_layers, shape.max_position_embeddings)
        assert shape_is == (768, 12, 1024)
