"""Pipelines of small stages on data of few words, for tests of what runs them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
from loralab import config as configs
from loralab import pipeline
from loralab.config import PipelineConfig
from loralab.evolution.events import Notice
from loralab.run import Run
from loralab.stages.digest import content_digest

ALL = ("pretrain", "sft", "dpo", "verifier", "evolve", "warm", "eval")


def write_data(path: Path) -> Path:
    """Stories, reviews and preferences of few words, in a folder that is there."""
    # The two answers in every story: each is a token then, and the models find them.
    said = (" negative", " positive")
    stories = [f"the {tiny.words(3 + i % 5, i)}{said[i % 2]}" for i in range(90)]
    (path / "stories.txt").write_text("##".join(stories))
    (path / "sst2").mkdir()
    for split, count in (("train", 12), ("test", 5)):
        rows = [
            f"{tiny.words(3, i)} {'bad' if i % 2 else 'good'}\t{1 - i % 2}" for i in range(count)
        ]
        (path / "sst2" / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    pairs = [
        {
            "chosen": f"\n\nHuman: say {tiny.words(1, i)}\n\nAssistant: {tiny.words(3, i + 50)}",
            "rejected": f"\n\nHuman: say {tiny.words(1, i)}\n\nAssistant: {tiny.words(3, i + 99)}",
        }
        for i in range(12)
    ]
    (path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return path


def values_for(data: Path, stages: tuple[str, ...] = ALL) -> dict[str, Any]:
    task = {"name": "sst2", "options": {"path": "inputs.sst2", "style": "plain"}}
    training = {"steps": 4, "batch_size": 2, "lr": 1e-2, "max_length": 128, "save_every": 2}
    short = {"max_new_tokens": 2}
    corpus = {"path": "inputs.stories", "separator": "##", "test_share": 0.1}
    every: dict[str, Any] = {
        "pretrain": {
            "config": "pretrain-tiny",
            "decoder": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 256,
            },
            "tokenizer": {"vocab_size": 320},
            "corpus": {"0": corpus},
            "training": {"steps": 16, "lr": 2e-2, "batch_size": 4, "max_length": 64},
            "evaluation": {"limit": 4, "every": None, "prompts": ["the "]},
            "generation": {"max_new_tokens": 4},
        },
        "sft": {
            "kind": "sft",
            "model": "stages.pretrain.model",
            "task": task,
            "adapter": {"rank": 4, "alpha": 8.0},
            "training": {**training, "steps": 6},
            "evaluation": {"limit": 2},
            "generation": short,
        },
        "dpo": {
            "kind": "dpo",
            "model": "stages.sft.model",
            "data": {"path": "inputs.pairs"},
            "adapter": {"rank": 2, "alpha": 4.0},
            "training": training,
            "evaluation": {"limit": 1},
            "dpo": {"texts": 1},
            "generation": short,
        },
        "verifier": {
            "kind": "verifier",
            "model": "stages.dpo.model",
            "task": task,
            "solutions": {"examples": 6, "samples": 4, "temperature": 1.0},
            "verifier": {"candidates": 2},
            "training": training,
            "evaluation": {"limit": 2},
            "generation": short,
        },
        "evolve": {
            "kind": "evolve",
            "model": "stages.dpo.model",
            "task": task,
            "evolution": {
                "generations": 2,
                "population": 2,
                "samples_per_generation": 2,
                "test_samples": 2,
                "eval_every": 1,
            },
            "generation": short,
            "engine": {"backend": "torch"},
        },
        "warm": {
            "kind": "evolve",
            "model": "stages.pretrain.model",
            "task": task,
            "adapter": {
                "rank": 4,
                "alpha": 8.0,
                "init": {"name": "warm_start", "options": {"path": "stages.sft.adapter"}},
            },
            "evolution": {
                "generations": 1,
                "population": 2,
                "samples_per_generation": 1,
                "test_samples": 1,
            },
            "generation": short,
            "engine": {"backend": "torch"},
        },
        "eval": {
            "kind": "eval",
            "models": {
                "pretrain": "stages.pretrain.model",
                "sft": "stages.sft.model",
                "sft-adapter": {
                    "model": "stages.pretrain.model",
                    "adapter": "stages.sft.adapter",
                },
                "evolve": {"model": "stages.dpo.model", "adapter": "stages.evolve.adapter"},
            },
            "measures": {
                "stories": {"corpus": corpus, "limit": 3},
                "text": {
                    "task": {"name": "text", "options": {"path": "inputs.stories"}},
                    "limit": 60,
                },
                "sst2": {"task": task, "limit": 2, "generation": short},
                "tries": {
                    "task": task,
                    "limit": 2,
                    "generation": {**short, "temperature": 1.0},
                    "samples": 3,
                    "k": [2],
                },
            },
        },
    }
    return {
        "kind": "pipeline",
        "name": "tiny",
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "inputs": {
            "stories": str(data / "stories.txt"),
            "sst2": str(data / "sst2"),
            "pairs": str(data / "pairs.jsonl"),
        },
        "stages": {name: every[name] for name in stages},
    }


def made(values: dict[str, Any], **changes: Any) -> PipelineConfig:
    """Changes by dotted key, a double underscore for each dot."""
    values = copy.deepcopy(values)
    for key, value in changes.items():
        at = values
        *path, last = key.split("__")
        for part in path:
            at = at[part]
        at[last] = value
    config = configs.parse(values, "c.yaml")
    assert isinstance(config, PipelineConfig)
    return config


def go(
    config: PipelineConfig, path: Path, on_event: Callable[[Any], None] | None = None
) -> tuple[Run, Any, list[str]]:
    notices: list[str] = []

    def listen(event: Any) -> None:
        if isinstance(event, Notice):
            notices.append(event.text)
        if on_event is not None:
            on_event(event)

    run, result = pipeline.start(config, path, listen)
    return run, result, notices


def contents(path: Path) -> dict[str, str]:
    return {
        str(file.relative_to(path)): content_digest([file])
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != ".lock"
    }
