"""The pull of a spline's values towards the identity, under any trainer.

    R = sum over layers of  weight x mean_j (v_j - k_j)^2        (weight: spline_reg_weight)

Its gradient, 2 weight (v - k) / num_knots, is added to the gradients that the optimiser is about
to use: by a hook that PyTorch runs at the head of every `optimizer.step()`. So each step
minimises (the trainer's loss) + R, with exactly one R a step, whatever the trainer does before:
- gradient accumulation and loss scales that the trainer chooses do not multiply it;
- mixed precision: it is added after a GradScaler has unscaled the gradients;
- several processes: after they have averaged gradients, the same on each;
- nothing is added where no gradient came (an inactive or frozen adapter).
It comes after gradient clipping, so the logged gradient norm is without it.

Not covered: an optimiser that evaluates a closure (L-BFGS), and one that holds flattened shards
in the place of the parameters (DeepSpeed ZeRO, FSDP 1; FSDP 2 is covered). There, add
`spline_regularizer(model)` to your own loss.

Weight decay on the values pulls towards 0, not the identity: leave it at 0, or keep the splines
out of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from loralab.adapters.knots import shared_knots

if TYPE_CHECKING:
    from loralab.adapters.spline import LoraSpline

_penalised: WeakSet[LoraSpline] = WeakSet()


def penalise(spline: LoraSpline) -> None:
    """Have every optimiser that trains this spline's values add the gradient of R."""
    _penalised.add(spline)


def spline_regularizer(
    model: nn.Module, adapter: str = "default", weight: float | None = None
) -> Tensor:
    """R of one adapter, a scalar with a gradient, for a log or a loss.

    weight: in the place of the adapter's own spline_reg_weight. 0 if the model has no splines.
    """
    total = torch.zeros(())
    for module in model.modules():
        splines = getattr(module, "lora_spline", None)
        if splines is not None and adapter in splines:
            own = splines[adapter]
            share = own.reg_weight if weight is None else weight
            values = whole(own.values)
            mean = (values - own.knots()).float().square().mean()
            total = total.to(mean.device) + share * mean
    return total


def whole(parameter: Tensor) -> Tensor:
    """All of a parameter, also where FSDP 2 has sharded it."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


@torch.no_grad()
def _add_gradient(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not _penalised:
        return
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    # An optimiser that unscales by itself still holds scaled gradients here.
    scale = getattr(optimizer, "grad_scale", None)
    # By strength: a model has hundreds of splines of five numbers, and a call for each is slow.
    alike: dict[tuple[float, torch.device, torch.dtype], list[tuple[Tensor, Tensor, Tensor]]] = {}
    for spline in list(_penalised):
        values = spline.values
        if values.grad is None or id(values) not in trained or spline.reg_weight == 0:
            continue
        grid = (spline.num_knots, spline.k_min, spline.k_max)
        knots = shared_knots(*grid, values.device, values.dtype)
        if isinstance(values, DTensor):
            # Every process knows the whole grid: nothing to send.
            knots = distribute_tensor(
                knots, values.device_mesh, values.placements, src_data_rank=None
            )
        elif values.shape != knots.shape:
            continue  # a flattened shard, of which nobody says where it starts
        strength = 2 * spline.reg_weight / spline.num_knots
        if scale is not None or isinstance(values, DTensor):
            pull = (values - knots) * strength
            values.grad.add_(pull if scale is None else pull * scale)
        else:
            key = (strength, values.device, values.dtype)
            alike.setdefault(key, []).append((values.grad, values, knots))
    for (strength, _, _), rows in alike.items():
        gradients = [gradient for gradient, _, _ in rows]
        torch._foreach_add_(gradients, [values for _, values, _ in rows], alpha=strength)
        torch._foreach_add_(gradients, [knots for _, _, knots in rows], alpha=-strength)


register_optimizer_step_pre_hook(_add_gradient)
