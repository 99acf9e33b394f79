"""Tiny random models, a tokenizer and random adapters, for tests that need no download."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers.pytorch_utils import Conv1D

from loralab.adapters.state import AdapterState, Factors

VOCABULARY = 67
BOS, EOS, PAD, UNK = 0, 1, 2, 3
WINDOW = 5
"""Sliding window of the models that have one: shorter than most prompts."""

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "tie_word_embeddings": False,
}


def _gpt2() -> Any:
    return tf.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=96,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**_SHAPE),
    "qwen2": lambda: tf.Qwen2Config(**_SHAPE),
    "qwen3": lambda: tf.Qwen3Config(**_SHAPE, head_dim=16),
    "gemma3": lambda: tf.Gemma3TextConfig(
        **_SHAPE,
        head_dim=16,
        query_pre_attn_scalar=40,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gpt2": _gpt2,
    "phi3": lambda: tf.Phi3Config(**_SHAPE),
    "mistral": lambda: tf.MistralConfig(**_SHAPE, sliding_window=WINDOW),
    "olmo2": lambda: tf.Olmo2Config(**_SHAPE),
}


def save_quantisable(path: Path, noise: float = 0.1) -> Any:
    """A Llama on disk, of widths that bitsandbytes' CPU kernels take; returns it too."""
    config = CONFIGS["llama"]()
    config.intermediate_size = 128
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = tf.LlamaForCausalLM(config)
        for parameter in made.parameters():
            parameter.data += noise * torch.randn_like(parameter)
    made.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return made


def model(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A model with random weights, biases and norms, large enough to give distinct logits."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = tf.AutoModelForCausalLM.from_config(CONFIGS[kind]())
        for parameter in made.parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.25)
            else:
                parameter.data += 0.2 * torch.randn_like(parameter)
    made.generation_config.eos_token_id = EOS
    made.generation_config.pad_token_id = PAD
    return made.to(dtype).eval()


def tokenizer() -> Any:
    """Two-letter words, split at spaces, decoded without spaces: text crosses token borders."""
    letters = "abcdefgh"
    words = [a + b for a in letters for b in letters]
    vocabulary = {"<bos>": BOS, "<eos>": EOS, "<pad>": PAD}
    vocabulary |= {word: len(vocabulary) + index for index, word in enumerate(words)}
    assert len(vocabulary) == VOCABULARY
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="aa"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    made = tf.PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        padding_side="left",
    )
    made.chat_template = (
        "{{ bos_token }}{% for m in messages %} {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}ha{% endif %}"
    )
    return made


def words(count: int, seed: int) -> str:
    """A prompt of this many random words."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(0, 8, (count, 2), generator=generator).tolist()
    return " ".join("abcdefgh"[a] + "abcdefgh"[b] for a, b in picks)


def linear_names(made: nn.Module) -> list[str]:
    """Names of every linear layer but the head."""
    head = made.get_output_embeddings()  # type: ignore[operator]
    return [
        name
        for name, module in made.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]


def adapter(
    made: nn.Module,
    seed: int,
    rank: int = 4,
    scaling: float = 1.5,
    shared: AdapterState | None = None,
    names: Sequence[str] | None = None,
    size: float = 0.15,
) -> AdapterState:
    """A random adapter, B random too; `shared` lends its A tensors."""
    generator = torch.Generator().manual_seed(seed)
    modules = dict(made.named_modules())
    factors = {}
    for name in names or linear_names(made):
        weight = modules[name].weight
        outputs, features = (
            weight.shape[::-1] if isinstance(modules[name], Conv1D) else weight.shape
        )
        a = torch.randn(rank, features, generator=generator) / features**0.5
        b = torch.randn(outputs, rank, generator=generator) * size
        factors[name] = Factors(a if shared is None else shared.factors[name].A, b)
    return AdapterState(factors, scaling)


class PeftReference:
    """PEFT's own model with the same adapters: what the engine must agree with."""

    def __init__(self, made: nn.Module, adapters: dict[str, AdapterState]) -> None:
        first = next(iter(adapters.values()))
        config = LoraConfig(
            r=first.rank,
            lora_alpha=first.scaling * first.rank,
            target_modules=list(first.factors),
            task_type="CAUSAL_LM",
        )
        self.model: Any = get_peft_model(copy.deepcopy(made), config, adapter_name="first")
        for name, state in adapters.items():
            self.model.add_adapter(
                name,
                LoraConfig(
                    r=state.rank,
                    lora_alpha=state.scaling * state.rank,
                    target_modules=list(state.factors),
                    task_type="CAUSAL_LM",
                ),
            )
            for module, (a, b) in state.factors.items():
                layer = self.model.base_model.model.get_submodule(module)
                layer.lora_A[name].weight.data.copy_(a)
                layer.lora_B[name].weight.data.copy_(b)
        self.model.eval()

    def use(self, name: str | None) -> Any:
        """The model with this adapter on; None: none on."""
        if name is None:
            self.model.base_model.disable_adapter_layers()
        else:
            self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(name)
        return self.model

    def greedy(self, name: str | None, prompt: list[int], max_new_tokens: int) -> tuple[int, ...]:
        """New tokens of `generate()`, the end token included."""
        out = self.use(name).generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=max_new_tokens,
        )
        return tuple(out[0, len(prompt) :].tolist())

    @torch.no_grad()
    def logits(self, name: str | None, tokens: Sequence[int]) -> torch.Tensor:
        """Logits (tokens, vocabulary) float32 of one sequence."""
        result: torch.Tensor = self.use(name)(input_ids=torch.tensor([list(tokens)])).logits[0]
        return result.float()
