"""What an initialisation is: from a weight and a rank to the two factors it starts with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from loralab.adapters.inits.scene import Scene, Site


@dataclass(frozen=True)
class Facts:
    """What `loralab inits` and docs/initialisation.md say of an initialisation.

    unchanged: whether the model's function is the same at step 0.
    quantized: whether it runs on an nf4 or int8 base.
    changes_base: whether it moves a part of W into the adapter, so that a disabled adapter is not
        the base model any more (see `loralab.adapters.true_base`).
    needs_plain: whether its formula needs dW = s BA: it cannot start an adapter that computes
        another function of BA.
    """

    formula: str
    source: str
    unchanged: str
    cost: str
    needs: str
    quantized: bool = True
    changes_base: bool = False
    needs_plain: bool = False


@dataclass(frozen=True)
class LoraInit:
    """The start of one module's adapter.

    A: (r, in). B: (out, r). correction: (out, in), added to the base's weight, or None.
    figures: what the strategy measured while it fitted, by name.
    """

    A: Tensor
    B: Tensor
    correction: Tensor | None = None
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What a strategy may look at besides the weight: the module, and the model around it."""

    site: Site
    scene: Scene

    @property
    def scaling(self) -> float:
        """alpha / r: the adapter's change of W is scaling * B @ A."""
        return self.site.scaling


@runtime_checkable
class InitStrategy(Protocol):
    """Starts one module after another. The others change the whole model at once (`WholeModel`)."""

    facts: ClassVar[Facts]

    def __call__(
        self, weight: Tensor, rank: int, generator: torch.Generator, context: Context
    ) -> LoraInit:
        """weight: (out, in), fp32, dequantised if need be; not to be changed."""
        ...


@runtime_checkable
class WholeModel(Protocol):
    """Starts every module of a model together."""

    facts: ClassVar[Facts]

    def apply(self, scene: Scene) -> Mapping[str, float]:
        """Set the factors of every site; figures of the whole, by name."""
        ...
