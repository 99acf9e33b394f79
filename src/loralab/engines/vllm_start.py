"""Starting vLLM in this process, and leaving the process as it was around it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from loralab.engines.memory import available_memory
from loralab.engines.vllm_members import allowed_rank
from loralab.errors import UserError

CPU_CACHE = 4 * 10**9
"""Bytes of key-value cache on a CPU, where vLLM's own choice is 0.92 of the machine's memory."""
CPU_BATCHED_TOKENS = 512
"""Tokens of a step on a CPU, whose LoRA gathers the factors anew for every token: less processor
time than with 2048 (loralab.bench.vllm_peer)."""

_ENVIRONMENT = {
    # In this process: what is scheduled when then depends on the requests alone.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # A request whose logits hold NaN says so in its metrics.
    "VLLM_COMPUTE_NANS_IN_LOGITS": "1",
    # Its log goes to stdout, where a live display or JSON is.
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Set before vLLM is imported, where the user has not."""


@dataclass(frozen=True)
class Options:
    """How vLLM is started.

    max_loras: members in one batch. max_rank: of any adapter. sequences: in one batch, context:
    tokens of prompt and completion, None: vLLM's and the model's own. memory_gb: of the key-value
    cache in 10**9 bytes; None: what vLLM takes of a GPU, 4 of a CPU. tensor_parallel: GPUs that
    share the model. eager: no CUDA graphs: starts sooner, generates slower.
    """

    max_loras: int = 16
    max_rank: int = 16
    sequences: int | None = None
    context: int | None = None
    memory_gb: float | None = None
    tensor_parallel: int = 1
    eager: bool = False


def import_vllm() -> Any:
    """The vllm module, its environment set first. Raises UserError if it is not installed."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        with as_it_was():
            import vllm
    except ImportError as error:
        raise UserError(
            f"engine vllm: vLLM cannot be imported ({error}); pip install 'loralab[vllm]', in an "
            "environment of its own (docs/serving-vllm.md)"
        ) from error
    return vllm


def start(vllm: Any, source: str, dtype: str, options: Options) -> Any:
    """`vllm.LLM` over a model directory or hub name. Raises UserError with vLLM's own reason."""
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    settings: dict[str, Any] = {
        # On a CPU rows without an adapter are given the last slot's: it has to stay empty.
        "max_loras": options.max_loras + on_cpu,
        "max_cpu_loras": options.max_loras + on_cpu,
        "max_lora_rank": allowed_rank(options.max_rank),
        "tensor_parallel_size": options.tensor_parallel,
        "enforce_eager": options.eager,
        "max_model_len": options.context,
    }
    memory = None if options.memory_gb is None else int(options.memory_gb * 1e9)
    if on_cpu and memory is None and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        memory = min(CPU_CACHE, available_memory() // 2)
    if memory is not None:
        settings["kv_cache_memory_bytes"] = memory
    if options.sequences is not None:
        settings["max_num_seqs"] = options.sequences
    if on_cpu:
        settings["max_num_batched_tokens"] = max(CPU_BATCHED_TOKENS, options.sequences or 256)
    try:
        with as_it_was():
            return vllm.LLM(
                source,
                dtype=dtype,
                skip_tokenizer_init=True,
                enable_lora=True,
                seed=0,
                # Never pickles, which it would take where there is nothing else.
                load_format="safetensors",
                use_tqdm_on_load=False,
                # The metrics of a request are where NaN is told.
                disable_log_stats=False,
                **settings,
            )
    except Exception as error:
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise UserError(
            f"engine vllm: vLLM {vllm.__version__} does not start on {source}: "
            f"{type(error).__name__}: {said}"
        ) from error


def check_device(wanted: str) -> None:
    """Raise UserError where the config's `device` is not what the installed vLLM is built for."""
    import_vllm()
    from vllm.platforms import current_platform

    built = "cpu" if current_platform.is_cpu() else "cuda"
    if wanted not in ("auto", built):
        raise UserError(
            f"device is {wanted!r}, but the vLLM installed here runs on {built}; use device: auto, "
            "or another build of vLLM"
        )


def device_name() -> str:
    """What vLLM runs on: "CPU", or the GPU's name."""
    from vllm.platforms import current_platform

    return "CPU" if current_platform.is_cpu() else str(current_platform.get_device_name())


@contextmanager
def as_it_was() -> Iterator[None]:
    """Put back what vLLM changes around itself: on a CPU it makes torch.set_num_threads do nothing
    and has every child process preload an allocator; and it seeds the global generators."""
    threads, preload = torch.set_num_threads, os.environ.get("LD_PRELOAD")
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads = threads
        if preload is None:
            os.environ.pop("LD_PRELOAD", None)
        else:
            os.environ["LD_PRELOAD"] = preload
