"""What an initialisation cannot run on, said before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from loralab.adapters.inits.base import Facts
from loralab.adapters.inits.scene import Site
from loralab.adapters.nonlinear import NonlinearVariant
from loralab.errors import UserError

# PEFT writes the name into the config, which no nonlinear type takes when it is read again.
_LORA_ONLY = frozenset({"mica"})


def check(facts: Facts, name: str, sites: Iterable[Site]) -> None:
    """Refuse, before anything is computed, what an initialisation cannot run on.

    Raises:
        UserError: the base is quantised and the initialisation changes or reads full weights; it
            rests on dW = s BA and the adapter computes another function of BA; or it changes the
            base, and the adapter is of a type that cannot be saved relative to the true one.
    """
    for site in sites:
        if site.quantized is not None and not facts.quantized:
            raise UserError(
                f"{name} cannot start on a quantised base ({site.name} is {site.quantized}): it "
                "needs or changes the full weights; use zero_b, eva, loftq or quantization_match, "
                "or load the base in bfloat16"
            )
        variant = site.layer.lora_variant.get(site.adapter)
        if not isinstance(variant, NonlinearVariant):
            continue
        moves_base = facts.changes_base and site.quantized is None
        if moves_base or name in _LORA_ONLY:
            raise UserError(
                f"{name} is for plain LoRA: {site.name} has a nonlinear adapter, which cannot be "
                "saved with this start; use zero_b, orthogonal or eva, or adapter type lora"
            )
        if (facts.needs_plain or facts.changes_base) and not _is_plain(site):
            raise UserError(
                f"{name} needs dW = s BA: the adapter of {site.name} is another function of BA at "
                "its start; use zero_b, orthogonal or eva, or adapter type lora"
            )


@torch.no_grad()
def _is_plain(site: Site) -> bool:
    """Whether the adapter's function is the identity, as a spline's is until it is trained."""
    splines = getattr(site.layer, "lora_spline", {})
    if site.adapter not in splines:
        return False
    spline = splines[site.adapter]
    far = 2 * max(abs(spline.k_min), abs(spline.k_max), 1.0)
    z = torch.linspace(-far, far, 101, device=spline.values.device)
    counter, spline.outside = spline.outside, None  # a probe is none of its inputs
    try:
        return bool(torch.equal(spline(z), z))
    finally:
        spline.outside = counter
