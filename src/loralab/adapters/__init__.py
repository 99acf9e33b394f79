"""Adapters. After `import loralab.adapters` PEFT loads the types defined here by their name.

    import loralab.adapters
    from peft import PeftModel
    model = PeftModel.from_pretrained(base, "my-ls-lora")

The names below are imported when first used: tensors on disk (`loralab.adapters.state`) need no
PEFT.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from loralab.adapters.peft_types import register_when_imported
from loralab.models.quiet import hide_kernel_advice

if TYPE_CHECKING:
    from loralab.adapters.inits import initialize
    from loralab.adapters.sine import SineLoraConfig
    from loralab.adapters.spline import LSLoraConfig

__all__ = ["LSLoraConfig", "SineLoraConfig", "initialize"]

_HOME = {
    "LSLoraConfig": "loralab.adapters.spline",
    "SineLoraConfig": "loralab.adapters.sine",
    "initialize": "loralab.adapters.inits",
}

hide_kernel_advice()
register_when_imported()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
