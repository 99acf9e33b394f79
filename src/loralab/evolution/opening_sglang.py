"""The workbench whose engine is an SGLang server: started here, or one that runs elsewhere."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
import yaml

from loralab.adapters.attach import targeted_weights
from loralab.config import EvolveConfig, SglangConfig
from loralab.engines.http_json import bearer
from loralab.engines.memory_folder import MemoryFolder
from loralab.engines.own_server import LOOPBACK, OwnServer
from loralab.engines.served import ServedModel, siblings
from loralab.engines.sglang import SglangEngine
from loralab.engines.sglang_link import Link, healthy, locked
from loralab.errors import UserError
from loralab.evolution.workbench import Workbench

Keys = tuple[Mapping[str, str], Mapping[str, str]]


def open_sglang(config: EvolveConfig) -> Workbench:
    """Load the config's model once for its weights, and put an SGLang engine beside it.

    The search looks at the targeted weights alone; the rest of the model is let go.

    Raises:
        UserError: no server can be started or reached, or it cannot run this model's adapters.
    """
    from loralab.models.load import load

    options = config.engine.sglang or SglangConfig()
    if config.evolution.noise_on == "weights":
        raise UserError(
            "evolution.noise_on: weights moves base weights, which engine sglang cannot: use "
            "engine.name: batched"
        )
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    model, tokenizer = load(config.model, config.dtype, "cpu")
    served = ServedModel.of(config.model, model, tokenizer)
    weights = targeted_weights(model, config.adapter)
    del model
    link = connected(served, options) if options.url else _started(config, served, options, weights)
    try:
        engine = SglangEngine(served, link, options)
    except BaseException:
        link.close([])
        raise
    return Workbench(engine, weights, _no_model, close=engine.close)


def connected(served: ServedModel, options: SglangConfig) -> Link:
    """A link to the server at the options' url. Raises UserError as Link, or for a missing key."""
    assert options.url is not None
    what = f"server {options.url}"
    plain = bearer(options.key_variable, what)
    admin = bearer(options.admin_key_variable, what) or plain
    return Link(options.url.rstrip("/"), served.kind, _dtype(served), options, (plain, admin))


def _started(
    config: EvolveConfig,
    served: ServedModel,
    options: SglangConfig,
    weights: Mapping[str, object],
) -> Link:
    """A server on this machine that nobody else can use: on the loopback, with a key of its own."""
    from loralab.models.load import DTYPES, locate

    if options.key_variable is not None or options.admin_key_variable is not None:
        raise UserError(
            "engine.sglang.key_variable is the key of a server at a url; one that is started here "
            "gets a key of its own: leave it out"
        )
    python, *rest = options.command
    # The word names this Python's environment.
    first = sys.executable if python == "python" else python
    if options.command == SglangConfig().command and find_spec("sglang") is None:
        raise UserError(
            "engine sglang: sglang is not installed here: pip install sglang, or name the Python "
            "that has it in engine.sglang.command, or a server that runs in engine.sglang.url"
        )
    source = locate(config.model, DTYPES[config.dtype])
    modules = {other for name in weights for other in (name, *siblings(name))}
    leaves = sorted({name.rpartition(".")[2] for name in modules & set(served.shapes)})

    key = secrets.token_urlsafe(32)
    private = MemoryFolder()
    secret = private.path / "server.yaml"

    def command(port: int) -> list[str]:
        return [
            first, *rest,
            "--config", str(secret),
            "--model-path", source,
            "--served-model-name", config.model,
            "--host", LOOPBACK,
            "--port", str(port),
            "--dtype", config.dtype,
            "--random-seed", str(config.seed % 2**31),
            "--enable-lora",
            "--max-loras-per-batch", str(options.max_loras),
            "--max-lora-rank", str(config.adapter.rank),
            "--lora-target-modules", *leaves,
            "--enable-deterministic-inference",
            *(() if config.device == "auto" else ("--device", config.device)),
            *options.args,
        ]  # fmt: skip

    try:
        # What a command line holds, every user of the machine can read.
        with os.fdopen(os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            yaml.safe_dump({"api-key": key}, file)
        own = OwnServer(
            command,
            lambda url: healthy(url) and locked(url),
            timeout=options.start_timeout,
            private=private,
        )
    except BaseException:
        private.close()
        raise
    headers = {"Authorization": f"Bearer {key}"}
    try:
        return Link(own.url, served.kind, _dtype(served), options, (headers, headers), own)
    except BaseException:
        own.close()
        raise


def _dtype(served: ServedModel) -> str:
    return str(served.dtype).removeprefix("torch.")


def _no_model(directory: Path) -> None:
    raise UserError(f"cannot write {directory}: the weights are the SGLang server's own")
