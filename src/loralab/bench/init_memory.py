"""Peak memory of a start: a process of its own loads the model, starts the adapter, takes one step.

python -m loralab.bench.init_memory --label pissa --gsm8k PATH --trained ADAPTER
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from loralab.bench.init_lab import KINDS, Budget, Kind, Lab
from loralab.bench.init_trial import started
from loralab.bench.timing import peak_in_child, peak_rss_gb
from loralab.gradient.loop import quiet
from loralab.gradient.sft import train


def peak_of(lab: Lab, kind: Kind) -> float:
    """Highest resident memory in GB (10^9 bytes) of this process after a start and one step."""
    with quiet():
        peft, tokenizer, _, _ = started(lab, kind, seed=0)
        train(peft, tokenizer, lab.train_rows, lab.training(steps=1), seed=0)
    return peak_rss_gb()


def peak_alone(lab: Lab, kind: Kind) -> float:
    """`peak_of` in a fresh process, whose memory holds this start alone.

    Raises:
        UserError: it failed; the last line of what it said.
    """
    words = [
        *("--label", kind.label, "--model", lab.model_name, "--gsm8k", lab.gsm8k),
        *("--trained", str(lab.reference)),
    ]
    return peak_in_child("loralab.bench.init_memory", words, kind.label)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure one start, and say it as JSON."""
    parser = argparse.ArgumentParser(prog="loralab.bench.init_memory")
    parser.add_argument("--label", required=True, choices=[kind.label for kind in KINDS])
    parser.add_argument("--model", required=True)
    parser.add_argument("--gsm8k", required=True)
    parser.add_argument("--trained", required=True, type=Path)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    lab = Lab(given.model, given.gsm8k, Path(), Budget(), given.trained)
    [kind] = [kind for kind in KINDS if kind.label == given.label]
    print(json.dumps({"peak_gb": peak_of(lab, kind)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
