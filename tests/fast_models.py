"""Two linear layers with an adapter, and what a step through them gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

TOLERANCE = 1e-5


class Net(nn.Module):
    """Two linear layers (the first with bias) around a nonlinearity."""

    def __init__(self, inputs: int = 24, inner: int = 40, outputs: int = 16) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, inner)
        self.second = nn.Linear(inner, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(torch.tanh(self.first(x)))
        return result


def randomize(model: nn.Module, seed: int = 1) -> None:
    """Factors and values around 0, a spline's scales around -1 and 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            around = -1 if "input_scale" in name else 1 if "output_scale" in name else 0
            parameter.data.copy_(noise + around)


def adapted(
    dtype: torch.dtype = torch.float32, kind: type[LoraConfig] = LoraConfig, **options: Any
) -> Any:
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["first", "second"], **options}
    model = get_peft_model(Net().to(dtype), kind(**settings))
    randomize(model)
    return model


def with_small_update(model: Any) -> Any:
    """The model with an update several times smaller than W x, as training leaves it."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 0.1
    return model


def results(
    model: nn.Module, x: Tensor, weights: Tensor, call: Callable[..., Tensor] | None = None
) -> dict[str, Tensor]:
    """Output and every gradient of sum(weights * output), the input's included."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(5)
    y = (call or model)(x)
    (y.float() * weights).sum().backward()
    found = {"y": y.detach(), "x": x.grad}
    found |= {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found


def sample(dtype: torch.dtype = torch.float32, rows: tuple[int, ...] = (3, 5)) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(*rows, 24, generator=generator).to(dtype)
    return x, torch.randn(*rows, 16, generator=generator)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert found[name].dtype == wanted.dtype, name
        error = (found[name] - wanted).abs().max() if wanted.numel() else torch.tensor(0.0)
        assert error <= TOLERANCE * max(1.0, float(wanted.abs().max() if error else 1)), name
