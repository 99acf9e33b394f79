"""What is evaluated: a model by name, an adapter on it, or what a run left in its directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab.adapters.files import read_config
from loralab.adapters.state import AdapterState
from loralab.adapters.targets import linear_weights
from loralab.errors import UserError
from loralab.run import Run

DTYPE = "bfloat16"

_OTHER_MODELS = {
    "classify": "a classifier, which answers with no text; its run has its accuracy and F1",
    "seq2seq": "an encoder-decoder; its run has its own evaluation",
    "verifier": "a verifier, which judges answers and gives none; its run has verify@N",
    "pipeline": "several runs; give the directory of one of its stages",
}


@dataclass(frozen=True)
class Subject:
    """model: as for `loralab.load`. adapter: a directory in PEFT's format.

    quantization: of the base, "nf4" or "int8".
    """

    model: str
    adapter: str | None = None
    dtype: str = DTYPE
    device: str = "auto"
    quantization: str | None = None

    def open(self) -> Opened:
        """Load it.

        Raises:
            UserError: there is no such model or adapter, or the adapter belongs to another model.
        """
        from loralab.models.load import load

        kind, state = _adapter(self.adapter)
        model, tokenizer = load(self.model, self.dtype, self.device, self.quantization)  # type: ignore[arg-type]
        if self.adapter is None:
            return Opened(model, tokenizer, None, False)
        complaint = f"adapter {self.adapter!r} is not for model {self.model!r}"
        if state is not None:
            _check_fit(state, model, complaint)
            if self.quantization is None:
                return Opened(model, tokenizer, state, False)
            # The engines' own LoRA layers read a dense weight; PEFT has some for these.
            from peft import PeftModel

            PeftModel.from_pretrained(model, self.adapter).eval()
            return Opened(model, tokenizer, None, True)
        from loralab.adapters.interop.nonlinear import open_nonlinear

        try:
            # It stays in the model's own modules, so the model is what runs from here on.
            open_nonlinear(Path(self.adapter), kind, model)
        except UserError as error:
            raise UserError(f"{complaint}: {error}") from error
        return Opened(model, tokenizer, None, True)


@dataclass(frozen=True)
class Opened:
    """A subject in memory. state: a plain LoRA adapter beside the model. changed: an adapter is in
    the model's own modules, because it is of another kind or the model is quantised."""

    model: Any
    tokenizer: Any
    state: AdapterState | None
    changed: bool


def subject_of(
    model: str, adapter: str | None = None, dtype: str | None = None, device: str = "auto"
) -> Subject:
    """The subject behind a name: a model as for `loralab.load`, or a run's directory.

    A run gives the model it left, or its adapter on its config's model, in its config's dtype and
    quantization where `dtype` is None. The other names are given as they are.

    Raises:
        UserError: the run has left nothing yet, no language model, or an adapter of its own beside
            the one given.
    """
    path = Path(model).expanduser()
    if not (path / "config.yaml").is_file() or (path / "config.json").is_file():
        return Subject(model, adapter, dtype or DTYPE, device)
    config = Run.open(path).config
    kind = config.get("kind")
    if kind in _OTHER_MODELS:
        raise UserError(f"{path}: kind is {kind!r}: {_OTHER_MODELS[str(kind)]}")
    dtype = dtype or str(config.get("dtype", DTYPE))
    # A search in the model's own weights leaves them in merged/, and in adapter/ what is near; of
    # any other run adapter/ is exact, and merged/ (a later stage's input) is rounded.
    for folder in ("model", "merged") if kind == "evolve" else ("model",):
        if (path / folder / "config.json").is_file():
            return Subject(str(path / folder), adapter, dtype, device)
    own = path / "adapter"
    if not (own / "adapter_config.json").is_file():
        raise UserError(f"{path}: this run has left neither a model nor an adapter (yet)")
    if adapter is not None:
        raise UserError(f"{path}: this run has an adapter of its own; leave --adapter out")
    quantization = config.get("quantization")
    return Subject(str(config.get("model")), str(own), dtype, device, quantization)


def _adapter(path: str | None) -> tuple[Mapping[str, Any], AdapterState | None]:
    """Its config, and its factors where it is plain LoRA."""
    if path is None:
        return {}, None
    directory = Path(path)
    if (directory / "adapter_config.json").is_file():
        from loralab.adapters.peft_types import AdapterType

        config = read_config(directory)
        if any(config.get("peft_type") == kind.value for kind in AdapterType):
            return config, None
    return {}, AdapterState.load(directory)


def _check_fit(state: AdapterState, model: Any, complaint: str) -> None:
    try:
        weights = linear_weights(model, sorted(state.factors))
    except UserError as error:
        raise UserError(f"{complaint}: {error}") from error
    for module, (a, b) in state.factors.items():
        layer = model.get_submodule(module)
        # A quantised weight is stored in another shape than it has.
        wide = hasattr(layer, "in_features") and hasattr(layer, "out_features")
        needed = (layer.out_features, layer.in_features) if wide else tuple(weights[module].shape)
        given = (b.shape[0], a.shape[1])
        if given != needed:
            raise UserError(f"{complaint}: {module} is {needed}, the adapter's {given}")
