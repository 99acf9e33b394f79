"""Arguments that several commands take."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from loralab.errors import UserError


def model_arguments(parser: argparse.ArgumentParser, adapter: bool = True) -> None:
    """MODEL, and how it is loaded. adapter: one can be laid on it."""
    run = ", or a run's directory" if adapter else ""
    parser.add_argument(
        "model", metavar="MODEL", help=f"smollm2, a directory, .gguf or a hub name{run}"
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="default bfloat16, or a run's own"
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    if adapter:
        parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter in PEFT's format")


def sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """How completions are sampled."""
    add = parser.add_argument
    add("--max-new-tokens", type=natural, default=256, metavar="N", help="default 256")
    add("--temperature", type=float, default=0.0, help="default 0: the likeliest token")
    add("--seed", type=natural, default=0, help="of sampling, default 0")


def task_arguments(parser: argparse.ArgumentParser, split: str | None) -> None:
    """What of a task. split: the default, None for both."""
    choice = "both" if split is None else split
    parser.add_argument(
        "--split", choices=("train", "test"), default=split, help=f"default {choice}"
    )
    parser.add_argument(
        "--limit", type=natural, metavar="N", help="only the first N examples (of a text: tokens)"
    )
    parser.add_argument(
        "--unsafe-exec", action="store_true", help="run generated code where nothing isolates it"
    )
    parser.add_argument(
        "--option", action="append", default=[], metavar="key=value", help="of the task; repeatable"
    )


def task_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Options of the task from what `task_arguments` asked for."""
    given = options(arguments.option)
    return {**given, "unsafe_exec": True} if arguments.unsafe_exec else given


def options(pairs: Sequence[str]) -> dict[str, Any]:
    """key=value pairs, the values read as YAML. Raises UserError."""
    from loralab.yaml import parse_yaml

    made = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"--option {pair!r}: expected key=value, as in seed=3")
        made[key] = parse_yaml(value, f"--option {pair!r}")
    return made


def natural(text: str) -> int:
    """An argument's whole number, 0 or more."""
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)
