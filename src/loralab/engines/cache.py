"""The key-value cache of a batch: one preallocated buffer per layer, rows padded on the left.

Rows of a batch are padded on the left, so every row's next token goes into the same column. The
buffers are written in place and never grow; rows that have finished are squeezed out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from loralab.errors import UserError

# Transformers before 5.20 leaves layers without a cache out.
_EMPTY: Any = getattr(cache_utils, "DummyLayer", ())


@dataclass(frozen=True)
class LayerShape:
    """What one layer caches per token. `window` is None for full attention."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    window: int | None

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        return self.heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


def measure_layers(template: DynamicCache, model_name: str) -> list[LayerShape | None]:
    """Shapes from a cache that a forward has filled; None for layers that hold no cache.

    Raises UserError for a model whose state is more than keys and values.
    """
    shapes: list[LayerShape | None] = []
    for layer in template.layers:
        if isinstance(layer, _EMPTY):
            shapes.append(None)
        elif type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            keys, values = layer.keys, layer.values
            shapes.append(
                LayerShape(
                    keys.shape[1],
                    keys.shape[3],
                    values.shape[3],
                    keys.dtype,
                    keys.device,
                    getattr(layer, "sliding_window", None),
                )
            )
        else:
            raise UserError(
                f"{model_name} keeps a {type(layer).__name__} as its state: the batched engine "
                "runs models with plain key-value attention only"
            )
    return shapes


@dataclass
class Cursor:
    """Where the forward in progress reads and writes, shared by all layers.

    rows: which rows take part. first: leftmost column it sees. past: columns it has behind it.
    position: the same place as a 0-d tensor, set when shapes must stay fixed (then the whole
    buffer is seen and the mask alone hides what lies ahead).
    """

    rows: slice = field(default_factory=lambda: slice(0, 0))
    first: int = 0
    past: int = 0
    position: Tensor | None = None


class PopulationLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values: (rows, heads, columns, d) each."""

    is_compileable = False
    is_croppable = False

    def __init__(self, shape: LayerShape, rows: int, columns: int, cursor: Cursor) -> None:
        super().__init__()
        self.shape = shape
        self.cursor = cursor
        self.is_sliding = shape.window is not None
        size = (rows, shape.heads, columns)
        self.keys = torch.empty((*size, shape.key_dim), dtype=shape.dtype, device=shape.device)
        self.values = torch.empty((*size, shape.value_dim), dtype=shape.dtype, device=shape.device)
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the buffers exist from the start."""

    def _hidden(self) -> int:
        """Columns at the left that a sliding window no longer reaches."""
        if self.shape.window is None:
            return 0
        return max(self.cursor.past - self.shape.window + 1, 0)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values (rows, heads, queries, d); return all that can be seen."""
        cursor, queries = self.cursor, key_states.shape[2]
        rows = cursor.rows
        if cursor.position is not None:
            columns = cursor.position + torch.arange(queries, device=key_states.device)
            keys, values = self.keys[rows], self.values[rows]
            keys.index_copy_(2, columns, key_states)
            values.index_copy_(2, columns, value_states)
            return keys, values
        start = cursor.first + cursor.past
        self.keys[rows, :, start : start + queries] = key_states
        self.values[rows, :, start : start + queries] = value_states
        if cursor.past == 0:
            return key_states, value_states
        seen = slice(cursor.first + self._hidden(), start + queries)
        return self.keys[rows, :, seen], self.values[rows, :, seen]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys seen by the next forward, and how far the first of them is from column `first`."""
        if self.cursor.position is not None:
            return self.keys.shape[2], 0
        hidden = self._hidden()
        return self.cursor.past + query_length - hidden, hidden

    def get_seq_length(self) -> int | Tensor:
        """Columns behind the forward in progress (a tensor when shapes are fixed)."""
        return self.cursor.past if self.cursor.position is None else self.cursor.position

    def get_max_length(self) -> int:
        """Columns of the buffer."""
        return int(self.keys.shape[2])

    def blank(self, rows: slice, columns: slice) -> None:
        """Zero a block that no forward writes: masked keys must still be finite."""
        self.keys[rows, :, columns] = 0
        self.values[rows, :, columns] = 0

    def squeeze(self, rows: Tensor, start: int, columns: int) -> None:
        """Move `rows` (ascending, int64) up to rows start, start + 1, ..."""
        stop = start + rows.shape[0]
        for buffer in (self.keys, self.values):
            filled = buffer[:, :, :columns]
            filled[start:stop] = filled.index_select(0, rows)


class PopulationCache(Cache):  # type: ignore[misc]
    """Preallocated layers and the cursor they share."""

    def __init__(self, shapes: list[LayerShape | None], rows: int, columns: int) -> None:
        self.cursor = Cursor()
        super().__init__(
            layers=[
                _EMPTY() if s is None else PopulationLayer(s, rows, columns, self.cursor)
                for s in shapes
            ]
        )

    @property
    def is_compileable(self) -> bool:
        """Whether this forward's shapes are fixed: then masks are always built, never skipped."""
        return self.cursor.position is not None

    @property
    def population_layers(self) -> list[PopulationLayer]:
        """The layers that hold keys and values."""
        return [layer for layer in self.layers if isinstance(layer, PopulationLayer)]

    def blank(self, rows: slice, columns: slice) -> None:
        """Zero a block in every layer."""
        for layer in self.population_layers:
            layer.blank(rows, columns)

    def copy_columns(
        self, other: PopulationCache, sources: list[int], targets: list[int], columns: int
    ) -> None:
        """Copy the first columns of the other cache's rows `sources` into the rows `targets`."""
        pairs = zip(self.population_layers, other.population_layers, strict=True)
        for mine, theirs in pairs:
            source = torch.tensor(sources, device=theirs.keys.device)
            target = torch.tensor(targets, device=mine.keys.device)
            mine.keys[target, :, :columns] = theirs.keys[source]
            mine.values[target, :, :columns] = theirs.values[source]

    def squeeze(self, rows: list[int], columns: int) -> None:
        """Keep `rows` (ascending): they become rows 0, 1, ...; `columns` are filled."""
        start = next((i for i, row in enumerate(rows) if row != i), len(rows))
        if start == len(rows):
            return
        layers = self.population_layers
        index = torch.tensor(rows[start:], device=layers[0].keys.device)
        for layer in layers:
            layer.squeeze(index.to(layer.keys.device), start, columns)
