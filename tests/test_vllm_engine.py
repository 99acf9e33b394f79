"""The serving contract on the real vLLM, which has an environment of its own: make test-vllm."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from loralab.adapters.state import AdapterState, Factors
from loralab.engines.base import Request, Sampling
from loralab.engines.batched import BatchedEngine
from loralab.engines.vllm import VllmEngine
from loralab.engines.vllm_start import Options, check_device
from loralab.errors import UserError
from serving_contract import (
    ServingContract,
    Subject,
    ending_request,
    poisoned,
    tiny_adapters,
    tiny_prompts,
)
from vllm_tiny import save_tiny

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

OPTIONS = Options(max_loras=3, max_rank=8, sequences=32, context=96, memory_gb=0.1)
"""Fewer places than members: 5 go through 3."""


class TestVllm(ServingContract):
    @pytest.fixture(scope="class")
    @classmethod
    def subject(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
        folder = tmp_path_factory.mktemp("model")
        model = save_tiny(folder)
        engine = VllmEngine(str(folder), "float32", OPTIONS)
        ends = frozenset({tiny.EOS})
        yield Subject(
            engine,
            tiny_adapters(model),
            tiny_prompts(),
            ending=ending_request(engine, ends),
            ends=ends,
            context=96,
            begins="<bos>",
            reference=BatchedEngine(model, tiny.tokenizer(), backend="torch", threads=1),
        )
        engine.close()

    def test_a_member_whose_logits_overflow_fails_alone(self, subject: Subject) -> None:
        requests = subject.requests()
        plain = subject.generate(requests)
        name, state = list(subject.adapters.items())[1]
        # Each number is finite; what they make of a hidden state is not.
        wild = {m: Factors(f.A, f.B * 1e30) for m, f in state.factors.items()}
        subject.engine.load({**subject.adapters, name: AdapterState(wild, state.scaling)})
        for _ in range(2):
            done = subject.engine.generate(requests)
            for request, before, after in zip(requests, plain, done, strict=True):
                if request.adapter == name:
                    assert (after.finish_reason, after.text, after.tokens) == ("error", "", ())
                    assert after.error == f"adapter {name!r}: logits are NaN"
                else:
                    assert after == before
        assert subject.generate(requests) == plain

    def test_no_more_members_are_in_vllm_than_there_are_places(
        self, subject: Subject, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = subject.engine
        assert isinstance(engine, VllmEngine)
        core, held, names = engine._core, list[int](), list[tuple[str, int]]()
        folders = set[Path]()
        add = core.add_lora

        def watched(request: Any) -> Any:
            # What it replaces is gone, and its own file is there to be read.
            assert (Path(request.lora_path) / "adapter_model.safetensors").is_file()
            done = add(request)
            held.append(len(core.list_loras()))
            names.append((request.lora_name, request.lora_int_id))
            folders.add(Path(request.lora_path).parent)
            return done

        monkeypatch.setattr(core, "add_lora", watched)
        for _ in range(2):
            subject.texts(subject.requests())
        assert max(held) == OPTIONS.max_loras < len(subject.adapters)
        assert len(held) == 2 * len(subject.adapters)
        assert len({n for n, _ in names}) == len({i for _, i in names}) == len(names)
        assert not [file for folder in folders for file in folder.rglob("*.safetensors")]
        engine.load({})
        assert not core.list_loras()

    def test_cancelling_leaves_nothing_in_vllm(self, subject: Subject) -> None:
        engine = subject.engine
        assert isinstance(engine, VllmEngine)
        engine.load(subject.adapters)

        def stop(done: int, total: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            engine.generate(subject.requests(40), stop)
        assert not engine._core.has_unfinished_requests()

    def test_a_member_with_nan_is_not_loaded(
        self, subject: Subject, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = subject.engine
        assert isinstance(engine, VllmEngine)
        engine.load({"sick": poisoned(subject.adapters["m1"])})
        monkeypatch.setattr(engine._core, "add_lora", None)
        done = engine.generate([Request("ab", "sick")])[0]
        module = list(subject.adapters["m1"].factors)[-1]
        assert str(done.error).startswith(f"adapter 'sick': B of {module} holds NaN")

    def test_a_member_that_vllm_does_not_load_fails_alone(
        self, subject: Subject, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine, requests = subject.engine, subject.requests()
        assert isinstance(engine, VllmEngine)
        plain, add = subject.generate(requests), engine._core.add_lora
        engine.load(subject.adapters)
        calls = list[int]()

        def picky(request: Any) -> None:
            calls.append(request.lora_int_id)
            if len(calls) == 2:
                raise ValueError("expected target modules\nand more")
            add(request)

        monkeypatch.setattr(engine._core, "add_lora", picky)
        done = engine.generate(requests)
        failed = {r.adapter for r, c in zip(requests, done, strict=True) if c.error is not None}
        assert len(failed) == 1
        for request, before, after in zip(requests, plain, done, strict=True):
            if request.adapter in failed:
                said = (
                    f"adapter {request.adapter!r}: vLLM does not load it: expected target modules"
                )
                assert after.error == said
            else:
                assert after == before

    def test_a_member_stays_while_there_is_room(
        self, subject: Subject, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = subject.engine
        assert isinstance(engine, VllmEngine)
        engine.load({name: subject.adapters[name] for name in ("m0", "m1")})
        asked = [Request(p, n, Sampling(3)) for n in ("m0", "m1") for p in subject.prompts]
        first = engine.generate(asked)
        monkeypatch.setattr(engine._core, "add_lora", None)
        assert engine.generate(asked[::-1])[::-1] == first

    def test_what_it_cannot_do_is_said(self, subject: Subject) -> None:
        engine = subject.engine
        assert isinstance(engine, VllmEngine)
        engine.set_base({})
        with pytest.raises(UserError, match="cannot move base weights"):
            engine.set_base({"model.layers.0.mlp.up_proj": torch.ones(88, 64)})
        with pytest.raises(UserError, match=r"temperature is 2\.5"):
            engine.generate([Request("ab", None, Sampling(2, temperature=2.5))])
        state = tiny.adapter(
            tiny.model("llama"), seed=1, rank=9, names=["model.layers.0.mlp.up_proj"]
        )
        with pytest.raises(UserError, match="adapter 'wide' has rank 9"):
            engine.load({"wide": state})
        with pytest.raises(UserError, match="runs on c"):
            check_device("cuda" if "CPU" in engine.kernel else "cpu")

    def test_the_kernel_names_version_dtype_and_device(self, subject: Subject) -> None:
        import vllm

        assert isinstance(subject.engine, VllmEngine)
        kernel = subject.engine.kernel
        assert kernel.startswith(f"vllm {vllm.__version__} float32 on ")
        assert not kernel.endswith(" ")


def test_a_model_that_vllm_does_not_start_on_is_one_line(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    too_long = Options(max_rank=8, context=10**6)
    with pytest.raises(UserError, match=r"vLLM .* does not start on") as caught:
        VllmEngine(str(tmp_path), "float32", too_long)
    assert "\n" not in str(caught.value)
