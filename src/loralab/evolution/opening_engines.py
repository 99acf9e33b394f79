"""Which engine a search runs on: the config's `engine.name`."""

from __future__ import annotations

from loralab.config import EvolveConfig
from loralab.evolution.workbench import Workbench, open_batched


def open_workbench(config: EvolveConfig) -> Workbench:
    """The workbench with the engine that the config names.

    Raises:
        UserError: the engine cannot be had here, or cannot run the model.
    """
    match config.engine.name:
        case "batched":
            return open_batched(config)
        case "sglang":
            from loralab.evolution.opening_sglang import open_sglang

            return open_sglang(config)
        case "vllm":
            from loralab.evolution.opening_vllm import open_vllm

            return open_vllm(config)
