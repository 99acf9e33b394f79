"""Engines: many adapters loaded at once, requests for any of them in one batch."""

from loralab.engines.base import Completion, Engine, Request, Sampling
from loralab.engines.batched import BatchedEngine

__all__ = ["BatchedEngine", "Completion", "Engine", "Request", "Sampling"]
