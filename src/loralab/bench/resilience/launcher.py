"""A process that has imported everything once and forks a run at a time: `python -m` this module.

A run then begins in milliseconds, so that a hundred of them can be killed, at random times over
what the run does and not over the import of its libraries. One JSON object a line on stdin:

    {"argv": [...], "output": file, "prepare": "module:function", "options": {...}} -> {"pid": n}
    {"wait": pid, "timeout": seconds}           -> {"code": exit code, minus a signal, or null}

What runs is the command line, `loralab.cli.main(argv)`; `prepare` is called before it, to disturb
it from within. Closing stdin ends the launcher and what it started.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from contextlib import suppress
from importlib import import_module
from typing import Any


def main() -> None:
    """Import, say so, then serve until stdin closes."""
    import torch

    for module in ("loralab.evolution.trainer", "loralab.engines.batched", "loralab.report.plots"):
        import_module(module)
    import_module("transformers").AutoModelForCausalLM  # noqa: B018  it loads when it is asked for
    torch.set_num_threads(1)  # a forked child must not inherit a pool of threads
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    print(json.dumps({"ready": True}), file=answers)
    children: set[int] = set()
    with suppress(EOFError):
        for line in sys.stdin:
            asked = json.loads(line)
            if "wait" in asked:
                said: dict[str, Any] = {"code": _ended(asked["wait"], asked["timeout"])}
                if said["code"] is not None:
                    children.discard(asked["wait"])
            else:
                said = {"pid": _fork(asked)}
                children.add(said["pid"])
            print(json.dumps(said), file=answers)
    for child in children:
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)


def _fork(asked: dict[str, Any]) -> int:
    child = os.fork()
    if child:
        with suppress(PermissionError):
            os.setpgid(child, child)
        return child
    code = 70
    try:
        os.setpgid(0, 0)
        output = os.open(asked["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        if asked["prepare"]:
            module, _, name = asked["prepare"].partition(":")
            getattr(import_module(module), name)(**asked["options"])
        code = import_module("loralab.cli").main(asked["argv"])
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _ended(child: int, seconds: float) -> int | None:
    """How a child ended, None if it has not yet. Raises EOFError if whoever asked is gone."""
    until = time.monotonic() + seconds
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            return None
        # Whoever asked says nothing while it waits, but for its end.
        if select.select([sys.stdin], [], [], 0.002)[0]:
            raise EOFError


if __name__ == "__main__":
    main()
