"""Train LoRA adapters by gradient or by evolution, and tell whether they work."""

__version__ = "0.1.0"
