"""Two real processes train as one does: the same losses, one run directory, signals, resume."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import TrainingArguments

import test_classify
import test_seq2seq
import test_verifier
import tiny
from loralab import pipeline, ranks
from loralab.config import TrainingConfig, parse
from loralab.errors import UserError
from loralab.gradient.loop import arguments, checkpoints
from loralab.gradient.shares import BLANK, Shares, shared_loader
from loralab.run import Run
from test_classify import folder as classify_folder
from test_dpo import assistant, human
from test_seq2seq import folder as seq2seq_folder
from test_verifier import folder as verifier_folder

assert classify_folder
assert seq2seq_folder
assert verifier_folder


@pytest.mark.parametrize("world", [1, 2, 3])
def test_shares_together_are_the_batches_of_one_process(world: int) -> None:
    batches = [list(batch) for batch in BatchSampler(range(11), 4, drop_last=False)]
    parts = [list(Shares(BatchSampler(range(11), 4, False), rank, world)) for rank in range(world)]
    assert [[i for part in step for i in part] for step in zip(*parts, strict=True)] == batches
    for step in zip(*parts, strict=True):
        sizes = [len(part) for part in step]
        assert max(sizes) - min(sizes) <= 1


def test_a_process_without_a_row_runs_one_that_does_not_count() -> None:
    rows = [{"labels": [i, i]} for i in range(5)]

    def collate(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {"labels": torch.tensor([record["labels"] for record in records])}

    for mask in (True, False):
        loader = shared_loader(
            rows, SequentialSampler(rows), 2, collate, torch.device("cpu"), 0, 2, mask
        )
        *whole, last = list(loader)
        assert [batch["labels"].tolist() for batch in whole] == [[[0, 0]], [[2, 2]]]
        assert not any(BLANK in batch for batch in whole)
        assert last[BLANK]
        assert last["labels"].tolist() == ([[-100, -100]] if mask else [[0, 0]])


def test_one_process_takes_one_gpu_however_many_there_are(tmp_path: Path) -> None:
    class OnFour(TrainingArguments):  # type: ignore[misc]
        @cached_property
        def _setup_devices(self) -> torch.device:
            self._n_gpu = 4
            return torch.device("cpu")

    settings = TrainingConfig(steps=1, batch_size=6)
    made = arguments(OnFour, torch.nn.Linear(1, 1), settings, 0, tmp_path, False, keep=False)
    assert made.train_batch_size == 6
    assert made.n_gpu == 1


def test_alone_nothing_is_asked_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert (ranks.world(), ranks.rank(), ranks.share(3)) == (1, 0, 1.0)
    assert ranks.summed([1.5]) == [1.5]
    assert ranks.agreed(True)
    assert not ranks.agreed(False)
    ranks.wait()
    ranks.tell("x")
    ranks.leave()


def test_a_launcher_that_started_one_process_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    assert not ranks.left_alone()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert not ranks.left_alone()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert ranks.left_alone()
    monkeypatch.setenv("RANK", "0")
    assert not ranks.left_alone()


def test_what_is_given_to_a_run_beside_goes_nowhere(tmp_path: Path) -> None:
    with Run.create(tmp_path / "run", {"kind": "x"}) as run:
        run.log_metrics({"step": 1})
        before = {path.name: path.read_bytes() for path in run.path.iterdir()}
        with Run.beside(run.path) as other:
            assert not other.leads
            assert other.metrics() == [{"step": 1}]
            other.log_metrics({"step": 2})
            other.log_finding({"what": "x"})
            other.note(x=1)
            other.write("a.txt", "b")
            scratch = other.timings_path
            scratch.write_text("{}")
        assert not scratch.exists()
        assert {path.name: path.read_bytes() for path in run.path.iterdir()} == before


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "grpo", "task": {"name": "countdown"}, "training": {"steps": 1}},
        {"kind": "distill", "task": {"name": "countdown"}},
    ],
)
def test_kinds_of_one_process_say_so_before_anything_runs(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    config = parse({"name": "x", "model": "nowhere", **values}, "test")
    with pytest.raises(UserError, match=r"runs in one process, not in 2: .* accelerate launch"):
        pipeline.start(config, tmp_path / "run", lambda event: None)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["FSDP", "DeepSpeed"])
def test_weights_in_parts_are_refused_before_anything_runs(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for key, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(key, value)
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    config = parse(values_of(tmp_path, "sft"), "test")
    with pytest.raises(UserError, match=f"{name} gives each process a part of the weights"):
        pipeline.start(config, tmp_path / "run", lambda event: None)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, rows and pairs; 5 training rows of each, so that a batch of 2 leaves one."""
    path = tmp_path_factory.mktemp("ranks")
    tiny.model("llama").save_pretrained(path / "model")
    tiny.tokenizer().save_pretrained(path / "model")
    rows = [
        {"prompt": tiny.words(2 + i % 5, i), "completion": tiny.words(1 + i % 7, 99 + i)}
        for i in range(7)
    ]
    start = [human(tiny.words(2 + i, i)) for i in range(7)]
    pairs = [
        {
            "chosen": text + assistant(tiny.words(1 + i % 5, 50 + i)),
            "rejected": text + assistant(tiny.words(2 + i % 3, 90 + i)),
        }
        for i, text in enumerate(start)
    ]
    for name, lines in (("rows", rows), ("pairs", pairs)):
        (path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (path / "text.txt").write_text("\n\n".join(tiny.words(30, i) for i in range(12)))
    return path


def values_of(folder: Path, kind: str) -> dict[str, Any]:
    training = {"steps": 7, "batch_size": 2, "lr": 2e-2, "max_length": 40, "save_every": 3}
    common = {
        "kind": kind, "name": "tiny", "model": str(folder / "model"), "dtype": "float32",
        "device": "cpu", "threads": 1, "training": training,
        "adapter": {"rank": 4, "alpha": 8.0}, "generation": {"max_new_tokens": 4},
        "evaluation": {"limit": 2, "every": 3},
    }  # fmt: skip
    share = {"test_share": 0.25}
    if kind == "sft":
        return common | {"data": {"path": str(folder / "rows.jsonl"), **share}}
    if kind == "dpo":
        return common | {"data": {"path": str(folder / "pairs.jsonl"), **share}}
    del common["model"], common["adapter"]
    return common | {
        "decoder": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
                    "num_attention_heads": 2, "num_key_value_heads": 2},
        "tokenizer": {"vocab_size": 300},
        "corpus": [{"path": str(folder / "text.txt"), "separator": "\n\n", "test_share": 0.2}],
        "model": "decoder",
    }  # fmt: skip


@contextmanager
def launched(
    folder: Path, values: Mapping[str, Any], out: Path, *more: str
) -> Iterator[subprocess.Popen[str]]:
    """The run in two processes, as torchrun under `accelerate launch` makes them."""
    config = folder / f"{out.name}.yaml"
    config.write_text(yaml.safe_dump(dict(values)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
        "--master_port", str(port), "-m", "loralab", "run",
        *(more or (str(config), "--run-dir", str(out))),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def losses_of(run: Run) -> list[float]:
    return [row["loss"] for row in run.metrics() if "loss" in row]


TOLD = {"dpo": ("margin", "accuracy", "chosen_reward"), "sft": (), "pretrain": ()}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("sft", {}),
        pytest.param("sft", {"grad_accumulation": 2}, marks=pytest.mark.slow),
        pytest.param("sft", {"fast": False}, marks=pytest.mark.slow),
        pytest.param("sft", {"gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param("dpo", {}, marks=pytest.mark.slow),
        pytest.param("pretrain", {}, marks=pytest.mark.slow),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x) or "plain",
)
def test_two_processes_train_as_one(
    folder: Path, tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    values = values_of(folder, kind)
    values["training"] |= changes
    one, two = both_ways(folder, values, tmp_path)
    for wanted, row in zip(one.metrics(), two.metrics(), strict=True):
        assert row.keys() == wanted.keys()
        for name in ("tokens", "grad_norm", "lr", "held_out_correct", *TOLD[kind]):
            if name in wanted:
                assert row[name] == pytest.approx(wanted[name], rel=1e-3, abs=1e-5), name
    assert [r["completion"] for r in two.completions()] == [
        r["completion"] for r in one.completions()
    ]
    made = "model/model" if kind == "pretrain" else "adapter/adapter_model"
    tensors = [load_file(run.path / f"{made}.safetensors") for run in (one, two)]
    for name, tensor in tensors[0].items():
        torch.testing.assert_close(tensors[1][name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["verifier", "classify", "seq2seq"])
def test_two_processes_train_these_as_one_too(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(f"{kind}_folder")
    makers = {"verifier": test_verifier, "classify": test_classify, "seq2seq": test_seq2seq}
    values = makers[kind].config_for(folder).to_dict()
    values["adapter"] |= {"dropout": 0.0}
    values["training"] |= {"steps": 7, "batch_size": 5}
    if kind == "verifier":
        values["verifier"] |= {"lm_weight": 0.3}
    one, two = both_ways(folder, values, tmp_path)
    for name in ("held_out_correct", "tokens", "judged_right"):
        wanted = [row[name] for row in one.metrics() if name in row]
        assert [row[name] for row in two.metrics() if name in row] == pytest.approx(wanted), name


def both_ways(folder: Path, values: Mapping[str, Any], tmp_path: Path) -> tuple[Run, Run]:
    """The run made by one process and by two; their losses are the same."""
    with launched(folder, values, tmp_path / "two") as process:
        pipeline.start(parse(values, "test"), tmp_path / "one", lambda event: None)
        said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    one, two = Run.open(tmp_path / "one"), Run.open(tmp_path / "two")
    losses = losses_of(one)
    assert losses_of(two) == pytest.approx(losses, abs=2e-5)
    assert len(set(losses)) == 7
    assert (two.path / "report.html").is_file()
    assert said.count("step 7/7") == 1
    return one, two


@pytest.mark.slow
def test_a_signal_stops_all_and_the_run_goes_on_with_two_or_one(
    folder: Path, tmp_path: Path
) -> None:
    values = values_of(folder, "sft")
    values["training"] |= {"steps": 150, "save_every": 1000}
    values["evaluation"] = {"limit": 1}
    run = tmp_path / "run"
    with launched(folder, values, run) as process:
        while not (run / "metrics.jsonl").exists() or len(losses_of(Run.open(run))) < 5:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    assert "stopping after the step in flight" in said
    stopped = Run.open(run)
    done = len(losses_of(stopped))
    assert 5 <= done < 150, said
    assert [path.name for path in checkpoints(stopped.checkpoints)] == [f"checkpoint-{done}"]
    states = sorted(p.name for p in checkpoints(stopped.checkpoints)[0].glob("rng_state*"))
    assert states == ["rng_state_0.pth", "rng_state_1.pth"]
    assert (run / "report.html").is_file()

    with launched(folder, values, run, "--resume", "--run-dir", str(run)) as again:
        said, _ = again.communicate(timeout=200)
    assert again.returncode == 0, said
    whole, _ = pipeline.start(parse(values, "test"), tmp_path / "one", lambda event: None)
    assert losses_of(Run.open(run)) == pytest.approx(losses_of(whole), abs=1e-3)


@pytest.mark.slow
def test_a_number_that_is_not_finite_ends_all_of_them(folder: Path, tmp_path: Path) -> None:
    values = values_of(folder, "sft")
    values["training"] |= {"lr": 1e30, "max_grad_norm": 0.0}
    with launched(folder, values, tmp_path / "run") as process:
        said, _ = process.communicate(timeout=200)
    assert process.returncode != 0
    assert "loralab: step 2: the loss is nan" in said or "gradient" in said
    run = Run.open(tmp_path / "run")
    assert "not finite" in run.findings()[0]["what"]
    assert (run.path / "report.html").is_file()
    assert (run.adapter / "adapter_model.safetensors").is_file()
