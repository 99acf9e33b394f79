"""What a finished stage left: its model (merged when asked for), its adapter, its rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from loralab.config import AnyConfig
from loralab.errors import UserError
from loralab.gradient.distill import ROWS
from loralab.stages.digest import content_digest

MERGED = "merged"


class Left:
    """One finished stage. config: with its references resolved."""

    def __init__(self, name: str, config: AnyConfig, directory: Path) -> None:
        self.name = name
        self.config = config
        self.directory = directory
        self._digests: dict[str, str] = {}

    def path(self, output: str, say: Callable[[str], None]) -> Path:
        """A directory or file for other stages to read.

        The model of a stage that trained an adapter is its base with the adapter merged, in the
        base's own dtype, made by the first stage that asks.

        Raises:
            UserError: it is not there, or the adapter cannot be merged.
        """
        if output == "adapter":
            return self._there(self.directory / "adapter")
        if output == "data":
            return self._there(self.directory / ROWS)
        whole, merged = self.directory / "model", self.directory / MERGED
        if whole.is_dir():
            return whole
        if not merged.is_dir():
            from loralab.export import export

            made = export(self.directory / "adapter", "merged", merged, self.config.model)
            told = next((line for line in made.lines if line.startswith("merged")), "merged")
            say(f"stage {self.name}: {told}")
        return merged

    def digest(self, output: str, say: Callable[[str], None]) -> str:
        """Of the content of an output, read once."""
        if output not in self._digests:
            self._digests[output] = content_digest([self.path(output, say)])
        return self._digests[output]

    def _there(self, path: Path) -> Path:
        if not path.exists():
            raise UserError(f"stage {self.name}: {path} is not there; remove its run directory")
        return path
