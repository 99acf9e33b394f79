"""Which modules of a model an adapter changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from loralab.errors import UserError


def linear_weights(
    model: nn.Module, target_modules: str | Sequence[str] = "all-linear"
) -> dict[str, Tensor]:
    """Weights (out, in) of the targeted linear modules by name, in the model's order.

    "all-linear" is every linear module but the output head, as in PEFT. A name in a list matches
    a module whose path is that name or ends in it ("q_proj", "layers.0.mlp.up_proj"). The weights
    are views of the model's own; those of GPT-2's Conv1D, stored (in, out), are transposed views.

    Raises:
        UserError: a name matches no linear module.
    """
    found = {
        name: weight for name, m in model.named_modules() if (weight := weight_of(m)) is not None
    }
    if not isinstance(target_modules, str):
        return _named(found, target_modules)
    if target_modules != "all-linear":
        raise UserError(
            f'target_modules is {target_modules!r}; expected "all-linear" or a list of module names'
        )
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    return {name: weight for name, weight in found.items() if model.get_submodule(name) is not head}


def weight_of(module: nn.Module | None) -> Tensor | None:
    """The weight (out, in) of nn.Linear or GPT-2's Conv1D, a view of its own; None of others."""
    if isinstance(module, nn.Linear):
        return module.weight.detach()
    # Transformers' Conv1D stores (in, out); told by name so that nothing here imports Transformers.
    if module is not None and type(module).__name__ == "Conv1D":
        stored: Any = module.weight
        return stored.detach().t()  # type: ignore[no-any-return]
    return None


def _named(found: dict[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    for wanted in names:
        if not any(_matches(name, wanted) for name in found):
            kinds = sorted({name.rpartition(".")[2] for name in found})
            raise UserError(
                f"target_modules: no linear module is named {wanted!r}; this model has "
                f"{', '.join(kinds)}"
            )
    return {n: weight for n, weight in found.items() if any(_matches(n, w) for w in names)}


def _matches(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith("." + wanted)


def layer_index(name: str) -> int | None:
    """The number of the layer a module is in, from its path ("model.layers.3.mlp.up_proj": 3)."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)
