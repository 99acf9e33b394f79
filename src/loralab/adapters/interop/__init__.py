"""Adapters in other programs' formats: PEFT, mlx-lm, llama.cpp's GGUF, merged models."""

from loralab.adapters.interop.gguf import read_gguf, write_gguf
from loralab.adapters.interop.mlx import read_mlx, write_mlx
from loralab.adapters.interop.peft import Reading, read_peft

__all__ = ["Reading", "read_gguf", "read_mlx", "read_peft", "write_gguf", "write_mlx"]
