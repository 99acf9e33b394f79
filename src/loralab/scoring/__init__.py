"""Scores of completions: in process, or in worker processes with a deadline for each."""

from loralab.scoring.one import LARGEST_REWARD, scored
from loralab.scoring.pool import Scorer

__all__ = ["LARGEST_REWARD", "Scorer", "scored"]
