"""`loralab export`: what each target computes, what it says, what it never touches."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import tiny
from export_cases import PROMPT, adapted, far, load, logits, save
from loralab import cli
from loralab.adapters.delta import low_rank_delta, tuned_delta
from loralab.adapters.interop.merged import merge
from loralab.adapters.state import AdapterState
from loralab.errors import UserError
from loralab.export import export


def tied() -> Any:
    config = copy.deepcopy(tiny.model("llama").config)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    made = tf.AutoModelForCausalLM.from_config(config)
    for parameter in made.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return made.eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.model("llama")


@pytest.fixture(scope="module")
def base(model: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(model, tmp_path_factory.mktemp("base"))


@pytest.fixture
def plain(model: Any, tmp_path: Path) -> Path:
    tiny.adapter(model, seed=1).save(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3"])
def test_merged_is_the_unmerged_model(kind: str, tmp_path: Path) -> None:
    made = tiny.model(kind)
    name = save(made, tmp_path / "base")
    tiny.adapter(made, seed=2, size=0.05).save(tmp_path / "adapter")
    result = export(tmp_path / "adapter", "merged", tmp_path / "merged", name)
    merged = logits(load(tmp_path / "merged"))
    expected = adapted(made, tmp_path / "adapter")
    assert far(merged, expected) < 1e-5 * max(1.0, float(expected.abs().max()))
    assert far(merged, logits(made)) > 0.1
    assert result.fidelity["no_op"] < 1e-3
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert (
        tokenizer(tiny.words(4, 0))["input_ids"] == tiny.tokenizer()(tiny.words(4, 0))["input_ids"]
    )


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 300.0},
        {"rope_type": "linear", "factor": 3.0, "rope_theta": 300.0},
    ],
)
def test_mlx_lm_reads_a_merged_model_as_transformers_does(
    model: Any, rope: dict[str, Any], tmp_path: Path
) -> None:
    """Transformers 5 writes the rotary settings where mlx-lm does not look."""
    mx = pytest.importorskip("mlx.core")
    from mlx_lm.utils import load_model

    config = copy.deepcopy(model.config)
    config.rope_parameters = rope
    made = tf.AutoModelForCausalLM.from_config(config).eval()
    made.load_state_dict(model.state_dict())
    name = save(made, tmp_path / "base")
    tiny.adapter(made, seed=10).save(tmp_path / "adapter")
    export(tmp_path / "adapter", "merged", tmp_path / "merged", name)
    theirs, _ = load_model(tmp_path / "merged")
    found = torch.tensor(theirs(mx.array([PROMPT]))[0].tolist())
    expected = adapted(made, tmp_path / "adapter")
    assert far(found, expected) < 1e-3
    assert far(logits(load(tmp_path / "merged")), expected) < 1e-3
    assert far(expected, adapted(model, tmp_path / "adapter")) > 0.1  # it matters here


def test_merging_into_a_tied_head_leaves_the_embedding(tmp_path: Path) -> None:
    made = tied()
    name = save(made, tmp_path / "base")
    body = [n for n in tiny.linear_names(made) if n.endswith("down_proj")]
    tiny.adapter(made, seed=3, names=body).save(tmp_path / "body")
    export(tmp_path / "body", "merged", tmp_path / "one", name)
    assert "lm_head.weight" not in load_file(tmp_path / "one" / "model.safetensors")
    assert far(logits(load(tmp_path / "one")), adapted(made, tmp_path / "body")) < 1e-4

    tiny.adapter(made, seed=4, names=["lm_head"]).save(tmp_path / "head")
    result = export(tmp_path / "head", "merged", tmp_path / "two", name)
    merged = load(tmp_path / "two")
    assert torch.equal(merged.get_input_embeddings().weight, made.get_input_embeddings().weight)
    expected = logits(made) + 1.5 * low_rank_head(made, tmp_path / "head")
    assert far(logits(merged), expected) < 1e-4
    assert any("no longer shares" in line for line in result.lines)


def test_a_tied_head_has_no_name_elsewhere(tmp_path: Path) -> None:
    made = tied()
    name = save(made, tmp_path / "base")
    tiny.adapter(made, seed=4, names=["lm_head"]).save(tmp_path / "head")
    for to in ("mlx", "gguf"):
        with pytest.raises(UserError, match="shares it with the embedding"):
            export(tmp_path / "head", to, tmp_path / "made.gguf", name)


@torch.no_grad()
def low_rank_head(model: Any, adapter: Path) -> torch.Tensor:
    """B A x of the head's adapter: PEFT itself warns about and mishandles tied heads."""
    [(a, b)] = AdapterState.load(adapter).factors.values()
    hidden = model.model(input_ids=torch.tensor([PROMPT])).last_hidden_state[0]
    return hidden @ a.t() @ b.t()


def test_bf16_rounding_is_counted(model: Any, tmp_path: Path) -> None:
    """A change of an eighth of an ulp is lost, one of three ulps is not."""
    small = copy.deepcopy(model)
    module = "model.layers.0.mlp.up_proj"
    weight = small.get_submodule(module).weight
    weight.data.fill_(1.0)
    delta = torch.zeros_like(weight)
    delta[:10] = 2.0**-7 / 8
    delta[10:40] = 3 * 2.0**-7
    report = merge(small, [(module, delta)], torch.bfloat16)
    assert report.no_op == pytest.approx(0.25)
    assert small.get_submodule(module).weight.dtype == torch.bfloat16
    lost = 10 * (1 / 8) ** 2
    assert report.error == pytest.approx((lost / (lost + 30 * 9)) ** 0.5, rel=1e-4)


def test_bf16_base_gives_a_bf16_merge(model: Any, plain: Path, tmp_path: Path) -> None:
    name = save(copy.deepcopy(model).to(torch.bfloat16), tmp_path / "base")
    result = export(plain, "merged", tmp_path / "merged", name)
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert 0 < result.fidelity["no_op"] < 0.05
    assert any("cast-to-no-op share" in line for line in result.lines)


def test_every_format_and_back(model: Any, base: str, plain: Path, tmp_path: Path) -> None:
    export(plain, "mlx", tmp_path / "mlx", base)
    export(tmp_path / "mlx", "gguf", tmp_path / "adapter.gguf", base)
    export(tmp_path / "adapter.gguf", "peft", tmp_path / "peft", base)
    one, two = (load_file(p / "adapter_model.safetensors") for p in (plain, tmp_path / "peft"))
    assert set(one) == set(two)
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert far(adapted(model, tmp_path / "peft"), adapted(model, plain)) == 0


def tuned(model: Any, adapter: AdapterState) -> Any:
    made = copy.deepcopy(model)
    for module, (a, b) in adapter.factors.items():
        made.get_submodule(module).weight.data += adapter.scaling * b @ a
    return made


def test_a_fine_tuned_model_becomes_the_adapter_that_made_it(
    model: Any, base: str, tmp_path: Path
) -> None:
    made = tuned(model, tiny.adapter(model, seed=7, rank=4))
    made.model.norm.weight.data *= 1.001
    save(made, tmp_path / "tuned")
    result = export(tmp_path / "tuned", "peft", tmp_path / "made", base, 4)
    assert all(e > 1 - 1e-6 for e in result.fidelity["energy"].values())
    assert list(result.fidelity["lost"]) == ["model.norm.weight"]
    assert result.fidelity["lost"]["model.norm.weight"] == pytest.approx(0.001, rel=1e-2)
    made.model.norm.weight.data /= 1.001
    assert far(adapted(model, tmp_path / "made"), logits(made)) < 1e-2
    assert any("lost: model.norm.weight" in line for line in result.lines)


def test_the_bases_rounding_is_not_training(model: Any, base: str, tmp_path: Path) -> None:
    """A model tuned and stored in bf16, of a float32 base."""
    change = tiny.adapter(model, seed=7, names=["model.layers.1.mlp.up_proj"])
    save(tuned(model, change).to(torch.bfloat16), tmp_path / "tuned")
    result = export(tmp_path / "tuned", "peft", tmp_path / "made", base, 4)
    assert list(result.fidelity["energy"]) == ["model.layers.1.mlp.up_proj"]
    assert result.fidelity["lost"] == {}
    assert result.fidelity["kl"] < 1e-4


def test_unchanged_modules_get_no_factors(model: Any) -> None:
    made = tuned(model, tiny.adapter(model, seed=8, names=["model.layers.1.mlp.up_proj"]))
    result = tuned_delta(made, model, 2)
    assert list(result.adapter.factors) == ["model.layers.1.mlp.up_proj"]
    with pytest.raises(UserError, match="nothing to extract"):
        tuned_delta(model, model, 2)


def test_low_rank_delta_is_the_svd() -> None:
    generator = torch.Generator().manual_seed(9)
    delta = torch.randn(40, 24, generator=generator)
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    made = low_rank_delta(delta, 5)
    assert torch.allclose(made.B @ made.A, u[:, :5] * s[:5] @ vt[:5], atol=1e-4)
    assert made.energy == pytest.approx(float(s[:5].square().sum() / s.square().sum()), rel=1e-5)
    assert torch.allclose(made.A.norm(dim=1), made.B.norm(dim=0), rtol=1e-4)
    assert low_rank_delta(delta, 24).energy == pytest.approx(1.0)
    assert low_rank_delta(torch.zeros(3, 4), 2).energy == 1.0
    with pytest.raises(ValueError, match="NaN"):
        low_rank_delta(delta * float("nan"), 2)


def test_nothing_is_overwritten(base: str, plain: Path, tmp_path: Path) -> None:
    for to in ("peft", "mlx", "gguf", "merged"):
        taken = tmp_path / f"taken-{to}"
        taken.mkdir()
        (taken / "thesis.txt").write_text("mine")
        with pytest.raises(UserError, match="exists already"):
            export(plain, to, taken, base)
        assert [p.name for p in taken.iterdir()] == ["thesis.txt"]
    file = tmp_path / "file.gguf"
    file.write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        export(plain, "gguf", file, base)
    assert file.read_text() == "mine"
    assert not list(tmp_path.glob(".partial-*"))


def test_a_failure_leaves_nothing(
    base: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        export(plain, "peft", tmp_path / "made")
    assert {p.name for p in tmp_path.iterdir()} == {"plain"}


@pytest.mark.parametrize("to", ["peft", "gguf"])
def test_what_appears_meanwhile_is_kept(
    base: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    output = tmp_path / "made.gguf"

    def appear(_: int) -> None:
        output.mkdir(exist_ok=True)
        (output / "thesis.txt").write_text("mine")

    monkeypatch.setattr("os.fsync", appear)
    with pytest.raises(UserError, match="appeared meanwhile"):
        export(plain, to, output, base)
    assert [p.name for p in output.iterdir()] == ["thesis.txt"]


def test_others_may_read_what_was_written(plain: Path, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        export(plain, "mlx", tmp_path / "mlx")
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "mlx").iterdir()} == {0o644}


def test_a_path_in_a_config_is_not_opened(plain: Path, tmp_path: Path) -> None:
    config = json.loads((plain / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "elsewhere")
    (plain / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="--base is missing"):
        export(plain, "merged", tmp_path / "made")
    with pytest.raises(UserError, match="--base is missing"):
        export(plain, "gguf", tmp_path / "made.gguf")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rank", "0"], "expected 1 or more"),
        (["--rank", "4"], "keeps its rank"),
        (["--base", "OTHER"], "wrong --base"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(
    plain: Path, tmp_path: Path, capsys: Any, arguments: list[str], said: str
) -> None:
    other = save(tiny.model("gpt2"), tmp_path / "other")
    words = [other if word == "OTHER" else word for word in arguments]
    capsys.readouterr()  # the bars of save_pretrained
    code = cli.main(["export", str(plain), "--to", "peft", "--output", str(tmp_path / "x"), *words])
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err
    assert not (tmp_path / "x").exists()


def test_the_command_reports(base: str, plain: Path, tmp_path: Path, capsys: Any) -> None:
    made = tmp_path / "made.gguf"
    words = ["export", str(plain), "--to", "gguf", "--output", str(made), "--base", base]
    assert cli.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "read: PEFT LoRA, 14 modules, rank 4, scaling 1.5, float32"
    assert lines[-1] == f"wrote {made}"
    assert any(line.startswith("lost:") for line in lines)
