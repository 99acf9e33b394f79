"""Plain values between two interpreters, as framed JSON: nothing that arrives can run.

None, bool, int, float, complex, str, bytes, list, tuple, dict, set and frozenset travel by value,
and these types themselves by name; a value of a subclass arrives as the built-in it extends, so
that no `__eq__` of its own comes along. Anything else stays where it is and travels as a number
that stands for it.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from typing import Any

LONGEST = 4 << 20
"""Bytes of one message. Tests of HumanEval and MBPP need a few kilobytes."""

_SMALL = 1 << 53
_PLAIN = (bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset)
_TYPES = {kind.__name__: kind for kind in (*_PLAIN, type(None), object, range, type)}


class WireError(Exception):
    """The other side ended, or sent what is no message."""


def send(handle: int, message: Any) -> None:
    """Write one message.

    Raises:
        WireError: it is longer than LONGEST.
        OSError: the other side is gone.
    """
    data = json.dumps(message).encode("ascii")
    if len(data) > LONGEST:
        raise WireError(f"a value of {len(data)} bytes is more than {LONGEST}")
    view = memoryview(struct.pack("!I", len(data)) + data)
    while view:
        view = view[os.write(handle, view) :]


def receive(handle: int) -> Any:
    """Read one message. Raises WireError where there is none."""
    (length,) = struct.unpack("!I", _exactly(handle, 4))
    if length > LONGEST:
        raise WireError(f"a message of {length} bytes is more than {LONGEST}")
    try:
        return json.loads(_exactly(handle, length))
    except (ValueError, RecursionError) as error:
        raise WireError(f"no message: {error}") from None


def _exactly(handle: int, length: int) -> bytes:
    parts = []
    while length:
        try:
            part = os.read(handle, min(length, 1 << 16))
        except OSError:
            part = b""
        if not part:
            raise WireError("the program ended")
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def encode(value: Any, refer: Callable[[Any], int]) -> Any:
    """A value as JSON can hold it. refer: the number that stands for what does not travel."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        number = int.__index__(value)
        return number if -_SMALL < number < _SMALL else {"int": hex(number)}
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, bytes):
        return {"bytes": bytes.hex(value)}
    if isinstance(value, list):
        return [encode(item, refer) for item in list.__iter__(value)]
    if isinstance(value, tuple):
        return {"tuple": [encode(item, refer) for item in tuple.__iter__(value)]}
    if isinstance(value, set):
        return {"set": [encode(item, refer) for item in set.__iter__(value)]}
    if isinstance(value, frozenset):
        return {"frozenset": [encode(item, refer) for item in frozenset.__iter__(value)]}
    if isinstance(value, dict):
        pairs = [[encode(k, refer), encode(v, refer)] for k, v in dict.items(value)]
        return {"dict": pairs}
    if any(value is kind for kind in _TYPES.values()):
        return {"type": value.__name__}
    return {"object": refer(value)}


def decode(value: Any, resolve: Callable[[int], Any]) -> Any:
    """The value that `encode` was given. resolve: what a number stands for on this side.

    Raises:
        WireError: nothing that `encode` writes.
    """
    if isinstance(value, list):
        return [decode(item, resolve) for item in value]
    if not isinstance(value, dict):
        return value
    try:
        [(kind, content)] = value.items()
        if kind == "int":
            return int(content, 16)
        if kind == "object":
            return resolve(content)
        if kind == "type":
            return _TYPES[content]
        if kind == "bytes":
            return bytes.fromhex(content)
        if kind == "complex":
            return complex(*content)
        if kind == "dict":
            return {decode(k, resolve): decode(v, resolve) for k, v in content}
        make = {"tuple": tuple, "set": set, "frozenset": frozenset}[kind]
        return make(decode(item, resolve) for item in content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise WireError(f"no value: {error}") from None
