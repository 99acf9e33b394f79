"""The small search that the resilience benchmark disturbs, and what it comes to undisturbed."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from loralab import durable
from loralab.bench.resilience.child import Child, Launcher
from loralab.errors import UserError

GENERATIONS = 6
SLOW: Mapping[str, Any] = {
    "evolution": {"population": 24},
    "generation": {"max_new_tokens": 60},
}
"""A generation long enough for a signal or a kill to meet it."""
_MODEL = "model"
_ADAPTERS = ("adapter", "checkpoints/final")


@dataclass
class Scene:
    """One config, its undisturbed run, and the processes that run it again.

    seconds: that the undisturbed run took.
    """

    folder: Path
    launcher: Launcher
    config: Path
    reference: Path
    seconds: float
    _numbers: Iterator[int]

    @classmethod
    def of(cls, folder: Path, launcher: Launcher, name: str = "plain", **changes: Any) -> Scene:
        """Run a config undisturbed, twice: two ends that differ would prove nothing later.

        folder: where `save_model` has put the model; what is made stands there.
        """
        scene = cls.planned(folder, launcher, name, **changes)
        for path in (scene.reference, scene.new()):
            child = scene.start(path)
            if child.ended() != 0:
                raise UserError(f"bench resilience: the undisturbed run failed: {child.said}")
            scene.seconds = child.seconds
            why = scene.difference(path)
            if why is not None:
                raise UserError(f"bench resilience: two undisturbed runs differ: {why}")
        return scene

    @classmethod
    def planned(cls, folder: Path, launcher: Launcher, name: str, **changes: Any) -> Scene:
        """A config that has not been run."""
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(config(folder, **changes), sort_keys=False))
        return cls(folder, launcher, file, folder / f"{name}-undisturbed", 0.0, count())

    def new(self) -> Path:
        """A directory for another run, not there yet."""
        return self.folder / f"{self.config.stem}-{next(self._numbers)}"

    def start(self, path: Path, prepare: str | None = None, **options: Any) -> Child:
        """Begin the run in a directory, or go on with the one that is there, as a user would."""
        argv: list[Any] = ["run", self.config, "--run-dir", path]
        if (path / "config.yaml").exists():
            argv.append("--resume")
        return self.launcher.start(argv, prepare, **options)

    def difference(self, path: Path, logs: bool = True) -> str | None:
        """What a finished run has that the undisturbed one has not, None if it lost nothing and its
        adapters and its journal are the same bytes. logs: whether each generation is told of."""
        for name in ("journal.jsonl", *(f"{f}/adapter_model.safetensors" for f in _ADAPTERS)):
            if not (path / name).exists():
                return f"{name} is not there"
            if (path / name).read_bytes() != (self.reference / name).read_bytes():
                return f"{name} differs"
        told = [row["generation"] for row in durable.read_lines(path / "metrics.jsonl")]
        if logs and told != list(range(GENERATIONS + 1)):
            return f"metrics.jsonl tells of generations {told}"
        if logs and _answered(path) != _answered(self.reference):
            return "completions.jsonl has other lines"
        if not (path / "report.html").exists():
            return "report.html is not there"
        return None

    def kept(self, path: Path) -> bool:
        """Whether what a stopped run has of its journal is what the undisturbed one has there."""
        file, whole = path / "journal.jsonl", (self.reference / "journal.jsonl").read_bytes()
        return not file.exists() or whole.startswith(file.read_bytes())


def _answered(path: Path) -> Counter[tuple[Any, ...]]:
    """How often completions.jsonl tells of each answer."""
    keys = ("generation", "phase", "split", "example")
    rows = durable.read_lines(path / "completions.jsonl")
    return Counter(tuple(row[key] for key in keys) for row in rows)


def config(folder: Path, **changes: Any) -> dict[str, Any]:
    """A short search on the model in `folder`, on CPU; seconds long. changes: of its sections."""
    values: dict[str, Any] = {
        "kind": "evolve",
        "name": "resilience",
        "model": str(folder / _MODEL),
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "task": {"name": "conciseness"},
        "adapter": {"rank": 4, "alpha": 8.0},
        "evolution": {
            "generations": GENERATIONS,
            "population": 4,
            "eval_every": 2,
            "optimizer": {"name": "momentum", "lr": 1.0},
        },
        "generation": {"max_new_tokens": 12},
        "guard": {"prompts": ["the Moon"], "every": 2},
    }
    for name, section in changes.items():
        old = values.get(name)
        both = isinstance(old, Mapping) and isinstance(section, Mapping)
        values[name] = {**old, **section} if both and old is not None else section
    return values


def save_model(folder: Path, seed: int = 0) -> None:
    """A Llama of two layers with random weights, large enough for logits to differ, and a tokenizer
    of characters: some answers end early, so members' lengths, and with them rewards, differ."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from torch import nn
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = string.printable
    vocabulary = {name: place for place, name in enumerate(("<bos>", "<eos>", "<pad>", *letters))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}:{% endif %}"
    )
    shape = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(shape)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.35)
        # One answer in a dozen tokens ends.
        model.lm_head.weight.data[1] *= 2.0
    model.save_pretrained(folder / _MODEL)
    tokenizer.save_pretrained(folder / _MODEL)
