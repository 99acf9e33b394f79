"""LS-LoRA over two processes trains as one process over the whole batch does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import Tensor, multiprocessing, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import tiny
from loralab.adapters import LSLoraConfig
from loralab.adapters.spline_diagnostics import spline_diagnostics, splines
from loralab.adapters.spline_penalty import whole

RANKS = 2
IDS = torch.randint(4, 67, (4, 7), generator=torch.Generator().manual_seed(1))


def made(weight: float = 0.5) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(
        tiny.model("llama"),
        LSLoraConfig(target_modules=["q_proj"], gated=True, spline_reg_weight=weight),
    )
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.train()


def step(model: Any, run: Callable[..., Any], ids: Tensor) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    run(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def sharded(model: Any) -> Any:
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def flattened(model: Any) -> Any:
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


WRAP: dict[str, Callable[[Any], Any]] = {
    "ddp": nn.parallel.DistributedDataParallel,
    "fsdp2": sharded,
    # No pull: FSDP 1 hides where a shard of the values begins.
    "fsdp1": flattened,
}


def work(rank: int, kind: str, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    weight = 0.0 if kind == "fsdp1" else 0.5
    alone, model = made(weight), made(weight)
    step(alone, alone, IDS)
    wrapped = WRAP[kind](model)
    step(model, wrapped, IDS.chunk(RANKS)[rank])
    if kind == "fsdp1":
        with FullyShardedDataParallel.summon_full_params(wrapped):
            check(model, alone)
    else:
        check(model, alone)
    dist.destroy_process_group()


def check(model: Any, alone: Any) -> None:
    fresh = splines(made())
    for name, own in splines(alone).items():
        assert (own.values - fresh[name].values).abs().max() > 1e-5
        pairs = zip(splines(model)[name].parameters(), own.parameters(), strict=True)
        for got, want in pairs:
            torch.testing.assert_close(whole(got.detach()), want.detach())
        assert spline_diagnostics(model)[name] == pytest.approx(
            spline_diagnostics(alone)[name], rel=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRAP)
def test_two_processes_train_as_one(kind: str, tmp_path: Path) -> None:
    store = f"file://{tmp_path / 'store'}"
    multiprocessing.spawn(work, (kind, store), nprocs=RANKS)
