"""A tiny Llama on disk that vLLM runs on a CPU, whose attention takes heads of 32 and wider."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

import tiny


def save_tiny(folder: Path) -> Any:
    """Model and tokenizer; returns the model, random in every weight."""
    config = tiny.CONFIGS["llama"]()
    config.head_dim = 32
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                torch.nn.init.normal_(parameter, std=0.25)
            else:
                parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return model.eval()
