"""The processes of one run, as `accelerate launch` or `torchrun` start them.

Each is told by its environment which of how many it is (RANK, WORLD_SIZE). Process 0 leads: it
owns the run directory, evaluates, and tells the others where the run is. The others train beside
it and wait where it does more than they do. Alone, every function here does nothing.

What is agreed on between processes goes as small tensors in main memory (gloo), also where the
gradients go through NCCL.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from math import isfinite

PATIENCE = timedelta(days=2)
"""How long a process waits for the others: an evaluation by process 0 may take hours."""


def world() -> int:
    """How many processes there are; 1 where none were launched together."""
    launched = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
    return int(os.environ["WORLD_SIZE"]) if launched else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return int(os.environ["RANK"]) if world() > 1 else 0


def left_alone() -> bool:
    """Whether `accelerate launch --num_processes N` started this process alone.

    So it does where it sees no several GPUs and is not given --multi_gpu (Accelerate 1.15).
    """
    names = ("MASTER_ADDR", "ACCELERATE_MIXED_PRECISION")
    return "RANK" not in os.environ and all(name in os.environ for name in names)


def sharding() -> str | None:
    """What the launcher wants the weights cut up by, if anything."""
    wanted = ("FSDP", "DeepSpeed")
    return next(
        (n for n in wanted if os.environ.get(f"ACCELERATE_USE_{n.upper()}", "").lower() == "true"),
        None,
    )


def join(on_cpu: bool) -> None:
    """Meet the other processes. on_cpu: no GPU is used, though there may be one."""
    if world() == 1:
        return
    import torch
    from torch import distributed

    if distributed.is_initialized():
        return
    if not on_cpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "gloo" if on_cpu else "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend, timeout=PATIENCE)


def leave() -> None:
    """Part from the others, after the last thing done together."""
    if world() == 1:
        return
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def wait() -> None:
    """Until every process has come here."""
    summed([0.0])


def summed(values: Sequence[float]) -> list[float]:
    """The sums over all processes, in float64; each gives as many values."""
    if world() == 1 or not values:
        return list(values)
    import torch
    from torch import distributed

    total = torch.tensor(values, dtype=torch.float64)
    distributed.all_reduce(total)
    return [float(value) for value in total]


def agreed(mine: bool) -> bool:
    """Whether any process says so."""
    return summed([float(mine)])[0] > 0


def worst(value: float) -> float:
    """This value, or one that is no finite number if any process has one."""
    total = summed([value if not isfinite(value) else 0.0])[0]
    return value if isfinite(total) else total


def share(count: int) -> float:
    """What a mean over this process's `count` things weighs in the mean over all processes'.

    Gradients are averaged over processes with equal weights, so a process that has n_p of n things
    gives its mean times n_p * world / n; that is 1 where all have as many.
    """
    total = summed([float(count)])[0]
    return count * world() / total if total else 0.0


def tell(text: str) -> None:
    """Give a text to the others, who wait for it in `told`."""
    if world() > 1:
        _broadcast(text)


def told() -> str:
    """The text that process 0 gives with `tell`."""
    return _broadcast("")


def _broadcast(text: str) -> str:
    import torch
    from torch import distributed

    data = torch.tensor(list(text.encode()), dtype=torch.uint8)
    size = torch.tensor([len(data)])
    distributed.broadcast(size, src=0)
    if rank():
        data = torch.empty(int(size), dtype=torch.uint8)
    distributed.broadcast(data, src=0)
    return bytes(data.tolist()).decode()
