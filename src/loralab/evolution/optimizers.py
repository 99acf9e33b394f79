"""How a direction of ascent becomes a step: SGD, momentum, Adam.

Directions and steps are flat float32 vectors in units of each tensor's noise sigma: 1 moves an
entry by one standard deviation of its perturbation. NumPy rounds each operation by itself, in
one order on any number of threads, which is what keeps a replayed run bit-identical.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loralab.config import OptimizerConfig
from loralab.evolution.layout import Floats


@dataclass(frozen=True)
class Moments:
    """What an optimizer remembers. None until the first step that needs it."""

    steps: int = 0
    first: Floats | None = None
    second: Floats | None = None


def step(options: OptimizerConfig, moments: Moments, direction: Floats) -> tuple[Floats, Moments]:
    """The step for a direction (n,), before the learning rate, and the moments after it.

    sgd: the direction. momentum: m = momentum * m + direction, the step is m (as torch.optim.SGD).
    adam: m / (sqrt(v) + eps), both bias-corrected (Kingma & Ba 2015, arXiv 1412.6980).
    """
    steps = moments.steps + 1
    if options.name == "sgd":
        return direction, Moments(steps)
    if options.name == "momentum":
        first = _decayed(moments.first, options.momentum, direction, 1.0)
        return first, Moments(steps, first)
    first = _decayed(moments.first, options.beta1, direction, 1.0 - options.beta1)
    second = _decayed(moments.second, options.beta2, np.square(direction), 1.0 - options.beta2)
    divisor = second / np.float32(1.0 - options.beta2**steps)
    np.sqrt(divisor, out=divisor)
    divisor += np.float32(options.eps)
    np.divide(first, divisor, out=divisor)
    divisor /= np.float32(1.0 - options.beta1**steps)
    return divisor, Moments(steps, first, second)


def _decayed(old: Floats | None, decay: float, new: Floats, weight: float) -> Floats:
    """decay * old + weight * new, as a new array."""
    out = np.multiply(new, np.float32(weight))
    if old is not None:
        out += old * np.float32(decay)
    return out
