"""vLLM behind a pipe: run by the Python of its own environment, never imported by loralab.

It reads one JSON object a line on stdin and answers with one a line on stdout:

    {"op": "load", "adapters": {"name": "folder", ...}}         -> {}
    {"op": "generate", "prompts": [[id, ...], ...], "adapters": ["name", ...], "tokens": n}
                                                                -> {"generated": [[id, ...], ...]}
    {"op": "usage"}                                 -> {"peak_kilobytes": k, "cpu_seconds": s}

An operation that fails answers {"error": text}. Closing stdin ends it, and it then removes its
folder: a benchmark that was killed leaves nothing in memory-backed files.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any, TextIO


def main() -> None:
    """Start the engine, say so, answer until stdin closes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, help="holds model/; removed at the end")
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--members", type=int, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--sequences", type=int, required=True)
    parser.add_argument("--batched-tokens", type=int, required=True)
    options = parser.parse_args()

    # vLLM logs to stdout: keep the real one for answers and point its log at stderr.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    serve(options, answers)
    shutil.rmtree(options.folder, ignore_errors=True)


def serve(options: argparse.Namespace, answers: TextIO) -> None:
    """Start the engine, then answer line by line."""
    import vllm  # type: ignore[import-not-found,unused-ignore]

    engine = vllm.LLM(
        str(options.folder / "model"),
        dtype=options.dtype,
        enable_lora=True,
        max_loras=options.members,
        max_cpu_loras=options.members,
        max_lora_rank=options.rank,
        max_model_len=options.context,
        max_num_seqs=options.sequences,
        max_num_batched_tokens=options.batched_tokens,
    )
    worker = Worker(engine)
    answers.write(json.dumps({"version": vllm.__version__}) + "\n")
    for line in sys.stdin:
        try:
            answer = worker.answer(json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


class Worker:
    """The engine and the adapters it holds at the moment."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.requests: dict[str, Any] = {}
        self.made = 0

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """Do what one line asks."""
        match message["op"]:
            case "load":
                return self.load(message["adapters"])
            case "generate":
                return self.generate(message["prompts"], message["adapters"], message["tokens"])
            case "usage":
                return {"peak_kilobytes": peak_kilobytes(), "cpu_seconds": time.process_time()}
            case other:
                raise ValueError(f"operation {other!r}: expected load, generate or usage")

    def load(self, adapters: dict[str, str]) -> dict[str, Any]:
        """Drop the loaded adapters, load these under names never used before."""
        from vllm.lora.request import (  # type: ignore[import-not-found,unused-ignore]
            LoRARequest,
        )

        for request in self.requests.values():
            self.engine.llm_engine.remove_lora(request.lora_int_id)
        self.requests = {}
        for name, folder in adapters.items():
            self.made += 1
            request = LoRARequest(f"{name}-{self.made}", self.made, folder)
            self.engine.llm_engine.add_lora(request)
            self.requests[name] = request
        return {}

    def generate(
        self, prompts: list[list[int]], adapters: list[str], tokens: int
    ) -> dict[str, Any]:
        """Greedy tokens of each prompt under its adapter, past the end token.

        The prefix cache starts empty: members of a new generation have none.
        """
        from vllm import SamplingParams

        self.engine.reset_prefix_cache()
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        outputs = self.engine.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            sampling,
            lora_request=[self.requests[name] for name in adapters],
            use_tqdm=False,
        )
        return {"generated": [list(o.outputs[0].token_ids) for o in outputs]}


def peak_kilobytes() -> int:
    """Highest resident memory of this process (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    return 0


if __name__ == "__main__":
    main()
