"""A step with fused layers is the stock step, in fp32 to rounding, in bf16 nearer to fp32."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import Tensor

import tiny
from layer_samples import draw, off, way
from loralab.adapters import LSLoraConfig
from loralab.gradient import fast
from loralab.gradient.attention import NAME, named_attention
from loralab.gradient.collate import flatten, pad
from loralab.gradient.layer_functions import RotaryAttention
from loralab.gradient.layers import fused_layers
from loralab.gradient.lora_function import Remade
from loralab.gradient.loss import labelled_head
from loralab.gradient.native import layers as native
from loralab.gradient.rows import IGNORED, Row
from loralab.models.decoder import DecoderConfig, DecoderForCausalLM
from loralab.models.rope import angles

assert way

pytestmark = pytest.mark.skipif(native.kernels() is None, reason="no C++ compiler")


SHAPE: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**SHAPE),
    "qwen2": lambda: tf.Qwen2Config(**SHAPE),
    "qwen3": lambda: tf.Qwen3Config(**SHAPE, head_dim=32),
    "mistral": lambda: tf.MistralConfig(**SHAPE, sliding_window=50),
    "decoder": lambda: DecoderConfig(**SHAPE),
    "decoder-fused": lambda: DecoderConfig(**SHAPE, attention="fused"),
}


def causal(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    config = MODELS[kind]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = (
            DecoderForCausalLM(config)
            if isinstance(config, DecoderConfig)
            else tf.AutoModelForCausalLM.from_config(config)
        )
        for parameter in made.parameters():
            parameter.data = (
                0.15 * torch.randn_like(parameter)
                if parameter.dim() > 1
                else 1 + 0.2 * torch.randn_like(parameter)
            ).bfloat16()
    return made.to(dtype).train()


def rows() -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in (5, 33, 12):
        ids = tuple(torch.randint(67, (length,), generator=generator).tolist())
        made.append(Row(ids, (IGNORED, IGNORED, *ids[2:])))
    return made


def step(model: Any, fused: bool) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    layers = fused_layers(model) if fused else nullcontext()
    with labelled_head(model), named_attention(model, NAME), layers:
        loss = model(**flatten(rows()))["loss"]
        loss.backward()
    return float(loss.detach()), {n: p.grad.float().clone() for n, p in model.named_parameters()}


def test_positions_over_a_part_of_the_head_go_to_the_class() -> None:
    model = causal("llama", torch.bfloat16).eval()
    ids = torch.arange(12)[None]
    layer = model.model.layers[0].self_attn
    x = draw(1, 12, 128).bfloat16()
    cos, sin = (t[..., :16] for t in angles(torch.arange(12)[None], 32, 1e4))
    with named_attention(model, NAME), fused_layers(model):
        model(input_ids=ids, sequence_lengths=(12,))
        with pytest.raises(RuntimeError, match="size of tensor"):  # Llama's own word for it
            layer(x, (cos, sin), None, sequence_lengths=(12,))


@pytest.mark.parametrize("kind", MODELS)
def test_a_step_with_fused_layers_is_the_stock_step(kind: str, way: str) -> None:
    model = causal(kind)
    model.zero_grad()
    stock_loss = model(**pad(rows(), 0)).loss
    stock_loss.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters()}
    loss, found = step(model, fused=True)
    assert loss == pytest.approx(float(stock_loss), abs=2e-6)
    for name, gradient in wanted.items():
        assert off(found[name], gradient) < 2e-5, name


@pytest.mark.parametrize("kind", MODELS)
def test_a_bf16_step_with_fused_layers_is_nearer_to_fp32(kind: str, way: str) -> None:
    _, exact = step(causal(kind), fused=False)
    loss, plain = step(causal(kind, torch.bfloat16), fused=False)
    other_loss, found = step(causal(kind, torch.bfloat16), fused=True)
    assert other_loss != loss  # the fused layers did run

    def error(gradients: dict[str, Tensor]) -> float:
        return float(sum((gradients[n] - g).square().sum() for n, g in exact.items())) ** 0.5

    # One model of random weights: errors of both kinds vary by a fifth from seed to seed.
    assert error(found) < 1.25 * error(plain)


def test_every_known_layer_is_taken_and_given_back() -> None:
    model = causal("llama")
    with fused_layers(model) as report:
        assert report.taken == {"LlamaRMSNorm": 5, "LlamaMLP": 2, "LlamaAttention": 2}
        assert not report.left
        assert not report.notes
    assert all("forward" not in vars(module) for module in model.modules())
    with fused_layers(tiny.model("gemma3")) as report:
        assert not report.taken
        assert report.left["Gemma3MLP"] == 2
        assert "Gemma3RMSNorm" in report.notes[0]


def test_calls_beyond_training_go_to_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window shorter than a sequence, a cache, padding: as without the kernels."""
    model = causal("mistral").eval()
    ids = torch.arange(60)[None] % 67
    plain = model(input_ids=ids, use_cache=True).logits
    with fused_layers(model):
        assert off(model(input_ids=ids, use_cache=True).logits, plain) < 1e-5
        with named_attention(model, NAME):
            monkeypatch.setattr(RotaryAttention, "apply", None)  # must not be reached
            model(input_ids=ids, sequence_lengths=(60,))


def test_adapters_in_the_projections_are_trained() -> None:
    base = causal("llama", torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * draw(*parameter.shape)
    with labelled_head(base), named_attention(base, NAME), fused_layers(model):
        model(**flatten(rows()))["loss"].backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * 2
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)


@pytest.mark.parametrize("spline", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_inputs_that_can_be_made_again_are_not_kept(
    spline: bool, checkpointing: bool, way: str
) -> None:
    """Gradients are the same bits, and neither norms nor activations wait for backward."""

    def gradients(marked: bool) -> tuple[list[Tensor], int]:
        base = causal("llama")
        kind = LSLoraConfig if spline else LoraConfig
        model = get_peft_model(base, kind(r=4, target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.data = 0.1 * draw(*parameter.shape)
        fast.patch(model)
        if checkpointing:
            model.enable_input_require_grads()
            base.gradient_checkpointing_enable()
        kept: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
        with (
            labelled_head(base),
            named_attention(base, NAME),
            fused_layers(model),
            pytest.MonkeyPatch.context() as patch,
        ):
            if not marked:
                patch.setattr(Remade, "of", staticmethod(lambda x: None))
            with nullcontext() if checkpointing else hooks:
                loss = model(**flatten(rows()))["loss"]
            loss.backward()
        found = [p.grad for p in model.parameters() if p.grad is not None]
        return found, sum(kept.values())

    ours, small = gradients(marked=True)
    plain, large = gradients(marked=False)
    assert len(ours) == 14 * (5 if spline else 2)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    if not checkpointing:
        # All norms' outputs and activations but for one input more, the embeddings.
        tokens, layers = 50, 2
        assert large - small > 0.99 * 4 * tokens * (layers * (2 * 128 + 96) - 128)
