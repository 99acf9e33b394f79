"""One way to train behind a pipe: a process that `workers` starts.

It reads one JSON object a line on stdin, and answers with one a line on stdout:

    {"way": "module:function", "work": {...}}   first   -> {"ready": true, "peak_gb": g}
    {"warm": w, "steps": n}                      a lap   -> {"run": s, "cpu": s, "tokens": n, ...}

What fails answers {"error": text} and ends it, as closing stdin does.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module

import torch

from loralab.bench.gate import Gate, NoMoreLaps
from loralab.bench.work import Work
from loralab.errors import UserError


def main() -> int:
    """Train as told until stdin closes."""
    # Libraries write to stdout: keep the real one for answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(1)
    order = json.loads(sys.stdin.readline())
    module, _, function = order["way"].partition(":")
    gate = Gate(
        (json.loads(line) for line in sys.stdin),
        lambda said: print(json.dumps(said), file=answers),
    )
    try:
        getattr(import_module(module), function)(Work(**order["work"]), gate)
    except NoMoreLaps:
        return 0
    except BrokenPipeError:
        return 1
    except UserError as error:
        print(json.dumps({"error": str(error)}), file=answers)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
