"""The population engine as a competitor in the benchmark."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from loralab.adapters.state import AdapterState
from loralab.bench.peers import InProcess, Tokens, never_end
from loralab.bench.workloads import Workload
from loralab.engines.base import Request, Sampling

if TYPE_CHECKING:
    from loralab.engines.batched import BatchedEngine


def make_engine(model: Any, tokenizer: Any, backend: Literal["native", "torch"]) -> BatchedEngine:
    """An engine on one thread that runs past the end token.

    Raises:
        UserError: the backend cannot run this model here.
    """
    from loralab.engines.batched import BatchedEngine

    never_end(model)
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    return BatchedEngine(model, endless, backend=backend, threads=1)


class Ours(InProcess):
    """`BatchedEngine`: all members and prompts in one batch, prompts tokenised by the engine.

    empty: members without a single factor, so that the engine does all it does for a population
        except the adapters' arithmetic.
    """

    def __init__(self, engine: BatchedEngine, empty: bool = False) -> None:
        self.engine = engine
        self.empty = empty
        self.detail = engine.kernel
        self.names: list[str] = []

    def load(self, members: Mapping[str, AdapterState]) -> None:
        """Load (pack) the members."""
        if self.empty:
            members = {name: AdapterState({}, member.scaling) for name, member in members.items()}
        self.engine.load(members)
        self.names = list(members)

    def generate(self, work: Workload) -> Tokens:
        """Greedy tokens of every member on every prompt."""
        sampling = Sampling(max_new_tokens=work.tokens)
        requests = [
            Request(prompt, name, sampling) for name in self.names for prompt in work.prompts
        ]
        return [list(completion.tokens) for completion in self.engine.generate(requests)]
