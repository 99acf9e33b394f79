"""Makes PEFT know loralab's adapter types, without importing PEFT before the user does.

PEFT finds the classes of an adapter by the `peft_type` of its saved configuration. Its enum of
types is closed and `register_peft_method` takes no other name, but the tables it looks in are
plain dictionaries. A process that loads a saved LS-LoRA or SineLoRA adapter needs one line,
`import loralab.adapters`, before or after `import peft`.
"""

from __future__ import annotations

import enum
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_MODULES = ("loralab.adapters.spline", "loralab.adapters.sine")


# Not a StrEnum: PEFT takes a type's name from what follows the dot of str(type).
class AdapterType(str, enum.Enum):  # noqa: UP042
    """PEFT types of loralab's own; equal to, and hashed as, their plain strings."""

    LSLORA = "LSLORA"
    SINELORA = "SINELORA"


def register(kind: AdapterType, config: type[Any], model: type[Any]) -> None:
    """Enter an adapter type in PEFT's tables. Imports PEFT."""
    mapping = importlib.import_module("peft.mapping")
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind] = config
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[kind] = model
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[kind] = model.prefix


def register_when_imported() -> None:
    """Register now if PEFT is already imported, otherwise as soon as it has been."""
    if "peft.mapping" in sys.modules:
        _import_ours()
    elif not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())


def _import_ours() -> None:
    for name in _MODULES:
        importlib.import_module(name)


class _PeftFinder(MetaPathFinder):
    """Finds PEFT as the other finders do, and has our types registered once it has run."""

    _searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft" or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching = False
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _import_ours()

        loader.exec_module = exec_module
        return spec
