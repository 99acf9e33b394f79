"""How an adapter starts."""

from loralab.adapters.inits.initialize import InitReport, initialize

__all__ = ["InitReport", "initialize"]
