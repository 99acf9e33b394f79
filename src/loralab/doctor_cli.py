"""`loralab doctor`: sound or broken, why, what to do.

0: sound, warnings or none. 1: broken. 2: nothing that could be examined.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable


def add(parser: argparse.ArgumentParser, natural: Callable[[str], int]) -> None:
    """Arguments of the command. natural: reads a whole number."""
    add = parser.add_argument
    add(
        "target",
        metavar="ADAPTER",
        help="an adapter of PEFT or mlx-lm, a run's directory, a config (also a shipped one's "
        "name), or a model",
    )
    add("overrides", nargs="*", metavar="key=value", help="of a config, as in adapter.rank=16")
    add("--base", metavar="MODEL", help="default: what the adapter names")
    add("--data", metavar="FILE", help="rows that it learned, or is to learn")
    add("--task", metavar="NAME", help="whose prompts and evaluation are examined too")
    add(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="default: a run's or config's own, else bfloat16",
    )
    add("--device", help="auto, cpu or cuda; default: a run's or config's own, else auto")
    add("--prompts", type=natural, metavar="N", help="the first N of the 32 shipped prompts")
    add("--seed", type=natural, default=0, help="of what is drawn, default 0")
    add("--json", action="store_true", help="one object, with everything measured")


def run(arguments: argparse.Namespace) -> int:
    """Examine, print, and say by the exit code whether it is sound."""
    from loralab.examine import doctor
    from loralab.health.prompts import shipped_prompts

    prompts = None if arguments.prompts is None else shipped_prompts()[: arguments.prompts]
    report = doctor(
        arguments.target,
        arguments.base,
        arguments.data,
        arguments.task,
        prompts=prompts,
        dtype=arguments.dtype,
        device=arguments.device,
        overrides=arguments.overrides,
        seed=arguments.seed,
    )
    print(json.dumps(report.to_json()) if arguments.json else report)
    return 0 if report.sound else 1
