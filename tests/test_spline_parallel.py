"""Nonlinear adapters over two processes train as one process over the whole batch does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, multiprocessing, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import tiny
from loralab.adapters import LSLoraConfig, SineLoraConfig
from loralab.adapters.spline_diagnostics import spline_diagnostics, spline_layers
from loralab.adapters.spline_penalty import whole

RANKS = 2
IDS = torch.randint(4, 67, (4, 7), generator=torch.Generator().manual_seed(1))


CONFIGS: dict[str, Callable[[float], Any]] = {
    "gated": lambda w: LSLoraConfig(target_modules=["q_proj"], gated=True, spline_reg_weight=w),
    "weight": lambda w: LSLoraConfig(
        target_modules=["q_proj"], space="weight", spline_reg_weight=w
    ),
    "sine": lambda _: SineLoraConfig(target_modules=["q_proj"], sinelora_frequency=3.0),
}


def made(adapter: str, weight: float = 0.5) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(tiny.model("llama"), CONFIGS[adapter](weight))
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


def work(rank: int, kind: str, adapter: str, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    weight = 0.0 if kind == "fsdp1" else 0.5
    alone, model = made(adapter, weight), made(adapter, weight)
    step(alone, alone, IDS)
    wrapped = WRAP[kind](model)
    step(model, wrapped, IDS.chunk(RANKS)[rank])
    if kind == "fsdp1":
        with FullyShardedDataParallel.summon_full_params(wrapped):
            check(model, alone, made(adapter))
    else:
        check(model, alone, made(adapter))
    dist.destroy_process_group()
    Path(f"{store.removeprefix('file://')}-{rank}-agrees").touch()


def trained(model: Any) -> list[Tensor]:
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return [p.detach() for layer in layers for p in layer.parameters() if p.requires_grad]


def check(model: Any, alone: Any, fresh: Any) -> None:
    triples = list(zip(trained(model), trained(alone), trained(fresh), strict=True))
    assert len(triples) > 3
    for got, want, before in triples:
        torch.testing.assert_close(whole(got), want)
        assert (want - before).abs().max() > 1e-6
    if spline_layers(alone):
        for name, numbers in spline_diagnostics(alone).items():
            assert spline_diagnostics(model)[name] == pytest.approx(numbers, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "adapter"), [*((kind, "gated") for kind in WRAP), ("ddp", "weight"), ("ddp", "sine")]
)
def test_two_processes_train_as_one(kind: str, adapter: str, tmp_path: Path) -> None:
    store = f"file://{tmp_path / 'store'}"
    multiprocessing.spawn(work, (kind, adapter, store), nprocs=RANKS)
    assert len(list(tmp_path.glob("*-agrees"))) == RANKS
