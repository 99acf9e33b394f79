"""A search whose members vLLM serves, in this process."""

from __future__ import annotations

from pathlib import Path

import torch

from loralab.adapters.attach import targeted_weights
from loralab.config import EvolveConfig, VllmConfig
from loralab.errors import UserError
from loralab.evolution.workbench import Workbench


def open_vllm(config: EvolveConfig) -> Workbench:
    """Start vLLM on the config's model, and read the weights that the search looks at.

    They are read into this machine's memory, as much again as the model takes on the device.

    Raises:
        UserError: vLLM is not installed, does not start, or cannot run what the config asks for.
    """
    from loralab.engines.vllm import VllmEngine
    from loralab.engines.vllm_start import Options, check_device
    from loralab.models.load import load

    if config.evolution.noise_on == "weights":
        raise UserError(
            "evolution.noise_on: weights moves base weights, which engine vllm cannot; choose B "
            "or AB, or engine.name: batched"
        )
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    check_device(config.device)
    own = config.engine.vllm or VllmConfig()
    options = Options(
        max_loras=own.max_loras,
        max_rank=config.adapter.rank,
        sequences=own.sequences,
        context=own.context,
        memory_gb=config.engine.memory_gb,
        tensor_parallel=own.tensor_parallel,
        eager=own.eager,
    )
    model, _ = load(config.model, config.dtype, "cpu")
    weights = targeted_weights(model, config.adapter)
    del model
    engine = VllmEngine(config.model, config.dtype, options)

    def save_model(directory: Path) -> None:
        raise UserError(f"{directory}: engine vllm holds no changed model to save")

    return Workbench(engine, weights, save_model, close=engine.close)
