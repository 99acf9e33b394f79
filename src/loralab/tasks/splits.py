"""The rows of a benchmark's split: from a folder, from files, or from the hub."""

from __future__ import annotations

import os
import random
import re
import socket
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from loralab.data.sources import Row, data_files, read_rows
from loralab.errors import UserError
from loralab.tasks.base import Example, Split

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def rows_of_split(
    path: str,
    split: Split,
    subset: str | None = None,
    limit: int | None = None,
    hub_test: str = "test",
) -> list[Row]:
    """Rows of a split; [] where a local path has no file of it.

    path: a folder with files named after their split (train.jsonl.gz, test.json, "val..." counts
        as test); a file, which is the train split if it is named train..., else the test split; or
        a hub name such as "openai/gsm8k", which is downloaded.
    subset: the configuration of a hub dataset. limit: of its rows, None for all. hub_test: its
        split that is ours to test on, where "test" is not ("validation").

    Raises:
        UserError: nothing at the path that can be read, or the hub cannot be reached.
    """
    local = Path(path).expanduser()
    if not local.exists() and HUB_NAME.fullmatch(path):
        return _from_hub(path, hub_test if split == "test" else split, subset, limit)
    if local.is_file():
        own = "train" if local.name.lower().startswith("train") else "test"
        return read_rows(local) if split == own else []
    if not local.is_dir():
        raise UserError(
            f"{path}: expected a file, a folder that holds train and test files, or a hub name"
        )
    wanted = ("train",) if split == "train" else ("test", "val", "dev")
    for prefix in wanted:
        files = [file for file in data_files(local) if file.name.lower().startswith(prefix)]
        if files:
            return [row for file in files for row in read_rows(file)]
    return []


def _from_hub(name: str, split: str, subset: str | None, limit: int | None) -> list[Row]:
    mend = "give a folder that holds it as the task's option path"
    if not _reachable():
        raise UserError(
            f"dataset {name!r}: the hub cannot be reached from here; {mend}, or set "
            "HF_HUB_OFFLINE=1 if it was downloaded before"
        )
    from datasets import load_dataset

    try:
        table = load_dataset(name, subset, split=split)
    except Exception as error:  # its errors are of many unrelated classes
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"dataset {name!r} cannot be had from the hub: {reason}; {mend}") from error
    first = enumerate(islice(table, limit), 1)
    return [Row(dict(record), f"{name} {split} row {i}") for i, record in first]


def _reachable() -> bool:
    """Whether asking makes sense: the hub's library retries for half a minute before it says no."""
    if os.environ.get("HF_HUB_OFFLINE") or getproxies():
        return True
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


def draw_shots(
    task: str, train: Sequence[Example], shots: int, seed: int, path: str | None
) -> list[Example]:
    """Examples for prompts to show: the same for all, and one to spare for the example that is a
    shot itself.

    Raises:
        UserError: the train split has fewer.
    """
    if not shots:
        return []
    if len(train) < shots:
        raise UserError(
            f"{task}: shots is {shots}, but {path or 'it'} has {len(train)} training examples to "
            "show; give a folder with a train file, or fewer shots"
        )
    return random.Random(seed).sample(list(train), min(shots + 1, len(train)))


def text_field(row: Row, field: str) -> str:
    """A column that has to hold text. Raises UserError with the row's place."""
    value = row.data.get(field)
    if not isinstance(value, str):
        raise UserError(f"{row.place}: `{field}` is {value!r}, expected text")
    return value


def cut(rows: Sequence[Row], share: float, seed: int) -> dict[Split, list[Row]]:
    """One set of rows as two, the test side a seeded choice; both keep their order."""

    places = list(range(len(rows)))
    random.Random(seed).shuffle(places)
    held = set(places[: max(1, round(share * len(rows)))])
    if len(held) >= len(rows):
        raise UserError(f"{len(rows)} rows cannot be split with test_share {share}")
    return {
        "train": [row for i, row in enumerate(rows) if i not in held],
        "test": [row for i, row in enumerate(rows) if i in held],
    }
