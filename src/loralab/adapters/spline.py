"""LS-LoRA: LoRA followed by a learnable one-dimensional function, a spline, one a layer.

    h = W0 x + o phi(i z),    z = (alpha / r) B A dropout(x)

phi is piecewise linear through (k_j, v_j): the knots k are a fixed uniform grid, the values v
are learned, and so are the scales i (input) and o (output). At the start v = k and i = o = 1, so
that the adapter is plain LoRA, bit for bit.

PEFT type "LSLORA". To train with Transformers or TRL pass `LSLoraConfig(...)` where a
`LoraConfig` would go. To load one, `import loralab.adapters` first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from loralab.adapters.knots import knot_positions as knot_positions
from loralab.adapters.nonlinear import (
    NonlinearConfig,
    NonlinearLayer,
    NonlinearModel,
    NonlinearVariant,
    not_mergeable,
    product,
)
from loralab.adapters.peft_types import AdapterType, register
from loralab.adapters.soft_spline import soft_spline
from loralab.adapters.spline_penalty import penalise
from loralab.errors import UserError

Boundary = Literal["extrapolate", "clamp"]
Interpolation = Literal["piecewise", "soft"]
Normalize = Literal["none", "tanh"]
Space = Literal["activation", "weight"]
SplineInit = Literal["identity", "bent"]

BEND = 0.25
"""A bent start moves each value by this fraction of the distance between two knots."""


def spline(
    z: Tensor, values: Tensor, k_min: float, k_max: float, boundary: Boundary = "extrapolate"
) -> Tensor:
    """The piecewise-linear function through (k_j, v_j), elementwise.

        phi(z) = z + d_j + (z - k_j) (d_{j+1} - d_j) / step    for z in segment j,  d = v - k

    Written as z plus the interpolated deviation, so that with v = k it returns z itself: the usual
    form v_j + (z - k_j) s_j loses the digits of a small z. Computed in fp32 at least, and rounded
    back to z's type; gradients of the values are sums over all of z, in fp32 too.

    z: any shape. values: (num_knots,), at least two.
    boundary: outside the grid "extrapolate" goes on straight with the slope of the end segment;
        "clamp" is constant, which leaves such inputs without any gradient.
    """
    work = torch.promote_types(z.dtype, torch.float32)
    x = z.to(work)
    if boundary == "clamp":
        x = x.clamp(k_min, k_max)
    count = values.shape[0]
    knots = knot_positions(count, k_min, k_max, z.device)
    # Against the grid as the values' own type can hold it, so that v = k is exact in bf16 too.
    deviation = values.to(work) - knots.to(values.dtype).to(work)
    slope = deviation.diff() * ((count - 1) / (k_max - k_min))
    offset = deviation[:-1] - slope * knots[:-1]
    # Chosen by masks, not gathered: the gradient is then a plain sum, fast and deterministic.
    slopes, offsets = slope[0], offset[0]
    for segment in range(1, count - 1):
        beyond = x > knots[segment]
        slopes = torch.where(beyond, slope[segment], slopes)
        offsets = torch.where(beyond, offset[segment], offsets)
    return (x + (offsets + slopes * x)).to(z.dtype)


class OutsideCount:
    """How many of a spline's inputs fell outside its grid, on their device until asked."""

    def __init__(self) -> None:
        self.seen = 0
        self._outside: Tensor | int = 0

    @torch.no_grad()
    def add(self, x: Tensor, k_min: float, k_max: float) -> None:
        self.seen += x.numel()
        self._outside = self._outside + ((x < k_min) | (x > k_max)).sum()

    @property
    def share(self) -> float:
        """From 0 to 1; NaN if nothing was seen."""
        return int(self._outside) / self.seen if self.seen else float("nan")


class LoraSpline(nn.Module):
    """One layer's function and its parameters; `layer.lora_spline[adapter]`.

    values: (num_knots,). input_scale, output_scale: (1,). gate: (1,) if gated, else None. Not
    scalars of no dimension, which FSDP cannot shard.
    On a half-precision base PEFT keeps them in fp32, unless autocast_adapter_dtype=False; leave
    that alone, steps of 1e-4 vanish in bf16.
    """

    def __init__(self, config: LSLoraConfig) -> None:
        super().__init__()
        self.num_knots, self.k_min, self.k_max = config.num_knots, config.k_min, config.k_max
        self.boundary, self.normalize = config.boundary, config.normalize
        self.interpolation_method = config.interpolation_method
        self.reg_weight = config.spline_reg_weight
        knots = knot_positions(config.num_knots, config.k_min, config.k_max)
        values = knots.clone()
        if config.resolved_spline_init == "bent":
            bend = BEND * (config.k_max - config.k_min) / (config.num_knots - 1)
            values += bend * (1 - 2 * (torch.arange(config.num_knots) % 2))
        self.values = nn.Parameter(values)
        self.input_scale = nn.Parameter(torch.ones(1))
        self.output_scale = nn.Parameter(torch.full((1,), float(config.output_scale_init)))
        self.register_parameter("gate", None)
        if config.gated:
            self.gate = nn.Parameter(torch.zeros(1))
        self.outside: OutsideCount | None = None
        penalise(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        penalise(self)

    def knots(self) -> Tensor:
        """The grid (num_knots,), in the type of the values."""
        grid = knot_positions(self.num_knots, self.k_min, self.k_max, self.values.device)
        return grid.to(self.values.dtype)

    def placed(self, z: Tensor) -> Tensor:
        """i z, or i tanh(z): where on the grid inputs fall."""
        return self.input_scale * (torch.tanh(z) if self.normalize == "tanh" else z)

    def forward(self, z: Tensor) -> Tensor:
        """o phi(i z), or (1 - g) z + g o phi(i z) if gated; the shape and type of z."""
        kept = z.to(torch.promote_types(z.dtype, torch.float32))
        x = self.placed(kept)
        if self.outside is not None:
            self.outside.add(x, self.k_min, self.k_max)
        if self.interpolation_method == "soft":
            out = soft_spline(x, self.values, self.k_min, self.k_max)
        else:
            out = spline(x, self.values, self.k_min, self.k_max, self.boundary)
        out = self.output_scale * out
        if self.gate is not None:
            out = kept + self.gate * (out - kept)
        return out.to(z.dtype)


@dataclass
class LSLoraConfig(NonlinearConfig):
    """LoRA's configuration (r, lora_alpha, target_modules, ...) and the spline's.

    Raises:
        UserError: an option is out of range, or belongs to plain LoRA only.
    """

    kind = AdapterType.LSLORA

    num_knots: int = field(default=5, metadata={"help": "Knots of each spline, 2 at least."})
    k_min: float = field(default=-3.0, metadata={"help": "The first knot."})
    k_max: float = field(default=3.0, metadata={"help": "The last knot."})
    interpolation_method: Interpolation = field(
        default="piecewise",
        metadata={"help": "'soft' (a softmax over the knots) is not the identity at the start."},
    )
    boundary: Boundary = field(
        default="extrapolate",
        metadata={
            "help": "Outside the grid. 'clamp' has no gradient there and breaks the identity."
        },
    )
    gated: bool = field(
        default=False, metadata={"help": "h = W0 x + (1 - g) z + g o phi(i z); g starts at 0."}
    )
    spline_reg_weight: float = field(
        default=0.01,
        metadata={"help": "Weight of mean (v - k)^2, summed over layers, in the objective."},
    )
    spline_init: SplineInit | None = field(
        default=None,
        metadata={
            "help": (
                "'identity': v = k. 'bent': v = k plus a quarter of the knots' distance, up and "
                "down in turn. Default: 'identity', or 'bent' if gated."
            )
        },
    )
    output_scale_init: float = field(default=1.0, metadata={"help": "o at the start."})
    normalize: Normalize = field(
        default="none",
        metadata={"help": "'tanh' puts tanh(z) in the place of z; it reproduces an old fault."},
    )
    space: Space = field(
        default="activation",
        metadata={"help": "'weight': dW = o phi(i (alpha / r) B A) elementwise; it can be merged."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, kind in (
            ("interpolation_method", Interpolation),
            ("boundary", Boundary),
            ("normalize", Normalize),
            ("space", Space),
        ):
            _check(name, getattr(self, name), f"one of {get_args(kind)}", get_args(kind))
        _check(
            "spline_init",
            self.spline_init,
            "'identity', 'bent' or None",
            (None, "identity", "bent"),
        )
        if self.num_knots < 2:
            raise UserError(f"LSLoraConfig: num_knots is {self.num_knots}; expected 2 or more")
        if not self.k_min < self.k_max:
            raise UserError(
                f"LSLoraConfig: k_min is {self.k_min}; expected less than k_max, {self.k_max}"
            )
        if self.spline_reg_weight < 0:
            raise UserError(
                f"LSLoraConfig: spline_reg_weight is {self.spline_reg_weight}; expected 0 or more"
            )

    @property
    def mergeable(self) -> bool:
        return self.space == "weight"

    @property
    def resolved_spline_init(self) -> SplineInit:
        """Gated, the identity is a stationary point: phi(z) - z = 0 leaves no gradient to the
        gate, and a gate of 0 none to the spline. A gate of 0 is plain LoRA whatever the spline."""
        return self.spline_init or ("bent" if self.gated else "identity")

    def variant(self) -> NonlinearVariant:
        return SplineVariant(self)


def _check(name: str, value: object, expected: str, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise UserError(f"LSLoraConfig: {name} is {value!r}; expected {expected}")


class SplineVariant(NonlinearVariant):
    """The spline on z, or on the update of the weights."""

    def __init__(self, config: LSLoraConfig) -> None:
        self.config = config
        self.space: Space = config.space
        self.mergeable = config.mergeable

    def init(self, module: LoraLayer, adapter_name: str, **_: Any) -> None:
        # In fp32 from the start: PEFT casts an adapter to its base's bf16 and back, and most
        # grids do not come through that as they were.
        made = LoraSpline(self.config).to(module.lora_A[adapter_name].weight.device)
        module.lora_spline[adapter_name] = made

    def forward(
        self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        if self.space == "weight":
            return super().forward(module, active_adapter, x, result, **kwargs)
        a, b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        z = b(a(module.lora_dropout[active_adapter](x))) * module.scaling[active_adapter]
        change: Tensor = module.lora_spline[active_adapter](z)
        return result + change

    def delta_weight(self, layer: LoraLayer, adapter: str) -> Tensor:
        if self.space == "activation":
            raise UserError(not_mergeable(adapter))
        change: Tensor = layer.lora_spline[adapter](
            layer.scaling[adapter] * product(layer, adapter)
        )
        return change


class SplineLayer(NonlinearLayer):
    """A LoRA layer with room for splines."""

    adapter_layer_names = (*LoraLayer.adapter_layer_names, "lora_spline")

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if not hasattr(self, "lora_spline"):
            self.lora_spline = nn.ModuleDict({})
        super().update_layer(adapter_name, *args, **kwargs)


class LSLoraModel(NonlinearModel):
    """PEFT's tuner for LS-LoRA."""

    layer_mixin = SplineLayer

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        for module in self.model.modules():
            splines = getattr(module, "lora_spline", None)
            if splines is not None and adapter_name in splines:
                splines[adapter_name].to(module.lora_A[adapter_name].weight.dtype)


register(AdapterType.LSLORA, LSLoraConfig, LSLoraModel)
