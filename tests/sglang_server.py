"""SGLang's HTTP server as far as loralab asks it, over a batched engine: no SGLang runs here.

What a request may hold, what an answer holds, routes, keys and options are those in
`sglang_fields.json`, read from the wheel's source; what breaks them is kept in `violations`. Rules
of its that are no fields are written here with the function of sglang 0.5.23 that has them.

As a program it takes the options of `sglang.launch_server` and serves a Transformers model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from loralab.adapters.state import AdapterState
from loralab.engines.base import Completion, Request, Sampling
from loralab.engines.batched import BatchedEngine
from model_server import Answer, Answerer, ModelServer

FIELDS: dict[str, Any] = json.loads(Path(__file__).with_name("sglang_fields.json").read_text())
TYPES: dict[str, dict[str, bool]] = FIELDS["types"]
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def checked(kind: str, value: Mapping[str, Any]) -> Mapping[str, Any]:
    """The value, which must be one of sglang's type."""
    fields = TYPES[kind]
    if unknown := set(value) - set(fields):
        raise AssertionError(f"{kind} has no {unknown}")
    if missing := {name for name, needed in fields.items() if needed} - set(value):
        raise AssertionError(f"{kind} lacks {missing}")
    return value


class FakeSglang(ModelServer):
    """Serves adapters by path on one model, a tiny one as a rule."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        port: int = 0,
        max_loras: int = 8,
        max_rank: int = 16,
        targets: Sequence[str] = MODULES,
        key: str | None = None,
        admin_key: str | None = None,
        name: str = "tiny",
        deterministic: bool = True,
        max_loaded: int | None = None,
    ) -> None:
        engine = BatchedEngine(model, tokenizer, backend="torch", threads=1)
        # The client sends ids.
        engine._encoder = SimpleNamespace(encode=list)  # type: ignore[assignment]
        self.model, self.engine, self.answerer = model, engine, Answerer(engine)
        self.max_loras, self.max_rank, self.targets = max_loras, max_rank, set(targets)
        self.key, self.admin_key, self.name = key, admin_key, name
        self.deterministic, self.max_loaded = deterministic, max_loaded
        self.adapters: dict[str, tuple[str, AdapterState]] = {}
        self.refuse: set[int] = set()
        self.pool: int | None = None
        """Tokens of a completion that its memory holds."""
        self.loads = 0
        self.quantization: str | None = None
        self.in_flight: set[str] = set()
        self.violations: list[str] = []
        served = {
            "GET /health": lambda *_: None,
            "GET /model_info": self._model_info,
            "GET /server_info": self._server_info,
            "GET /v1/models": self._models,
            "POST /generate": self._generate,
            "POST /load_lora_adapter": self._load,
            "POST /unload_lora_adapter": self._unload,
        }
        routes = {}
        for path, route in served.items():
            method, _, where = path.partition(" ")
            assert method in FIELDS["routes"][where]["methods"]
            routes[path] = self._guarded(where, route)
        super().__init__(routes, port)

    def lose(self, path: str, body: Any) -> None:
        """A disconnect is seen after seconds (`SGLANG_REQUEST_STATE_WAIT_TIMEOUT`)."""
        if path == "/generate":
            self.in_flight |= {*body["rid"]}

    def _guarded(self, path: str, route: Any) -> Any:
        def guarded(body: Any, headers: Mapping[str, str]) -> Any:
            self._authorise(path, headers)
            try:
                return route(body)
            except AssertionError as error:
                self.violations.append(f"{path}: {error}")
                raise Answer(500, {"detail": str(error)}) from error

        return guarded

    def _authorise(self, path: str, headers: Mapping[str, str]) -> None:
        """`decide_request_auth` of srt/utils/auth.py."""
        if path.startswith("/health"):
            return
        wanted = self.key
        if FIELDS["routes"][path]["auth"] == "ADMIN_OPTIONAL":
            wanted = self.admin_key or self.key
        if wanted is not None and headers.get("Authorization") != f"Bearer {wanted}":
            raise Answer(401, {"error": "Unauthorized"})

    def _model_info(self, _: Any) -> Any:
        info = {
            "model_path": "/models/tiny",
            "served_model_name": self.name,
            "model_type": self.model.config.model_type,
        }
        assert set(info) <= set(FIELDS["model_info"])
        return info

    def _server_info(self, _: Any) -> Any:
        info = {
            "version": FIELDS["version"],
            "enable_lora": True,
            "max_loras_per_batch": self.max_loras,
            "max_lora_rank": self.max_rank,
            "dtype": "float32",
            "dp_size": 1,
            "tp_size": 1,
            "quantization": self.quantization,
            "kv_cache_dtype": "auto",
            "attention_backend": None,
            "max_loaded_loras": self.max_loaded,
            "enable_deterministic_inference": self.deterministic,
        }
        assert set(info) <= {*FIELDS["server_info"], *FIELDS["options"]}
        return info

    def _models(self, _: Any) -> Any:
        context = self.model.config.max_position_embeddings
        cards = [{"id": self.name, "root": self.name, "parent": None, "max_model_len": context}]
        for alias, (path, _state) in self.adapters.items():
            cards.append({"id": alias, "root": path, "parent": self.name, "max_model_len": None})
        return checked("ModelList", {"data": [checked("ModelCard", card) for card in cards]})

    def _load(self, body: Any) -> Any:
        checked("LoadLoRAAdapterReqInput", body)
        self.loads += 1
        alias, path = body["lora_name"], body["lora_path"]
        try:
            if self.loads in self.refuse:
                raise ValueError("out of LoRA memory")
            if alias in self.adapters:
                raise ValueError(
                    f"Failed to load LoRA adapter {alias} because it is already loaded"
                )
            self.adapters[alias] = path, self._read(Path(path))
        except (ValueError, OSError) as error:
            raise Answer(400, self._update(str(error))) from error
        return self._update(None)

    def _read(self, path: Path) -> AdapterState:
        """`LoRAConfig`, `LoRAAdapter.normalize_qkv_proj` and `LoRAMemoryPool.can_support`."""
        state = AdapterState.load(path)
        config = json.loads((path / "adapter_config.json").read_text())
        assert config["lora_alpha"] / config["r"] == state.scaling
        assert not config.get("rank_pattern"), "SGLang reads no rank_pattern"
        assert not config.get("alpha_pattern"), "SGLang reads no alpha_pattern"
        assert {f.A.shape[0] for f in state.factors.values()} == {config["r"]}
        assert all(t.isfinite().all() for f in state.factors.values() for t in f)
        for name in state.factors:
            parent, _, leaf = name.rpartition(".")
            if leaf in ("q_proj", "k_proj", "v_proj"):
                assert {f"{parent}.{x}_proj" for x in "qkv"} <= set(state.factors)
            if leaf in ("gate_proj", "up_proj"):
                assert {f"{parent}.{x}_proj" for x in ("gate", "up")} <= set(state.factors)
        leaves = {name.rpartition(".")[2] for name in state.factors}
        if config["r"] > self.max_rank or not leaves <= self.targets:
            raise ValueError(f"rank {config['r']} is incompatible with the LoRA memory pool")
        return state

    def _unload(self, body: Any) -> Any:
        checked("UnloadLoRAAdapterReqInput", body)
        if body["lora_name"] not in self.adapters:
            raise Answer(400, self._update(f"LoRA with name {body['lora_name']} does not exist"))
        del self.adapters[body["lora_name"]]
        return self._update(None)

    def _update(self, error: str | None) -> Any:
        loaded = {alias: path for alias, (path, _) in self.adapters.items()}
        made = {"success": error is None, "error_message": error or "", "loaded_adapters": loaded}
        return checked("LoRAUpdateOutput", {**made, "rid": None, "http_worker_ipc": None})

    def _generate(self, body: Any) -> Any:
        checked("GenerateReqInput", body)
        checked("GenerateRequest", body)
        count = len(body["input_ids"])
        aliases = body.get("lora_path", [None] * count)
        assert len({*body["rid"]}) == len(body["sampling_params"]) == len(aliases) == count
        assert len(set(aliases)) <= self.max_loras
        if {*body["rid"]} & self.in_flight:
            raise Answer(400, {"error": {"message": "Duplicate request ID detected"}})
        requests = [
            self._request(ids, checked("SamplingParams", sampling), alias)
            for ids, sampling, alias in zip(
                body["input_ids"], body["sampling_params"], aliases, strict=True
            )
        ]
        with self.answerer.lock:
            self.engine.load({alias: state for alias, (_, state) in self.adapters.items()})
            done = self.engine.generate(requests)
        return [
            self._answer(rid, completion) for rid, completion in zip(body["rid"], done, strict=True)
        ]

    def _request(self, ids: Any, sampling: Mapping[str, Any], alias: str | None) -> Request:
        """`_validate_one_request` and `_resolve_lora_path` of the tokenizer manager,
        `SamplingParams.verify`, and the limits of the scheduler."""
        context = self.model.config.max_position_embeddings
        if not 0 < len(ids) < context - 6:
            raise Answer(400, {"error": {"message": f"context length is {context} tokens"}})
        if alias is not None and alias not in self.adapters:
            message = f"Got LoRA adapter that has never been loaded: {alias}"
            raise Answer(400, {"error": {"message": message}})
        stop = sampling["stop"] or []
        assert len(stop) <= 32, "MAX_STOP_COUNT"
        assert sampling["top_k"] == -1 or sampling["top_k"] >= 1
        assert set(sampling["stop_token_ids"]) >= self.engine._decoder.ends
        assert -(2**63) <= sampling["sampling_seed"] < 2**63
        return Request(
            tuple(ids),  # type: ignore[arg-type]
            alias,
            Sampling(
                min(sampling["max_new_tokens"], self.pool or context, context - 2 - len(ids)),
                temperature=sampling["temperature"],
                top_k=max(sampling["top_k"], 0),
                top_p=sampling["top_p"],
                seed=sampling["sampling_seed"],
                stop=tuple(stop),
            ),
        )

    def _answer(self, rid: str, done: Completion) -> Any:
        """`_handle_batch_output`; finish reasons as `BaseFinishReason.to_json`."""
        reasons = {
            "stop": checked("FinishStop", {"matched": None}),
            "length": checked("FinishLength", {"length": len(done.tokens)}),
            "error": checked("FinishAbort", {"message": done.error, "status_code": None}),
        }
        kind = "abort" if done.finish_reason == "error" else done.finish_reason
        meta = {"id": rid, "finish_reason": {"type": kind, **reasons[done.finish_reason]}}
        return checked(
            "GenerateResponse",
            {
                "text": done.text,
                "output_ids": list(done.tokens),
                "meta_info": checked("GenerateMetaInfo", meta),
            },
        )


def main(arguments: list[str]) -> None:
    """Serve as `python -m sglang.launch_server` would be told to."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path)
    for name in FIELDS["options"]:
        flag = "--" + name.replace("_", "-")
        if name.startswith("enable_"):
            parser.add_argument(flag, action="store_true")
        else:
            parser.add_argument(flag, nargs="*" if name == "lora_target_modules" else None)
    given = parser.parse_args(arguments)
    secrets = yaml.safe_load(given.config.read_text())
    assert given.config.stat().st_mode & 0o077 == 0, "others can read the key"
    assert given.host == "127.0.0.1"
    assert given.enable_lora
    model = AutoModelForCausalLM.from_pretrained(given.model_path, dtype=given.dtype)
    server = FakeSglang(
        model.eval(),
        AutoTokenizer.from_pretrained(given.model_path),
        port=int(given.port),
        max_loras=int(given.max_loras_per_batch),
        max_rank=int(given.max_lora_rank),
        targets=given.lora_target_modules,
        key=secrets["api-key"],
        name=given.served_model_name,
        deterministic=given.enable_deterministic_inference,
    )
    server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
