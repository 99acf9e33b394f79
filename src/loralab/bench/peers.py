"""Ways to let every member of a population answer the same prompts, in one process.

Each is written in the way that is fastest for it: adapters stay in the model's dtype, ids come
ready made, restoring copies saved weights. All are greedy and run past the end token, so that
every peer generates the same number of tokens.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from loralab.adapters.factors import PEFT_PREFIX
from loralab.adapters.state import AdapterState
from loralab.adapters.targets import linear_weights
from loralab.bench.workloads import Workload

Tokens = list[list[int]]
"""Generated ids of each sequence: all prompts of the first member, then of the second, ..."""


class Peer(Protocol):
    """One way of generating for a population."""

    detail: str
    """What ran, for the record: kernel or settings."""

    def load(self, members: Mapping[str, AdapterState]) -> None:
        """Make these the members, in place of any before."""
        ...

    def generate(self, work: Workload) -> Tokens:
        """Greedy tokens of every member on every prompt."""
        ...

    def cpu_seconds(self) -> float:
        """Processor time spent so far by the process that generates."""
        ...

    def close(self) -> None:
        """Give back what it holds outside this process."""
        ...


def never_end(model: Any) -> None:
    """Make generation run past the end token, wherever an engine may look it up."""
    model.generation_config.eos_token_id = None
    model.config.get_text_config(decoder=True).eos_token_id = None
    model.config.eos_token_id = None


def padded(ids: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Left-padded ids and mask, both (sequences, longest) int64."""
    width = max(len(row) for row in ids)
    tokens = torch.full((len(ids), width), pad)
    mask = torch.zeros(len(ids), width, dtype=torch.int64)
    for i, row in enumerate(ids):
        tokens[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    return tokens, mask


class InProcess:
    """A peer that runs here and holds nothing elsewhere."""

    def cpu_seconds(self) -> float:
        """Processor time of this process."""
        return time.process_time()

    def close(self) -> None:
        """Nothing to give back."""


class _Transformers(InProcess):
    """What the three peers on `generate` share: the call, and text at the end as a user needs."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        never_end(model)
        self.model = model.eval()
        self.tokenizer = tokenizer
        pad = tokenizer.pad_token_id
        self.pad = 0 if pad is None else int(pad)

    def _continue(self, model: Any, ids: Tensor, mask: Tensor, tokens: int, **more: Any) -> Tokens:
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=self.pad,
            **more,
        )[:, ids.shape[1] :]
        self.tokenizer.batch_decode(out, skip_special_tokens=True)
        generated: Tokens = out.tolist()
        return generated


class PerturbAndRestore(_Transformers):
    """The reference way: add dW = scaling B A to the base weights, generate, put them back.

    One member after the other, its prompts in one batch.
    """

    detail = "transformers generate, weights changed in place"

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__(model, tokenizer)
        self.weights = linear_weights(model)
        self.saved = {name: weight.clone() for name, weight in self.weights.items()}
        self.members: Mapping[str, AdapterState] = {}

    def load(self, members: Mapping[str, AdapterState]) -> None:
        """Nothing to make: members are applied one by one as they generate."""
        self.members = members

    @torch.inference_mode()
    def generate(self, work: Workload) -> Tokens:
        """Greedy tokens of every member on every prompt."""
        ids, mask = padded(work.ids, self.pad)
        generated: Tokens = []
        for member in self.members.values():
            for name, (a, b) in member.factors.items():
                self.weights[name].addmm_(b, a, alpha=member.scaling)
            generated += self._continue(self.model, ids, mask, work.tokens)
            for name in member.factors:
                self.weights[name].copy_(self.saved[name])
        return generated


class Peft:
    """A PEFT model with slots for a population; the two PEFT peers share one.

    Slots are made once (`add_adapter` on 210 modules takes far longer than generating); loading a
    generation copies its weights into them.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        never_end(model)
        self.base = model
        self.tokenizer = tokenizer
        self.model: Any = None
        self.names: list[str] = []

    def load(self, members: Mapping[str, AdapterState]) -> None:
        """Fill one slot a member, making those that do not exist yet."""
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

        for name, member in members.items():
            if self.model is None or name not in self.model.peft_config:
                config = LoraConfig(
                    r=member.rank,
                    lora_alpha=member.scaling * member.rank,
                    target_modules=list(member.factors),
                    task_type="CAUSAL_LM",
                )
                # PEFT would keep the adapters of a bf16 model in fp32, which costs casts.
                options = {"adapter_name": name, "autocast_adapter_dtype": False}
                if self.model is None:
                    self.model = get_peft_model(self.base, config, **options)
                else:
                    self.model.add_adapter(name, config, autocast_adapter_dtype=False)
            state = {}
            for module, (a, b) in member.factors.items():
                state[f"{PEFT_PREFIX}{module}.lora_A.weight"] = a
                state[f"{PEFT_PREFIX}{module}.lora_B.weight"] = b
            set_peft_model_state_dict(self.model, state, adapter_name=name)
        self.model.eval()
        self.names = list(members)


class PeftSwitch(_Transformers):
    """PEFT, `set_adapter` for one member after the other, its prompts in one batch."""

    detail = "peft set_adapter, transformers generate"

    def __init__(self, peft: Peft) -> None:
        super().__init__(peft.base, peft.tokenizer)
        self.peft = peft

    def load(self, members: Mapping[str, AdapterState]) -> None:
        """Copy the members' weights into PEFT's slots."""
        self.peft.load(members)

    @torch.no_grad()
    def generate(self, work: Workload) -> Tokens:
        """Greedy tokens of every member on every prompt."""
        ids, mask = padded(work.ids, self.pad)
        generated: Tokens = []
        for name in self.peft.names:
            self.peft.model.set_adapter(name, inference_mode=True)
            generated += self._continue(self.peft.model, ids, mask, work.tokens)
        return generated


class PeftMixed(PeftSwitch):
    """PEFT, all members and prompts in one batch through `adapter_names`."""

    detail = "peft adapter_names, transformers generate"

    @torch.no_grad()
    def generate(self, work: Workload) -> Tokens:
        """Greedy tokens of every member on every prompt."""
        names = self.peft.names
        ids, mask = padded(work.ids * len(names), self.pad)
        rows = [name for name in names for _ in work.ids]
        return self._continue(self.peft.model, ids, mask, work.tokens, adapter_names=rows)
