"""The doctor's verdicts, on adapters that stock PEFT made and on files that are not right."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import loralab
import small_language as language
import tiny
from loralab.adapters import LSLoraConfig, SineLoraConfig
from loralab.adapters.interop import write_mlx
from loralab.adapters.state import AdapterState
from loralab.cli import main
from loralab.errors import UserError
from loralab.health.doctor import Report
from loralab.health.findings import Finding
from loralab.health.preflight import dose, memory
from loralab.health.reading import Reading
from loralab.run import Run

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return language.make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def sound(base: Path, tmp_path: Path) -> Path:
    """A plain adapter, trained a little."""
    return saved(language.adapted(base), tmp_path / "adapter")


def saved(model: Any, directory: Path) -> Path:
    model.save_pretrained(directory)
    return directory


def examined(adapter: Path, base: Path | None = None, **options: Any) -> Report:
    report = loralab.doctor(
        adapter,
        None if base is None else str(base),
        prompts=language.prompts(),
        dtype="float32",
        max_new_tokens=24,
        **options,
    )
    assert isinstance(report, Report)
    return report


def rewrite_config(directory: Path, **fields: Any) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def rewrite_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


SOUND: dict[str, Callable[[Path], Any]] = {
    "lora": lambda base: language.adapted(base),
    "rslora of rank 8": lambda base: language.adapted(base, r=8, use_rslora=True),
    "dora": lambda base: language.adapted(base, use_dora=True),
    "pissa": lambda base: language.adapted(base, init_lora_weights="pissa"),
    "loha": lambda base: language.adapted(
        base, LoHaConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    ),
}


@pytest.mark.parametrize("kind", SOUND)
def test_sound_adapters_of_stock_peft(kind: str, base: Path, tmp_path: Path) -> None:
    report = examined(saved(SOUND[kind](base), tmp_path / "a"))
    assert report.sound, report
    assert not [one for one in report.findings if one.severity == "fail"]


def random_factors(model: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and ("q_proj" in name or "v_proj" in name):
                parameter.copy_(10 * 0.3 * torch.randn(parameter.shape, generator=generator))


def both_random(base: Path, directory: Path) -> Path:
    model = language.adapted(base, steps=0)
    random_factors(model)
    return saved(model, directory)


def never_started(base: Path, directory: Path) -> Path:
    """Both factors as `nn.Linear` makes them."""
    made = language.adapted(base, steps=0, init_lora_weights=False, lora_alpha=32)
    return saved(made, directory)


def wrong_scaling(base: Path, directory: Path) -> Path:
    saved(language.adapted(base, steps=40), directory)
    rewrite_config(directory, lora_alpha=800.0)
    return directory


def not_numbers(base: Path, directory: Path) -> Path:
    saved(language.adapted(base), directory)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[sorted(tensors)[3]][0, 0] = float("nan")

    rewrite_tensors(directory, spoil)
    return directory


def keys_dropped(base: Path, directory: Path) -> Path:
    saved(language.adapted(base), directory)

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "layers.1." in name]:
            del tensors[name]

    rewrite_tensors(directory, drop)
    return directory


BROKEN: dict[Callable[[Path, Path], Path], str | None] = {
    both_random: None,
    never_started: None,
    wrong_scaling: None,
    not_numbers: "numbers.nan",
    keys_dropped: "save.keys_dropped",
}


@pytest.mark.parametrize("fault", BROKEN, ids=lambda fault: fault.__name__)
def test_broken_adapters_of_stock_peft(
    fault: Callable[[Path, Path], Path], base: Path, tmp_path: Path
) -> None:
    report = examined(fault(base, tmp_path / "a"))
    assert report.verdict == "broken", report
    cause = BROKEN[fault]
    if cause is not None:
        assert report.causes[0] == cause
    assert str(report).splitlines()[0].endswith("BROKEN")
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["sound"] is False


def test_pissa_without_its_residual_is_noticed(base: Path, tmp_path: Path) -> None:
    directory = saved(language.adapted(base, init_lora_weights="pissa"), tmp_path / "a")
    with_it = examined(directory).readings[-1].values
    # PiSSA's factors, said to be plain LoRA's: PEFT takes nothing out of W then.
    rewrite_config(directory, init_lora_weights=True)
    report = examined(directory)
    without = report.readings[-1].values
    assert without["weights.base_share"] == pytest.approx(1.0, abs=0.05)
    assert without["kl"] > 100 * with_it["kl"]
    assert abs(with_it["weights.base_share"]) < 0.5
    assert report.verdict != "sound"


def test_a_base_that_it_was_not_made_for(sound: Path, tmp_path: Path) -> None:
    other = language.make_base(tmp_path / "other", hidden=32, steps=0)
    report = examined(sound, other)
    assert (report.verdict, report.causes[0]) == ("broken", "file.wrong_base")
    assert "is for (64, 88), the base has (32, 88)" in report.findings[0].message
    gpt2 = tmp_path / "gpt2"
    tiny.model("gpt2").save_pretrained(gpt2)
    tiny.tokenizer().save_pretrained(gpt2)
    report = examined(sound, gpt2)
    assert (report.verdict, report.causes[0]) == ("broken", "file.wrong_base")
    assert "none of its" in report.findings[0].message


def one_line(report: Report) -> str:
    assert report.verdict == "broken"
    [finding] = report.findings
    assert "\n" not in finding.message
    assert len(finding.message) < 500
    return finding.message


def test_damaged_files_get_one_line_each(sound: Path) -> None:
    whole = (sound / WEIGHTS).read_bytes()
    (sound / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    assert "not safetensors" in one_line(examined(sound))
    (sound / WEIGHTS).write_bytes(b"")
    assert "0 bytes" in one_line(examined(sound))
    (sound / WEIGHTS).unlink()
    assert "no such file" in one_line(examined(sound))
    (sound / WEIGHTS).write_bytes(whole)
    rewrite_config(sound, r=8)
    assert "the config says rank 8, its tensors have 4" in one_line(examined(sound))
    (sound / "adapter_config.json").write_text("{")
    assert "not JSON" in one_line(examined(sound))
    (sound / "adapter_config.json").unlink()
    assert "no adapter_config.json" in one_line(examined(sound))


def test_a_factor_without_its_other(sound: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[next(name for name in tensors if "lora_B" in name)]

    rewrite_tensors(sound, drop)
    report = examined(sound)
    assert (report.verdict, report.causes[0]) == ("broken", "save.keys_dropped")
    assert "lora_B" in report.findings[0].message


def test_tensors_that_load_nowhere_are_told(sound: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if "layers.1.self_attn.q_proj" in name:
                other = name.replace("q_proj", "elsewhere")
                tensors[other] = tensors[name].clone()

    rewrite_tensors(sound, add)
    report = examined(sound)
    assert report.verdict == "suspect"
    [finding] = [one for one in report.findings if one.rule == "parity.keys_unexpected"]
    assert "elsewhere" in finding.message


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_pickles_are_refused_unread(sound: Path, name: str) -> None:
    (sound / WEIGHTS).unlink()
    (sound / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    for target in (sound, sound / name):
        with pytest.raises(UserError, match="pickled weights can run code"):
            loralab.doctor(target)


@pytest.mark.parametrize(
    "fields",
    [
        {"megatron_config": {"a": 1}, "megatron_core": "this"},
        {"target_modules": "(a+)+b"},
        {"target_modules": ".*.*.*.*q_proj"},
        {"peft_type": "XLORA"},
    ],
)
def test_configs_that_ask_for_more_than_an_adapter_are_refused(
    sound: Path, fields: dict[str, Any]
) -> None:
    rewrite_config(sound, **fields)
    with pytest.raises(UserError):
        loralab.doctor(sound)


def test_a_pattern_of_module_names_as_tools_write_it_is_fine(base: Path, tmp_path: Path) -> None:
    pattern = r"(?:.*?(?:layers).*?(?:self_attn|mlp).*?(?:q_proj|down_proj))|(?:\bno[\d]{1,}\.x)"
    config = LoraConfig(r=4, target_modules=pattern, task_type="CAUSAL_LM")
    report = examined(saved(language.adapted(base, config), tmp_path / "a"))
    assert report.sound, report


@pytest.mark.parametrize("config", [LSLoraConfig, SineLoraConfig])
def test_nonlinear_adapters(config: Any, base: Path, tmp_path: Path) -> None:
    settings = config(r=4, lora_alpha=8.0, target_modules=["q_proj", "v_proj"])
    directory = saved(language.adapted(base, settings), tmp_path / "a")
    report = examined(directory)
    assert report.sound, report
    values = report.readings[-1].values
    assert ("spline.outside" in values) == (config is LSLoraConfig)

    def only_factors(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "spline" in name]:
            del tensors[name]

    if config is LSLoraConfig:
        rewrite_tensors(directory, only_factors)
        report = examined(directory)
        assert (report.verdict, report.causes[0]) == ("broken", "save.keys_dropped")


def test_an_adapter_of_mlx(base: Path, sound: Path, tmp_path: Path) -> None:
    state = AdapterState.load(sound)
    directory = tmp_path / "mlx"
    write_mlx(state, directory)
    report = examined(directory, base)
    assert report.kind == "MLX"
    assert report.sound, report
    peft = examined(sound)
    key = "weights.delta_ratio.max"
    assert report.readings[0].values[key] == pytest.approx(peft.readings[0].values[key], rel=1e-4)
    tensors = load_file(directory / "adapters.safetensors")
    tensors[sorted(tensors)[0]][0, 0] = float("inf")
    save_file(tensors, directory / "adapters.safetensors")
    assert examined(directory, base).causes[0] == "numbers.nan"


def test_a_model_in_memory_is_left_as_it_was(base: Path) -> None:
    model = language.adapted(base)
    model.train()
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wants, rng = [p.requires_grad for p in model.parameters()], torch.get_rng_state()
    options: dict[str, Any] = {"prompts": language.prompts(), "max_new_tokens": 12}
    first = loralab.doctor(model, tokenizer=_tokenizer(base), **options)
    again = loralab.doctor(model, tokenizer=_tokenizer(base), **options)
    assert first.sound, first
    assert dict(first.readings[0].values) == pytest.approx(
        dict(again.readings[0].values), rel=0, abs=0, nan_ok=True
    )
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == wants
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(kept[name], tensor) for name, tensor in model.state_dict().items())
    random_factors(model)
    assert not loralab.doctor(model, tokenizer=_tokenizer(base), **options).sound
    with pytest.raises(UserError, match="tokenizer"):
        loralab.doctor(model)


def _tokenizer(base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


def test_a_base_in_memory_stays_as_it_is(base: Path, sound: Path) -> None:
    model = language.open_base(base)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = loralab.doctor(
        sound, model, tokenizer=_tokenizer(base), prompts=language.prompts(), max_new_tokens=12
    )
    assert report.sound, report
    assert not hasattr(model, "peft_config")
    assert all(torch.equal(kept[name], tensor) for name, tensor in model.state_dict().items())


def test_an_adapter_that_changes_nothing_is_told(base: Path, tmp_path: Path) -> None:
    report = examined(saved(language.adapted(base, steps=0), tmp_path / "a"))
    assert "weights.idle" in [one.rule for one in report.findings]


def test_rows_it_learned_are_examined_too(base: Path, sound: Path, tmp_path: Path) -> None:
    good = language.write_rows(tmp_path / "good.jsonl", language.rows(language.starts_of()))
    values = examined(sound, data=good).readings[-1].values
    assert values["data.rows"] == len(language.starts_of())
    assert values["data.shuffled"] <= 0.1
    order = language.starts_of()
    turned = [
        {"prompt": a["prompt"], "completion": b["completion"]}
        for a, b in zip(language.rows(order), language.rows([*order[9:], *order[:9]]), strict=True)
    ]
    shuffled = language.write_rows(tmp_path / "shuffled.jsonl", turned)
    crossed = examined(sound, data=shuffled).readings[-1].values
    assert crossed["data.shuffled"] > 0.2
    assert crossed["data.pair_gain"] < values["data.pair_gain"] / 2
    other = language.write_rows(tmp_path / "other.jsonl", [{"left": "a", "right": "b"}] * 2)
    with pytest.raises(UserError, match="its columns are left, right"):
        examined(sound, data=other)


def run_of(base: Path, adapter: Path, directory: Path) -> Run:
    config = {"kind": "sft", "name": "x", "model": str(base), "dtype": "float32", "device": "cpu"}
    with Run.create(directory, config) as run:
        (directory / "adapter").mkdir()
        for file in adapter.iterdir():
            (directory / "adapter" / file.name).write_bytes(file.read_bytes())
        return run


def test_a_finished_run(base: Path, sound: Path, tmp_path: Path) -> None:
    run = run_of(base, sound, tmp_path / "run")
    assert examined(run.path).sound
    values = {"train.step": 5.0, "train.nonfinite": 0.0}
    lines = [
        Reading(5, values, (), 0.1).to_json(),
        Reading(10, {**values, "train.step": 10.0}, (), 0.1).to_json(),
    ]
    (run.path / "readings.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    numbers = {"text.newlines": 0.9, "limit.text.newlines": 0.5}
    early = Finding("text.newlines", "fail", 5, "broke", numbers, "data.newlines", (), "mend")
    old_form = {"what": "something", "advice": "another"}
    (run.path / "findings.jsonl").write_text(
        json.dumps(early.to_json()) + "\n" + json.dumps(old_form) + "\n"
    )
    report = examined(run.path)
    assert report.sound, report
    assert any("step 5: fail text.newlines" in note for note in report.notes)
    last = {**lines[1], "values": {"train.step": 10.0, "train.nonfinite": 2.0}}
    (run.path / "readings.jsonl").write_text(json.dumps(last) + "\n")
    report = examined(run.path)
    assert (report.verdict, report.causes[0]) == ("broken", "numbers.nan")


def config_of(base: Path, data: Path, directory: Path) -> Path:
    config = {
        "kind": "sft",
        "name": "small",
        "model": str(base),
        "dtype": "float32",
        "device": "cpu",
        "data": {"path": str(data)},
        "adapter": {"rank": 4},
        "training": {"steps": 20, "batch_size": 4, "max_length": 64},
    }
    directory.mkdir()
    file = directory / "small.yaml"
    file.write_text(json.dumps(config))
    return file


def before(config: Path, *overrides: str) -> Report:
    report = loralab.doctor(config, overrides=overrides, prompts=language.prompts())
    assert isinstance(report, Report)
    return report


def test_a_run_before_it_starts(base: Path, tmp_path: Path) -> None:
    data = language.write_rows(tmp_path / "rows.jsonl", language.rows(language.starts_of()))
    report = before(config_of(base, data, tmp_path / "a"))
    assert report.sound, report
    values = report.readings[-1].values
    assert values["train.step"] == 0.0
    assert values["kl"] == pytest.approx(0.0, abs=1e-6)
    assert values["data.eos_missing"] == 0.0
    assert any(note.startswith("memory, reckoned") for note in report.notes)
    pissa = before(config_of(base, data, tmp_path / "b"), "adapter.init.name=pissa")
    assert pissa.sound, pissa
    assert pissa.readings[-1].values["kl"] < 1e-3


def test_a_run_that_would_start_garbled(base: Path, tmp_path: Path) -> None:
    data = language.write_rows(tmp_path / "rows.jsonl", language.rows(language.starts_of()))
    config = config_of(base, data, tmp_path / "a")
    report = before(config, "adapter.init.name=random", "adapter.alpha=64")
    assert "init.garbled" in report.causes[:2]
    assert not report.sound


def test_rows_that_teach_nothing_are_told_before(base: Path, tmp_path: Path) -> None:
    data = language.write_rows(tmp_path / "rows.jsonl", language.rows(language.starts_of()))
    report = before(config_of(base, data, tmp_path / "a"), "training.max_length=2")
    assert report.readings[-1].values["data.all_masked"] == 1.0
    assert (report.verdict, report.causes[0]) == ("broken", "data.all_masked")


def test_memory_is_reckoned_from_sizes() -> None:
    model = tiny.model("llama")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    need = memory(adapted, rows=2, tokens=10, learned_share=0.5)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert need.weights == 4 * sum(p.numel() for p in adapted.parameters())
    assert need.training == trained * (4 + 8)
    assert need.activations == 2 * 10 * 64 * 2 * 34
    assert need.logits == 10 * tiny.VOCABULARY * 10
    assert memory(adapted, 2, 10, fast=False).logits == 2 * need.logits
    light = memory(adapted, 2, 10, optimizer="adamw_8bit", checkpointing=True)
    assert light.training == trained * (4 + 2)
    assert light.activations < need.activations
    told = replace(need, free=need.beside_weights // 2).values()
    assert told["setup.memory_share"] == pytest.approx(2.0, rel=0.01)
    assert dose("adamw_torch", 1e-4, 100, "linear") == {"train.dose": pytest.approx(5e-3)}
    assert dose("sgd", 1e-4, 100, "linear") == {}


def test_the_command(
    base: Path, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ["doctor", "--dtype", "float32", "--prompts", "2"]
    code = main([*ask, str(keys_dropped(base, tmp_path / "b")), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert (code, told["verdict"]) == (1, "broken")
    assert told["causes"][0]["mend"]
    assert told["readings"][0]["values"]["weights.modules"] == 14.0
    code = main([*ask, str(sound)])
    out = capsys.readouterr().out
    assert f"{sound}: " in out
    assert code in (0, 1)
    for target, word in (
        (str(tmp_path), "neither an adapter"),
        (str(tmp_path / "nothing"), "no such file"),
        (str(tmp_path / "no.yaml"), "no.yaml"),
    ):
        assert main([*ask, target]) == 2
        error = capsys.readouterr().err
        assert word in error
        assert error.count("\n") == 1
    rewrite_config(sound, base_model_name_or_path=None)
    assert main([*ask, str(sound)]) == 2
    assert "--base" in capsys.readouterr().err


def test_what_a_model_writes_cannot_steer_a_terminal() -> None:
    from loralab.health.findings import Example

    example = Example("a\nb", "\x1b[2J\x07gone", "\u202ereversed")
    finding = Finding("text.newlines", "fail", 0, "m", {}, "data.newlines", (), "do", (example,))
    shown = str(Report("x", "LORA", None, (finding,)))
    assert "a\\nb" in shown
    assert all(c.isprintable() or c == "\n" for c in shown)


@pytest.mark.slow
def test_ten_adapters_of_smollm2(tmp_path: Path) -> None:
    """Five sound and five broken ones by stock PEFT, on real weights: some ten minutes."""
    from loralab.health.prompts import shipped_prompts

    model, tokenizer = loralab.load("smollm2")
    texts = [
        f"{prompt.shown}\n{prompt.good}{tokenizer.eos_token}" for prompt in shipped_prompts()[12:28]
    ]

    def train(adapted: Any, steps: int = 6) -> Any:
        wanted = [p for p in adapted.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(wanted, lr=2e-4)
        adapted.train()
        for step in range(steps):
            batch = tokenizer(texts[step % len(texts)], return_tensors="pt")
            adapted(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return adapted.eval()

    def made(name: str, spoil: Callable[[Any], None] | None = None, **options: Any) -> Path:
        torch.manual_seed(0)
        settings = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], **options}
        fresh, _ = loralab.load("smollm2")
        adapted = get_peft_model(fresh, LoraConfig(task_type="CAUSAL_LM", **settings))
        if spoil is None:
            train(adapted)
        else:
            spoil(adapted)
        directory = tmp_path / name
        adapted.save_pretrained(directory)
        rewrite_config(directory, base_model_name_or_path="smollm2")
        return directory

    sound = [
        made("lora"),
        made("all", target_modules="all-linear"),
        made("rslora", use_rslora=True, r=16),
        made("dora", use_dora=True, r=4),
        made("pissa", init_lora_weights="pissa"),
    ]
    scaled, nan, dropped = made("scaled"), made("nan"), made("dropped")
    rewrite_config(scaled, lora_alpha=16 * 2000)
    rewrite_tensors(nan, lambda t: t[sorted(t)[0]].fill_(float("nan")) and None)

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in sorted(tensors)[:10]:
            del tensors[name]

    rewrite_tensors(dropped, drop)
    broken = [
        made("random", random_factors),
        made("unstarted", lambda _: None, init_lora_weights=False, lora_alpha=256),
        scaled,
        nan,
        dropped,
    ]
    for directory in (*sound, *broken):
        report = loralab.doctor(directory, prompts=shipped_prompts()[:12])
        assert report.sound == (directory in sound), str(report)
    assert model is not None
