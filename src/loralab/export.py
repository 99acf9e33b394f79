"""One adapter, or one fine-tuned model, in another program's format; and what that loses."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from loralab.adapters.delta import tuned_delta
from loralab.adapters.files import check_fit, read_config, short
from loralab.adapters.interop import (
    Reading,
    read_gguf,
    read_mlx,
    read_peft,
    write_gguf,
    write_mlx,
)
from loralab.adapters.interop.base import describe_base
from loralab.adapters.interop.merged import lora_deltas, merge, write_merged
from loralab.adapters.interop.output import refuse_existing, whole
from loralab.adapters.peft_types import AdapterType
from loralab.adapters.state import AdapterState
from loralab.adapters.truncate import truncate
from loralab.durable import write_whole
from loralab.errors import UserError
from loralab.models.load import load, locate

FORMATS = ("peft", "mlx", "gguf", "merged", "llama")
RANK = 16
"""Of an SVD, where none is asked for."""

PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "Write a function that returns the sum of two numbers.\n\ndef add(a, b):\n    return a + b",
    "If a train travels 60 miles in 1.5 hours, its average speed is 40 miles per hour.",
    "Dear Sir or Madam, I am writing to ask about the position you advertised last week.",
)
"""Held against the original: the KL is measured on these, every token of them."""

FITTED_ON = (
    "Once upon a time a fox lived at the edge of a dark forest with her three cubs.",
    "Question: What causes the tides?\nAnswer: The gravity of the moon and of the sun.",
    "for i in range(10):\n    print(i * i)\n",
    "She opened the letter slowly, read it twice, and put it back into the drawer.",
)
"""Text whose activations a spline's gain is fitted to; none of PROMPTS."""


@dataclass
class Export:
    """What was written, line by line in words, and in numbers where something was approximated."""

    output: Path
    lines: list[str]
    fidelity: dict[str, Any] = field(default_factory=dict)


def export(
    source: Path,
    to: str,
    output: Path,
    base: str | None = None,
    rank: int | None = None,
    approximate: bool = False,
    without_sinks: bool = False,
) -> Export:
    """Write `source` in the format `to`, and say what changed.

    source: a directory of PEFT or of mlx-lm, a GGUF LoRA file, or the directory of a fully
        fine-tuned model. For "llama": the directory of a small decoder, or of the run that
        trained it.
    to: "peft", "mlx", "gguf", "merged" or "llama" (a decoder with experts becomes a Mixtral).
    output: a path that does not exist (an empty directory will do); it appears whole.
    base: the model under the adapter, as for `loralab.load`; the name in the adapter's own config
        is not followed. Needed for merging, for GGUF and for whatever is approximated.
    rank: of an SVD (a full fine-tuning, an approximation); default 16.
    approximate: allow what is not the same function: a nonlinear adapter as plain LoRA.
    without_sinks: let go of a decoder's cache of fixed size, which no Llama has.

    Raises:
        UserError: the source is damaged or cannot be expressed in that format.
    """
    if to not in FORMATS:
        raise UserError(f"--to is {to!r}; expected {', '.join(FORMATS)}")
    if rank is not None and rank < 1:
        raise UserError(f"--rank is {rank}; expected 1 or more")
    refuse_existing(output)
    if to == "llama":
        return _export_decoder(source, output, base, rank, without_sinks)
    if without_sinks:
        raise UserError("--without-sinks: only a decoder has them; it goes with --to llama")
    if to == "gguf":
        refuse_existing(_beside(output))
        if output.suffix != ".gguf":
            raise UserError(f"--output {output}: expected a name that ends in .gguf")
    made = Export(output, [])
    kind = _kind(source)
    if kind == "nonlinear":
        _export_nonlinear(made, source, to, _needed(base, "a nonlinear adapter"), rank, approximate)
        return made
    if kind == "model":
        state = _from_tuned(made, source, _needed(base, "a fine-tuned model"), rank or RANK)
    else:
        if rank is not None:
            raise UserError(f"--rank: {source} is plain LoRA already, and keeps its rank")
        reading = _read(source, kind, base)
        state = reading.state
        made.lines += [_facts(kind, state), *reading.notes]
    _write(made, state, to, base)
    return made


def _export_decoder(
    source: Path, output: Path, base: str | None, rank: int | None, without_sinks: bool
) -> Export:
    from loralab.models import decoder_export

    for option, value in (("--base", base), ("--rank", rank)):
        if value is not None:
            raise UserError(f"{option}: --to llama takes a whole model; leave it out")
    if output.is_dir():
        output.rmdir()  # `publish` wants no directory at all, not even an empty one
    own = source / "model"
    run = (source / "config.yaml").is_file() and (own / "config.json").is_file()
    decoder_export.export(own if run else source, output, without_sinks)
    config = AutoConfig.from_pretrained(output)
    lost = "its cache of fixed size, with the sinks" if without_sinks else "nothing"
    kind = config.architectures[0]
    return Export(output, [f"wrote {output}: a {kind} of Transformers", f"lost: {lost}"])


def _kind(source: Path) -> str:
    if source.is_file():
        if source.suffix != ".gguf":
            raise UserError(f"{source}: expected a directory or a .gguf file")
        return "gguf"
    if not source.is_dir():
        raise UserError(f"{source}: no such file or directory")
    if not (source / "adapter_config.json").is_file():
        if (source / "config.json").is_file():
            return "model"
        raise UserError(f"{source}: holds neither adapter_config.json nor config.json")
    config = read_config(source)
    if any(config.get("peft_type") == kind.value for kind in AdapterType):
        return "nonlinear"
    mlx = "peft_type" not in config and ("lora_parameters" in config or "fine_tune_type" in config)
    return "mlx" if mlx else "peft"


def _read(source: Path, kind: str, base: str | None) -> Reading:
    if kind == "gguf":
        return read_gguf(source, describe_base(_needed(base, "a GGUF adapter")))
    reading = read_mlx(source) if kind == "mlx" else read_peft(source)
    if base is not None:
        check_fit(reading.state.factors, describe_base(base).shapes)
    return reading


def _from_tuned(made: Export, source: Path, base: str, rank: int) -> AdapterState:
    """The nearest LoRA of a full fine-tuning."""
    tuned, _, dtype = _load_stored(str(source))
    model, tokenizer = load(locate(base, dtype), "float32")
    # Compared as the fine-tuned one is stored, or the base's rounding would count as training.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()  # not the rotary buffers
    result = tuned_delta(tuned, model, rank)
    made.lines.append(
        f"read: a fine-tuned model; {len(result.energy)} of its linear modules differ from the base"
    )
    made.lines += _energy_lines(result.energy, rank)
    for name, change in result.lost.items():
        made.lines.append(f"lost: {name}, which training changed by {change:.2%}")
    sequences = _tokens(tokenizer, PROMPTS)
    before = _log_probabilities(tuned, sequences)
    _measure(made, before, model, lora_deltas(result.adapter), sequences)
    made.fidelity |= {"rank": rank, "energy": dict(result.energy), "lost": dict(result.lost)}
    return AdapterState(result.adapter.factors, result.adapter.scaling, base=base)


def _export_nonlinear(
    made: Export, source: Path, to: str, base: str, rank: int | None, approximate: bool
) -> None:
    # Here, because it imports PEFT, which plain LoRA does not need.
    from loralab.adapters.interop.nonlinear import (
        acts_on_activations,
        nonlinear_deltas,
        open_nonlinear,
    )

    config = read_config(source)
    kind = config["peft_type"]
    model, tokenizer, dtype = _load_stored(base)
    wrapped = open_nonlinear(source, config, model)
    curved = acts_on_activations(wrapped)
    made.lines.append(
        f"read: {kind}, {'on activations' if curved else 'on weights'}, "
        f"{sum(1 for key in wrapped.state_dict() if key.endswith('lora_A.default.weight'))} modules"
    )
    if to == "merged" and not curved:
        deltas = {name: delta.clone() for name, delta in nonlinear_deltas(wrapped)}
        _write_merged(made, wrapped.unload(), dtype, base, deltas.items())
        return
    if not approximate:
        able = "only --to merged is exact" if not curved else "no other format is exact"
        raise UserError(
            f"{source}: {kind} is not linear in B A, so {to} cannot express it ({able}); "
            "add --approximate for the nearest plain LoRA"
        )
    if curved:
        if rank is not None:
            raise UserError("--rank: an LSLORA on activations keeps its rank; leave it out")
        state = _linearised(made, wrapped, tokenizer)
    else:
        deltas = {name: delta.clone() for name, delta in nonlinear_deltas(wrapped)}
        cut = truncate(deltas, rank or RANK, 1.0)
        energy = {name: max(0.0, 1 - error**2) for name, error in cut.modules.items()}
        made.lines += _energy_lines(energy, rank or RANK)
        made.fidelity |= {"rank": rank or RANK, "energy": energy}
        state = cut.adapter
    sequences = _tokens(tokenizer, PROMPTS)
    before = _log_probabilities(wrapped, sequences)
    _measure(made, before, wrapped.unload(), lora_deltas(state), sequences)
    _write(made, AdapterState(state.factors, state.scaling, base=base), to, base)


def _linearised(made: Export, wrapped: Any, tokenizer: Any) -> AdapterState:
    from loralab.adapters.interop.nonlinear import linearise

    result = linearise(wrapped, _tokens(tokenizer, FITTED_ON))
    made.lines.append(
        "approximated: each module's spline f(z) by a gain, least squares of f(z) on z over the "
        f"activations of {len(FITTED_ON)} fixed texts; the curve and f(0) are lost"
    )
    made.lines += [
        f"  {name}: gain {gain:.4g}, relative error {result.error[name]:.2%}"
        for name, gain in result.gains.items()
    ]
    made.fidelity |= {"gain": dict(result.gains), "error": dict(result.error)}
    return result.adapter


def _energy_lines(energy: Mapping[str, float], rank: int) -> list[str]:
    lines = [
        f"approximated: SVD at rank {rank} keeps {fmean(energy.values()):.1%} of the change's "
        f"energy on average over modules, {min(energy.values()):.1%} at worst"
    ]
    return lines + [f"  {name}: {kept:.2%}" for name, kept in energy.items()]


def _measure(
    made: Export,
    before: Sequence[Tensor],
    model: Any,
    deltas: Iterable[tuple[str, Tensor]],
    sequences: Sequence[Sequence[int]],
) -> None:
    """KL(original || approximation) per token in nats, the model changed for good."""
    merge(model, deltas, torch.float32)
    after = _log_probabilities(model, sequences)
    per_token = [(p.exp() * (p - q)).sum(-1) for p, q in zip(before, after, strict=True)]
    kl = max(0.0, float(torch.cat(per_token).mean()))  # rounding can leave -1e-9
    made.fidelity["kl"] = kl
    made.lines.append(
        f"approximated: KL from the original {kl:.3g} nats a token, {len(sequences)} fixed prompts"
    )


@torch.no_grad()
def _log_probabilities(model: Any, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """(tokens, vocabulary) float32 of each sequence."""
    return [
        model(input_ids=torch.tensor([list(ids)])).logits[0].float().log_softmax(-1)
        for ids in sequences
    ]


def _tokens(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return [tokenizer(text)["input_ids"] for text in texts]


def _write(made: Export, state: AdapterState, to: str, base: str | None) -> None:
    if to == "merged":
        model, _, dtype = _load_stored(_needed(base, "a merged model"))
        _write_merged(made, model, dtype, str(base), lora_deltas(state))
        return
    shape = None if base is None else describe_base(base)
    if to == "gguf" and shape is None:
        raise UserError("--base is missing: GGUF's tensor names and row order come from the base")
    if shape is not None and to in ("mlx", "gguf") and shape.tied_head in state.factors:
        raise UserError(
            f"{shape.tied_head}: the base shares it with the embedding, and {to} has no module of "
            "that name to adapt; only --to merged can hold it"
        )
    with whole(made.output) as path:
        if to == "peft":
            state.save(path)
        elif to == "mlx":
            write_mlx(state, path, None if shape is None else shape.layers)
        elif shape is not None:
            write_gguf(state, path, shape)
        if made.fidelity and path.is_dir():
            (path / "fidelity.json").write_text(json.dumps(made.fidelity, indent=2) + "\n")
    if made.fidelity and to == "gguf":
        write_whole(_beside(made.output), json.dumps(made.fidelity, indent=2) + "\n")
    noted = any(line.startswith(("changed", "approximated")) for line in made.lines)
    made.lines += _losses(state, to, noted)
    made.lines.append(f"wrote {made.output}")


def _losses(state: AdapterState, to: str, noted: bool) -> list[str]:
    """What this last step loses; what was approximated before has its own lines."""
    if to != "gguf":
        return ["lost: nothing else" if noted else "lost: nothing"]
    dtypes = {t.dtype for factors in state.factors.values() for t in factors}
    changed = [
        f"changed: {short(dtype)} is stored as float32, every value kept"
        for dtype in sorted(dtypes - {torch.float32}, key=str)
    ]
    return [*changed, "lost: the name of the base, the dropout of training"]


def _write_merged(
    made: Export,
    model: Any,
    dtype: torch.dtype,
    base: str,
    deltas: Iterable[tuple[str, Tensor]],
) -> None:
    result = merge(model, deltas, dtype)
    tokenizer = AutoTokenizer.from_pretrained(locate(base, torch.bfloat16))
    made.fidelity |= {"no_op": result.no_op, "rounding_error": result.error}
    with whole(made.output) as path:
        write_merged(model, tokenizer, path)
        (path / "fidelity.json").write_text(json.dumps(made.fidelity, indent=2) + "\n")
    made.lines.append(
        f"merged: {result.modules} modules into {short(dtype)}; cast-to-no-op share "
        f"{result.no_op:.2%} of the weights that the adapter changes keep the base's value, "
        f"rounding moved the change by {result.error:.2%}"
    )
    if result.untied:
        made.lines.append("changed: the output head no longer shares the embedding's weight")
    made.lines.append("lost: the adapter itself; it cannot be taken out again")
    made.lines.append(f"wrote {made.output}")


def _load_stored(name: str) -> tuple[Any, Any, torch.dtype]:
    """The model in float32, holding values of the dtype it is stored in; that dtype."""
    source = locate(name, torch.bfloat16)
    model, tokenizer = load(source, "float32")
    config = AutoConfig.from_pretrained(source)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"model {name!r}: is quantised; give the one it was made from")
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return model, tokenizer, dtype


def _facts(kind: str, state: AdapterState) -> str:
    named = {"peft": "PEFT LoRA", "mlx": "mlx-lm LoRA", "gguf": "GGUF LoRA"}[kind]
    dtypes = sorted({short(t.dtype) for factors in state.factors.values() for t in factors})
    return (
        f"read: {named}, {len(state.factors)} modules, rank {state.rank}, scaling "
        f"{state.scaling:g}, {' and '.join(dtypes)}"
    )


def _needed(base: str | None, why: str) -> str:
    if base is None:
        raise UserError(
            f"--base is missing: {why} needs its base model (a name in a file is not followed)"
        )
    return base


def _beside(output: Path) -> Path:
    return output.with_name(output.name + ".fidelity.json")
