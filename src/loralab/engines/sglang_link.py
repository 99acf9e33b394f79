"""One SGLang server over HTTP: what it is, its adapters, its completions, and its return."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from loralab.config import SglangConfig
from loralab.engines.http_json import Failed, JsonClient, Unreachable
from loralab.engines.own_server import OwnServer
from loralab.errors import UserError

_WAIT = 0.5
"""Seconds before the first retry; each later one waits twice as long."""
_LOOK = 0.5
"""Seconds between two looks for a server that is gone."""
_HEALTH = 30.0
"""Seconds that a look may take: the server answers after it has generated a token."""


class Lost(Exception):
    """The server came back without its adapters."""


class Link:
    """A server and its client.

    kind: the model_type that it should run. own: the server if it is ours, whose key is `keys`'.
    keys: headers of plain requests and of those that change the server.

    Raises:
        UserError: nothing is there, or it cannot run adapters on this model.
    """

    def __init__(
        self,
        url: str,
        kind: str,
        options: SglangConfig,
        keys: tuple[Mapping[str, str], Mapping[str, str]],
        own: OwnServer | None = None,
    ) -> None:
        self._kind, self._options, self._own = kind, options, own
        self._keys = keys
        self._connect(url)

    def _connect(self, url: str) -> None:
        options = self._options
        self.client = JsonClient(
            url, self._keys[0], timeout=options.timeout, retries=options.retries, wait=_WAIT
        )
        try:
            model, server = self.client.get("model_info"), self.client.get("server_info")
            cards = self._cards()
        except Failed as error:
            raise UserError(f"{error}: is it an SGLang server?") from error
        if model["model_type"] != self._kind:
            raise UserError(
                f"the server at {url} runs {model['model_path']!r}, a {model['model_type']}; the "
                f"config's model is a {self._kind}: start it with the same one"
            )
        if not server.get("enable_lora"):
            raise UserError(
                f"the server at {url} runs no adapters: start it with --enable-lora, "
                "--max-lora-rank and --lora-target-modules"
            )
        if server.get("dp_size", 1) > 1:
            raise UserError(
                f"the server at {url} runs {server['dp_size']} replicas, and SGLang loads adapters "
                "while it runs in one alone: start it with --dp-size 1"
            )
        self.max_loras: int = server["max_loras_per_batch"]
        self.max_rank: int = server["max_lora_rank"]
        self.context: int = next(c["max_model_len"] for c in cards if c.get("parent") is None)
        steady = " deterministic" if server.get("enable_deterministic_inference") else ""
        self.kernel = (
            f"sglang {server['version']} {model['served_model_name']} {server['dtype']}{steady}"
        )

    def load(self, alias: str, path: Path) -> str | None:
        """Have the server read an adapter's folder; why it does not, None if it does."""
        try:
            self._change("load_lora_adapter", {"lora_name": alias, "lora_path": str(path)})
        except Failed as error:
            # Names are never used twice: it is there from an attempt whose answer was lost.
            return None if self._holds(alias) else str(error)
        return None

    def unload(self, alias: str) -> None:
        """Have the server forget an adapter. One that does not is left with it: names are never
        used twice."""
        with suppress(Failed, Unreachable):
            self._change("unload_lora_adapter", {"lora_name": alias})

    def generate(self, body: Mapping[str, Any], count: int) -> list[Mapping[str, Any]]:
        """Answers in the order of a batch. Raises as JsonClient.post."""
        answers = self.client.post("generate", body)
        if not isinstance(answers, list) or len(answers) != count:
            raise Failed(f"{self.client.url}/generate: expected {count} answers")
        try:
            rids = [answer["meta_info"]["id"] for answer in answers]
            sound = all(
                isinstance(answer["output_ids"], list) and "finish_reason" in answer["meta_info"]
                for answer in answers
            )
        except (KeyError, TypeError) as error:
            raise Failed(f"{self.client.url}/generate: an answer without {error}") from error
        if not sound or rids != body["rid"]:
            raise Failed(f"{self.client.url}/generate: answers of other requests, or without ids")
        return answers

    def check_held(self, alias: str | None) -> None:
        """Raise Lost if the server does not know an adapter that it was given."""
        if alias is not None and not self._holds(alias):
            raise Lost(f"{self.client.url} lost its adapters: it was started anew")

    def recover(self) -> None:
        """Start our server anew, or wait until the other is back.

        Raises:
            UserError: it does not come back in `start_timeout` seconds, or as another.
        """
        before = self.kernel
        if self._own is not None:
            self._own.start()
            self._connect(self._own.url)
        else:
            self._wait()
            self._connect(self.client.url)
        if self.kernel != before:
            raise UserError(
                f"{self.client.url} came back as {self.kernel!r}, and was {before!r}: the same "
                "adapter would write other text; start the first one again and resume the run "
                "with --resume"
            )

    def _wait(self) -> None:
        deadline = time.monotonic() + self._options.start_timeout
        while not healthy(self.client.url):
            if time.monotonic() > deadline:
                raise UserError(
                    f"{self.client.url} did not come back in {self._options.start_timeout:g} s; "
                    "start it again and resume the run with --resume"
                )
            time.sleep(_LOOK)

    def close(self) -> None:
        """End the server if it is ours."""
        if self._own is not None:
            self._own.close()

    def _change(self, path: str, body: Mapping[str, Any]) -> None:
        answer = self.client.post(path, body, self._keys[1])
        if not answer["success"]:
            raise Failed(str(answer["error_message"]))

    def _holds(self, alias: str) -> bool:
        return any(card["id"] == alias for card in self._cards())

    def _cards(self) -> list[dict[str, Any]]:
        cards: list[dict[str, Any]] = self.client.get("v1/models")["data"]
        return cards


def healthy(url: str) -> bool:
    """Whether a server answers, after a token that it generates."""
    try:
        JsonClient(url, {}, timeout=_HEALTH, retries=0, wait=0).get("health")
    except (Failed, Unreachable):
        return False
    return True
