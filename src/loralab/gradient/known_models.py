"""The models whose code was read: what the fast step may take for granted of them."""

from __future__ import annotations

MODEL_TYPES = frozenset(
    {
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "phi3",
        "olmo2",
        "smollm3",
        "gemma3_text",
        "gpt2",
        "loralab_decoder",
    }
)
"""Their `forward` is backbone, head, loss, and nothing else; positions come from position_ids, and
attention from the interface."""
