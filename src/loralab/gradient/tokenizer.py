"""A byte-level BPE tokenizer trained on a corpus (arXiv:1508.07909, on bytes as in GPT-2)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
TURNS = (
    "{{ bos_token }}{% for turn in messages %}"
    "{{ '\n\n' if not loop.first }}"
    "{{ {'user': 'Human', 'assistant': 'Assistant'}.get(turn['role'], turn['role'] | capitalize) }}"
    ": {{ turn['content'] }}{{ eos_token if turn['role'] == 'assistant' }}{% endfor %}"
    "{{ '\n\nAssistant:' if add_generation_prompt }}"
)
"""The chat template: turns as HH-RLHF writes them (arXiv:2204.05862), answers with an end token."""


def train_tokenizer(texts: Iterable[str], vocab_size: int, context: int) -> Any:
    """A Transformers tokenizer of at most `vocab_size` tokens, the 256 bytes and BOS, EOS, PAD
    among them, so that any text can be said. It puts BOS before a text, and writes chats as TURNS.

    context: tokens that its model takes.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[BOS, EOS, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = TURNS
    return made
