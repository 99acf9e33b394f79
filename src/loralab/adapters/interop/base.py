"""What a base model looks like, from its config alone: no weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from loralab.adapters.targets import linear_weights
from loralab.errors import UserError
from loralab.models.load import locate


@dataclass(frozen=True)
class BaseShape:
    """A model's config and its linear modules.

    source: directory or hub name. shapes: (out, in) by module name, the output head included.
    tied_head: the head's name if it shares the embedding's weight.
    """

    source: str
    config: Any
    shapes: Mapping[str, tuple[int, int]]
    tied_head: str | None

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return int(self.config.num_hidden_layers)


def describe_base(name: str) -> BaseShape:
    """Read the config of a model that `loralab.load` knows. Raises UserError if it cannot.

    A .gguf file is converted (once, to the model cache) to learn its names.
    """
    source = locate(name, torch.bfloat16)
    try:
        config = AutoConfig.from_pretrained(source)
        with torch.device("meta"):
            skeleton: Any = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        line = next((x for x in str(error).splitlines() if x.strip()), type(error).__name__)
        where = "" if Path(source).is_dir() else " (not here and not on the hub)"
        raise UserError(f"base model {name!r}{where}: {line}") from error
    weights = linear_weights(skeleton)
    output = skeleton.get_output_embeddings()
    head = next((n for n, m in skeleton.named_modules() if m is output), None)
    if head is not None and isinstance(output, torch.nn.Linear):
        weights[head] = output.weight.detach()
    shapes = {module: (w.shape[0], w.shape[1]) for module, w in weights.items()}
    return BaseShape(source, config, shapes, head if config.tie_word_embeddings else None)
