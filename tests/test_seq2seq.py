"""Encoder-decoders: rows and their ends, the loss of an update, and a run that comes back."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import load_file

import tiny
from loralab import pipeline
from loralab.config import Seq2SeqConfig, parse
from loralab.errors import UserError
from loralab.gradient.events import StepDone
from loralab.gradient.rows import IGNORED
from loralab.gradient.seq2seq import answer, collate, ended, plain_prompt, seq2seq
from loralab.models.load import load_seq2seq
from loralab.run import Run
from test_sft import same_tensors, without_times


def t5() -> Any:
    """With random weights of a size at which answers differ."""
    config = tf.T5Config(
        vocab_size=tiny.VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        pad_token_id=tiny.PAD,
        eos_token_id=tiny.EOS,
        decoder_start_token_id=tiny.PAD,
        dropout_rate=0.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tf.T5ForConditionalGeneration(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.25)
    return model


def tokenizer() -> Any:
    """Ends texts itself, as T5's does."""
    made = tiny.tokenizer()
    made.bos_token = None
    from tokenizers.processors import TemplateProcessing

    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", tiny.EOS)]
    )
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny T5, and dialogues whose summary is their first word, twice."""
    path = tmp_path_factory.mktemp("seq2seq")
    t5().save_pretrained(path / "model")
    tokenizer().save_pretrained(path / "model")
    draw = random.Random(0)
    for split, count in (("train", 40), ("test", 6)):
        made = []
        for _ in range(count):
            words = tiny.words(draw.randint(2, 5), draw.randint(0, 10**6))
            first = words.split()[0]
            made.append({"dialogue": words, "summary": f"{first} {first}"})
        (path / f"{split}.json").write_text(json.dumps(made))
    return path


def config_for(folder: Path, **changes: Any) -> Seq2SeqConfig:
    values: dict[str, Any] = {
        "kind": "seq2seq",
        "name": "tiny",
        "model": str(folder / "model"),
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "task": {"name": "samsum", "options": {"path": str(folder), "style": "plain"}},
        "adapter": {"rank": 4, "alpha": 8.0, "dropout": 0.1},
        "training": {"steps": 6, "batch_size": 4, "lr": 1e-2, "save_every": 4, "max_length": 64},
        "evaluation": {"limit": 4, "every": 3},
        "generation": {"max_new_tokens": 6},
        "target_length": 8,
    }
    for key, change in changes.items():
        both = isinstance(change, dict) and isinstance(values.get(key), dict)
        values[key] = {**values[key], **change} if both else change
    made = parse(values, "test")
    assert isinstance(made, Seq2SeqConfig)
    return made


def run_it(path: Path, config: Seq2SeqConfig, stop_at: int | None = None) -> Run:
    steps: list[int] = []

    def note(event: Any) -> None:
        if isinstance(event, StepDone):
            steps.append(event.step)

    fresh = not (path / "config.yaml").exists()
    values = config.to_dict()
    with Run.create(path, values) if fresh else Run.resume(path, values) as run:
        seq2seq(config, run, note, lambda: len(steps) + 1 == stop_at)
    return run


def losses(run: Run) -> list[float]:
    return [row["loss"] for row in run.metrics() if "loss" in row]


def test_rows_end_once_and_padding_is_not_learned() -> None:
    ends, plain = tokenizer(), tiny.tokenizer()
    for made in (ends, plain):
        ids = ended(made, "ab cd")
        assert (ids.count(tiny.EOS), ids[-1]) == (1, tiny.EOS)
    records = [
        {"input_ids": [5, 6, tiny.EOS], "labels": [7, tiny.EOS]},
        {"input_ids": [5, tiny.EOS], "labels": [7, 8, 9, tiny.EOS]},
    ]
    # Where padding and end are one token, the end is learned and the padding is not.
    batch = collate(records, tiny.EOS)
    assert batch["labels"].tolist() == [[7, 1, IGNORED, IGNORED], [7, 8, 9, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["input_ids"].tolist() == [[5, 6, 1], [5, 1, 1]]


def test_a_run_learns_saves_and_can_be_loaded(folder: Path, tmp_path: Path) -> None:
    config = config_for(
        folder,
        prefix="gh gh ",
        training={"steps": 30, "batch_size": 8, "lr": 3e-2},
        evaluation={"every": None},
    )
    run, result = pipeline.start(config, tmp_path / "run", lambda event: None)
    assert result.complete
    run = Run.open(run.path)
    before, after = (
        next(row for row in run.metrics() if row.get("phase") == phase)
        for phase in ("before", "after")
    )
    assert set(after) >= {"held_out_rouge1", "held_out_rouge2", "held_out_rougeL"}
    assert after["held_out_reward"] == pytest.approx(after["held_out_rougeL"])
    assert sum(losses(run)[-5:]) < 0.8 * sum(losses(run)[:5])
    assert (run.path / "report.html").is_file()
    assert before["held_out_correct"] is None

    model, words = load_seq2seq(str(folder / "model"), "float32")
    loaded = PeftModel.from_pretrained(model, run.adapter).eval()
    answers = [row for row in run.completions() if row["phase"] == "after"]
    assert all(row["prompt"].startswith("gh gh Summarize") for row in answers)
    sources = [row["prompt"] for row in answers]
    again = answer(loaded, words, sources, config, range(len(sources)))
    assert [c.text for c in again] == [row["completion"] for row in answers]
    config_on_disk = json.loads((run.adapter / "adapter_config.json").read_text())
    assert config_on_disk["task_type"] == "SEQ_2_SEQ_LM"


@pytest.mark.parametrize(
    "changes",
    [{}, {"adapter": {"type": "sinelora", "dropout": 0.0}}, {"full": True, "adapter": None}],
    ids=["lora", "sinelora", "full"],
)
def test_a_stopped_run_goes_on_to_the_same_end(
    changes: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    config = config_for(folder, **changes)
    whole = run_it(tmp_path / "whole", config)
    run_it(tmp_path / "cut", config, stop_at=2)
    cut = run_it(tmp_path / "cut", config)
    assert losses(cut) == losses(whole)
    assert without_times(cut) == without_times(whole)
    part = "model/model.safetensors" if config.full else "adapter/adapter_model.safetensors"
    assert same_tensors(load_file(cut.path / part), load_file(whole.path / part))


def test_an_update_s_loss_is_the_mean_over_its_tokens(folder: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "adapter": {"dropout": 0.0},
        "evaluation": {"limit": 1, "every": None},
    }
    runs = [
        run_it(
            tmp_path / str(size),
            config_for(
                folder,
                training={"batch_size": size, "grad_accumulation": 6 // size, "steps": 3},
                **changes,
            ),
        )
        for size in (6, 2)
    ]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), abs=1e-4)


def test_the_first_loss_is_transformers_own(folder: Path, tmp_path: Path) -> None:
    # One update that sees every row once.
    config = config_for(
        folder,
        adapter={"dropout": 0.0},
        training={"batch_size": 40, "steps": 1},
        evaluation={"limit": 1, "every": None},
    )
    run = run_it(tmp_path / "run", config)
    model, words = load_seq2seq(str(folder / "model"), "float32")
    from loralab import tasks

    task = tasks.get("samsum", path=str(folder), style="plain")
    records = [
        {
            "input_ids": ended(words, plain_prompt(task.prompt(example)))[:64],
            "labels": ended(words, str(task.gold(example)).strip()),
        }
        for example in task.examples("train")
    ]
    with torch.no_grad():
        expected = float(model(**collate(records, words.pad_token_id)).loss)
    assert losses(run)[0] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_does_not_depend_on_its_neighbours(folder: Path, temperature: float) -> None:
    config = config_for(folder, generation={"temperature": temperature})
    model, words = load_seq2seq(str(folder / "model"), "float32")
    sources = [tiny.words(count, count) for count in (3, 9, 5)]
    together = answer(model, words, sources, config, [1, 2, 3])
    for at, source in enumerate(sources):
        assert answer(model, words, [source], config, [at + 1]) == [together[at]]
    assert len({completion.text for completion in together}) > 1
    assert all(c.tokens[-1:] == (tiny.EOS,) or len(c.tokens) == 6 for c in together)


def test_stop_texts_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"generation\.stop: none"):
        config_for(folder, generation={"stop": ["\n"]})


def test_a_decoder_is_refused(folder: Path, tmp_path: Path) -> None:
    tiny.model("llama").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    config = config_for(folder, model=str(tmp_path / "model"))
    with pytest.raises(UserError, match="model"):
        pipeline.start(config, tmp_path / "run", lambda event: None)
