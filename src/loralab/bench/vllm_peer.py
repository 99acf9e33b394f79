"""vLLM on the CPU as a peer: its own environment, a worker that loads once, answers on a pipe."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from loralab.adapters.state import AdapterState
from loralab.bench.peers import Tokens
from loralab.bench.workloads import Workload
from loralab.errors import UserError

CACHE_GB = 4
"""Key-value cache: 480 sequences of 300 tokens of SmolLM2 take 3.4 GB."""
BATCHED_TOKENS = 512
"""Tokens of a step. Its LoRA on the CPU gathers the factors for every token: 512 took less
processor time than 2048, by 1.2 at 2 prompts a member and by 1.4 at 16 (10 members, 16 new tokens,
two laps on a busy machine)."""


class Vllm:
    """All members and prompts in one batch; adapters pass through memory-backed files.

    Raises:
        UserError: the environment is absent, or vLLM does not start (its log's last line).
    """

    def __init__(
        self,
        python: Path,
        model: Any,
        tokenizer: Any,
        dtype: str,
        members: int,
        rank: int,
        longest: int,
        sequences: int,
    ) -> None:
        if not python.exists():
            raise UserError(f"vLLM skipped: no environment at {python} (make test-vllm makes it)")
        memory = Path("/dev/shm")
        self.folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
        self.log = self.folder / "log"
        self.generation = 0
        self.names: list[str] = []
        try:
            model.save_pretrained(self.folder / "model")
            tokenizer.save_pretrained(self.folder / "model")
            self.process = self._start(python, dtype, members, rank, longest, sequences)
            self.detail = f"vllm {self._read()['version']}, CPU, adapters from {self.folder.parent}"
        except BaseException:
            self.close()
            raise

    def _start(
        self,
        python: Path,
        dtype: str,
        members: int,
        rank: int,
        longest: int,
        sequences: int,
    ) -> subprocess.Popen[str]:
        settings = {
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GB),
            # The engine in the same process as its caller: one core has nothing to gain by two.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        if hasattr(os, "sched_getaffinity"):
            # The benchmark has bound itself to one core; vLLM would pick its own.
            settings["VLLM_CPU_OMP_THREADS_BIND"] = str(max(os.sched_getaffinity(0)))
        command = [str(python), str(Path(__file__).with_name("vllm_worker.py"))]
        command += [str(self.folder), "--dtype", dtype, "--members", str(members)]
        command += ["--rank", str(rank), "--context", str(longest), "--sequences", str(sequences)]
        # A step must hold a token of every sequence.
        command += ["--batched-tokens", str(max(BATCHED_TOKENS, sequences))]
        with self.log.open("w") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **settings},
            )

    def load(self, members: Mapping[str, AdapterState]) -> None:
        """Write the members as PEFT folders and have vLLM load them under new names."""
        self.generation += 1
        root = self.folder / f"generation-{self.generation}"
        for name, member in members.items():
            member.save(root / name)
        self._ask(op="load", adapters={name: str(root / name) for name in members})
        shutil.rmtree(root)
        self.names = list(members)

    def generate(self, work: Workload) -> Tokens:
        """Greedy tokens of every member on every prompt."""
        answer = self._ask(
            op="generate",
            prompts=[list(ids) for _ in self.names for ids in work.ids],
            adapters=[name for name in self.names for _ in work.ids],
            tokens=work.tokens,
        )
        generated: Tokens = answer["generated"]
        return generated

    def peak_gb(self) -> float:
        """Highest resident memory of the worker in GB (10^9 bytes)."""
        return float(self._ask(op="usage")["peak_kilobytes"]) * 1024 / 1e9

    def cpu_seconds(self) -> float:
        """Processor time of the worker."""
        return float(self._ask(op="usage")["cpu_seconds"])

    def close(self) -> None:
        """End the worker and remove its files."""
        process: subprocess.Popen[str] | None = getattr(self, "process", None)
        if process is not None:
            if process.stdin is not None:
                with suppress(BrokenPipeError):
                    process.stdin.close()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _ask(self, **message: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            said = [text for text in self.log.read_text().splitlines() if text.strip()]
            raise UserError(f"vLLM ended: {said[-1] if said else 'it wrote nothing'}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UserError(f"vLLM failed: {answer['error']}")
        return answer
