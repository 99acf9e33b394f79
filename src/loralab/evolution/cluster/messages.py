"""What driver and actors say to each other: JSON, compressed, as bytes that can be counted.

Of a completion its reward travels, whether it is right, repeats itself or failed, and 32 bits of
its text's hash; its text only where it is written down.
"""

from __future__ import annotations

import json
import zlib
from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
from safetensors.torch import load, save

from loralab.adapters.state import AdapterState, Factors
from loralab.health.population import loops
from loralab.rollouts import Rollout
from loralab.tasks.base import Example, Prompt, Score

Message = Mapping[str, Any]
Files = Mapping[str, bytes]
"""What goes beside a message as it is, by name."""

_HASH = 4
_NAMES = {True: "1", False: "0", None: "-"}
_MEANT = {name: value for value, name in _NAMES.items()}
_LOOPING = "x" * 100
"""What `loops` calls looping, as the end of a stand-in for a text that is."""
_REASON = 300


def pack(message: Message) -> bytes:
    """A message on its way."""
    return zlib.compress(json.dumps(message, separators=(",", ":")).encode())


def unpack(data: bytes) -> dict[str, Any]:
    """The message again, every float to the bit."""
    message: dict[str, Any] = json.loads(zlib.decompress(data))
    return message


def compact(values: Sequence[float]) -> Any:
    """Floats of many values as their bytes, in less room than their digits and to the last bit; of
    few values, or with whole numbers among them, as they are. For `floats`."""
    if len(set(values)) <= len(values) // 4 or any(type(value) is not float for value in values):
        return list(values)
    # All first bytes, then all second ones: exponents are much alike, and are compressed then.
    planes = np.array(values, "<f8").view(np.uint8).reshape(-1, 8).T
    return b64encode(planes.tobytes()).decode("ascii")


def floats(given: Any) -> list[float]:
    """What `compact` was given."""
    if not isinstance(given, str):
        return list(given)
    planes = np.frombuffer(b64decode(given), np.uint8).reshape(8, -1)
    found: list[float] = planes.T.copy().view("<f8").ravel().tolist()
    return found


def outlined(rollouts: Iterable[Rollout]) -> dict[str, Any]:
    """Rollouts without their texts."""
    kept = list(rollouts)
    failed = {place: _shortened(r.failed) for place, r in enumerate(kept) if r.failed is not None}
    return {
        "rewards": compact([rollout.score.reward for rollout in kept]),
        "correct": "".join(_NAMES[rollout.score.correct] for rollout in kept),
        "hashes": "".join(_hashed(rollout.text) for rollout in kept),
        "looping": [place for place, rollout in enumerate(kept) if loops(rollout.text)],
        "failed": list(failed),
        "why": next(iter(failed.values()), None),
    }


def stand_ins(
    outline: Message, examples: Sequence[Example], prompts: Sequence[Prompt]
) -> list[Rollout]:
    """What `outlined` told of, an example and its prompt for each rollout.

    Texts are stand-ins: equal where the texts were, and looping where they were. `failed` is the
    first failure's reason. Tokens are counted elsewhere: 0.
    """
    looping, failed = set(outline["looping"]), set(outline["failed"])
    hashes: str = outline["hashes"]
    size = 2 * _HASH
    return [
        Rollout(
            examples[place],
            prompts[place],
            hashes[size * place : size * (place + 1)] + _LOOPING * (place in looping),
            0,
            Score(reward, _MEANT[outline["correct"][place]]),
            outline["why"] if place in failed else None,
        )
        for place, reward in enumerate(floats(outline["rewards"]))
    ]


def in_full(rollout: Rollout) -> dict[str, Any]:
    """A rollout with its text, for `restored`."""
    score = rollout.score
    return {
        "text": rollout.text,
        "tokens": rollout.tokens,
        "reward": score.reward,
        "correct": score.correct,
        "parts": dict(score.parts),
        "failed": rollout.failed,
    }


def restored(row: Message, example: Example, prompt: Prompt) -> Rollout:
    """The rollout that `in_full` told of."""
    score = Score(row["reward"], row["correct"], row["parts"])
    return Rollout(example, prompt, row["text"], row["tokens"], score, row["failed"])


def boxed(adapters: Mapping[str, AdapterState]) -> tuple[list[Any], dict[str, bytes]]:
    """Adapters as part of a message and the files beside it, for `loaded`."""
    rows, files = list[Any](), dict[str, bytes]()
    for number, (name, state) in enumerate(adapters.items()):
        modules = list(state.factors)
        rows.append([name, modules, state.scaling, state.kind])
        tensors = {
            f"{at}.{part}": tensor.detach().cpu().contiguous()
            for at, module in enumerate(modules)
            for part, tensor in zip("AB", state.factors[module], strict=True)
        }
        files[f"{number}.safetensors"] = save(tensors)
    return rows, files


def loaded(rows: Sequence[Any], files: Files) -> dict[str, AdapterState]:
    """The adapters that `boxed` packed, to the last bit."""
    adapters = {}
    for number, (name, modules, scaling, kind) in enumerate(rows):
        tensors = load(files[f"{number}.safetensors"])
        factors = {
            module: Factors(tensors[f"{at}.A"], tensors[f"{at}.B"])
            for at, module in enumerate(modules)
        }
        adapters[name] = AdapterState(factors, scaling, kind)
    return adapters


def _hashed(text: str) -> str:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=_HASH).hexdigest()


def _shortened(reason: str) -> str:
    return reason if len(reason) <= _REASON else f"{reason[:_REASON]} ..."
