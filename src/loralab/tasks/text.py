"""Plain text: how well a model predicts it (perplexity), and goes on with it.

Perplexity needs the model's probabilities and is measured by `loralab eval` over the whole of a
split (`loralab.engines.likelihood`). As a task of prompts, an example is a passage cut in two: the
first half is the prompt, and the reward is the share of the second half's words that the completion
begins with.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

from loralab.data.sources import SUFFIXES
from loralab.errors import UserError
from loralab.tasks.base import Example, Prompt, Score, Split
from loralab.tasks.splits import HUB_NAME, rows_of_split, text_field

_PLAIN = (".txt", ".txt.gz")


class Text:
    """Text of a folder or of the hub.

    path: a folder with .txt files, or data files with a column `text`, named train... and test...
        ("val..." and "dev..." count as test); a file, which is then the test split; or a hub name.
    subset: the configuration of a hub dataset.
    words: in a passage; a passage never crosses an empty line.
    examples: at most this many passages of each split, the first ones.
    """

    name = "text"
    reward_floor = 0.0
    full_marks = 1.0

    def __init__(
        self,
        *,
        path: str = "Salesforce/wikitext",
        subset: str | None = None,
        words: int = 64,
        examples: int | None = None,
    ) -> None:
        if words < 2:
            raise UserError(f"text: words is {words}, expected 2 or more")
        if examples is not None and examples < 1:
            raise UserError(f"text: examples is {examples}, expected 1 or more")
        self.path = path
        self.subset = subset
        self.words = words
        self.count = examples
        self._texts: dict[Split, str] = {}
        self._passages: dict[Split, list[Example]] = {}

    def whole(self, split: Split) -> str:
        """All text of a split, as perplexity is measured on it."""
        if split not in self._texts:
            self._texts[split] = self._read(split)
        return self._texts[split]

    def examples(self, split: Split) -> Sequence[Example]:
        """Data holds `prompt` and `rest`."""
        if split not in self._passages:
            self._passages[split] = self._cut(split)
        return self._passages[split][: self.count]

    def prompt(self, example: Example) -> Prompt:
        """The first half of the passage, to be continued."""
        return str(example.data["prompt"])

    def score(self, example: Example, completion: str) -> Score:
        """The share of the second half's words that the completion begins with."""
        wanted, given = str(example.data["rest"]).split(), completion.split()
        same = 0
        while same < min(len(wanted), len(given)) and wanted[same] == given[same]:
            same += 1
        return Score(same / len(wanted), None, {"words": float(same)})

    def gold(self, example: Example) -> str | None:
        """The second half."""
        return f" {example.data['rest']}"

    def _cut(self, split: Split) -> list[Example]:
        found: list[Example] = []
        for paragraph in re.split(r"\n\s*\n", self.whole(split)):
            words = paragraph.split()
            for start in range(0, len(words) - self.words + 1, self.words):
                passage, half = words[start : start + self.words], self.words // 2
                data = {"prompt": " ".join(passage[:half]), "rest": " ".join(passage[half:])}
                found.append(Example(f"{split}-{len(found)}", data))
        return found

    def _read(self, split: Split) -> str:
        local = Path(self.path).expanduser()
        if local.is_file() and local.name.lower().endswith(_PLAIN):
            return _plain(local) if split == "test" else ""
        if local.is_dir():
            prefixes = ("train",) if split == "train" else ("test", "val", "dev")
            for prefix in prefixes:
                files = sorted(
                    file
                    for file in local.iterdir()
                    if file.name.lower().startswith(prefix) and file.name.lower().endswith(_PLAIN)
                )
                if files:
                    return "\n\n".join(_plain(file) for file in files)
        if not local.exists() and not HUB_NAME.fullmatch(self.path):
            raise UserError(f"text: no such file or folder: {self.path}")
        rows = rows_of_split(self.path, split, self.subset)
        if not rows and split == "test":
            kinds = ", ".join((*_PLAIN, *SUFFIXES))
            raise UserError(f"text: {self.path} holds no test file: expected test... as {kinds}")
        return "".join(_ended(text_field(row, "text")) for row in rows)


def _ended(text: str) -> str:
    """A row that is a line (WikiText's on the hub) stays one; documents are set apart."""
    if not text:
        return "\n"
    return text if text.endswith("\n") else f"{text}\n\n"


def _plain(file: Path) -> str:
    try:
        data = file.read_bytes()
        return (gzip.decompress(data) if file.name.lower().endswith(".gz") else data).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text at byte {error.start}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error
