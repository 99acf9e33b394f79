"""The command line: what each command gives, and one line with exit code 2 for what is wrong."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from loralab import cli
from loralab.adapters.state import AdapterState, Factors
from loralab.run import Run

SETTINGS = [
    "dtype=float32",
    "device=cpu",
    "evolution.generations=3",
    "evolution.population=4",
    "evolution.eval_every=2",
    "generation.max_new_tokens=6",
    "generation.stop=[a]",  # or each text of six two-letter words is as long as the others
    "engine.backend=torch",
    "threads=1",
]


def loralab(*arguments: str) -> int:
    """The exit code, whether the command returns it or argparse exits with it."""
    try:
        return cli.main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    tiny.model("llama").save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def finished(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "finished"
    assert loralab("run", "demo", f"model={model}", "--run-dir", str(path), *SETTINGS) == 0
    return path


@pytest.fixture
def adapter(model: str, tmp_path: Path) -> str:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    factors = {"model.layers.0.self_attn.q_proj": Factors(draw(4, 64), draw(64, 4))}
    AdapterState(factors, 1.0, base=model).save(tmp_path / "adapter")
    return str(tmp_path / "adapter")


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, loralab.cli\n"
        "try: loralab.cli.main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'transformers', 'pydantic', 'rich', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    seconds = []
    for _ in range(3):
        before = os.times()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        after = os.times()
        # Of the processor: the clock would tell what else this machine is doing.
        seconds.append(after.children_user + after.children_system)
        seconds[-1] -= before.children_user + before.children_system
        assert done.returncode == 0, done.stderr
        assert "demo" in done.stdout
    assert min(seconds) < 0.3, seconds


@pytest.mark.parametrize("command", ["tasks", "run countdown-small --dry-run", "run nowhere"])
def test_light_commands_do_not_import_torch(command: str) -> None:
    code = f"import sys, loralab.cli; loralab.cli.main({command.split()!r}); "
    code += "sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_run_leaves_a_whole_run_directory(finished: Path) -> None:
    run = Run.open(finished)
    assert len(run.metrics()) >= 3
    assert (finished / "report.html").stat().st_size > 1000
    state = AdapterState.load(run.adapter)
    assert state.rank == 8
    assert run.config["evolution"]["generations"] == 3


def test_run_says_where_it_got_to(model: str, tmp_path: Path, capfd: Any) -> None:
    path = tmp_path / "run"
    assert loralab("run", "demo", "--run-dir", str(path), f"model={model}", *SETTINGS) == 0
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("generation ")] == [
        "1/3",
        "2/3",
        "3/3",
    ]
    assert any(line.startswith("training reward ") and " → " in line for line in lines)
    assert any("held-out" in line and "correct" in line for line in lines)
    assert str(path / "report.html") in err
    assert "\x1b" not in err


def test_resume_needs_no_config_and_refuses_another(finished: Path, capsys: Any) -> None:
    before = (finished / "journal.jsonl").read_bytes()
    assert loralab("run", "--resume", "--run-dir", str(finished)) == 0
    assert (finished / "journal.jsonl").read_bytes() == before
    capsys.readouterr()
    code = loralab("run", "demo", "seed=3", "--resume", "--run-dir", str(finished))
    assert code == 2
    assert "seed was 0, is 3" in capsys.readouterr().err


def test_replay_rebuilds_the_last_adapter_and_the_first(finished: Path, tmp_path: Path) -> None:
    start, last = tmp_path / "start", tmp_path / "last"
    assert loralab("replay", str(finished), "--out", str(last)) == 0
    assert loralab("replay", str(finished), "--generation", "0", "--out", str(start)) == 0
    assert all(not f.B.any() for f in AdapterState.load(start).factors.values())
    assert any(f.B.any() for f in AdapterState.load(last).factors.values())


def test_report_writes_the_page_anew(finished: Path, capsys: Any) -> None:
    (finished / "report.html").unlink()
    assert loralab("report", str(finished)) == 0
    assert capsys.readouterr().out.strip() == str(finished / "report.html")
    assert (finished / "report.html").exists()


def test_generate_with_and_without_an_adapter(model: str, adapter: str, capsys: Any) -> None:
    common = [model, "--dtype", "float32", "--prompt", "ab cd", "--max-new-tokens", "8", "--plain"]
    assert loralab("generate", *common) == 0
    base = capsys.readouterr().out
    assert loralab("generate", *common, "--adapter", adapter) == 0
    adapted = capsys.readouterr().out
    made, tokenizer = tiny.model("llama"), tiny.tokenizer()
    ids = tokenizer("ab cd", return_tensors="pt").input_ids
    out = made.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert base == tokenizer.decode(out, skip_special_tokens=True) + "\n"
    assert adapted != base


@pytest.mark.parametrize(
    ("module", "features"), [("model.layers.7.mlp.up_proj", 64), ("model.layers.0.mlp.up_proj", 32)]
)
def test_an_adapter_of_another_model_is_named(
    module: str, features: int, model: str, tmp_path: Path, capsys: Any
) -> None:
    factors = {module: Factors(torch.randn(4, features), torch.randn(88, 4))}
    AdapterState(factors, 1.0).save(tmp_path)
    assert loralab("generate", model, "--prompt", "x", "--adapter", str(tmp_path)) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert f"is not for model '{model}'" in err
    assert module in err


def test_a_damaged_adapter_is_named(model: str, adapter: str, capsys: Any) -> None:
    (Path(adapter) / "adapter_model.safetensors").write_bytes(b"\xff" * 100)
    assert loralab("generate", model, "--prompt", "x", "--adapter", adapter) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_eval_prints_a_table_or_json(
    model: str, adapter: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    common = [model, "--dtype", "float32", "--task", "conciseness", "--max-new-tokens", "4"]
    assert loralab("eval", *common, "--limit", "3") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[:4] for row in rows[1:]] == [
        ["conciseness", "-", name, "3"] for name in ("reward", "correct")
    ]
    assert loralab("eval", *common, "--split", "train", "--json", "--adapter", adapter) == 0
    result = json.loads(capsys.readouterr().out)
    rewards = [row["reward"] for row in result["completions"]]
    assert result["reward"] == pytest.approx(statistics.fmean(rewards))
    assert (result["examples"], result["adapter"], result["split"]) == (2, adapter, "train")


def test_weights_prints_layers_and_noise(model: str, capsys: Any) -> None:
    assert loralab("weights", model, "--dtype", "float32", "--fraction", "0.5") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "layers." in line]
    assert [row[-1] for row in rows] == ["model.layers.0", "model.layers.1"]
    first = tiny.model("llama").model.layers[0]
    entries = torch.cat([w.flatten() for w in first.parameters() if w.dim() == 2]).abs()
    assert float(rows[0][0]) == pytest.approx(entries.mean().item(), rel=1e-3)
    assert float(rows[0][3]) == pytest.approx(entries.max().item(), rel=1e-3)
    assert float(rows[0][4]) == pytest.approx(0.5 * entries.mean().item(), rel=1e-3)
    assert loralab("weights", model, "--json") == 0
    assert "model.layers.1.mlp.up_proj" in json.loads(capsys.readouterr().out)["noise"]


def test_tasks_are_listed_and_proved(capsys: Any) -> None:
    assert loralab("tasks") == 0
    assert "countdown" in capsys.readouterr().out
    assert loralab("tasks", "check", "countdown", "--limit", "5", "--option", "seed=3") == 0
    assert "train: sound; 5 gold answers of 5" in capsys.readouterr().out


def test_initialisations_are_listed_with_their_facts(capsys: Any) -> None:
    assert cli.main(["inits"]) == 0
    text = capsys.readouterr().out
    assert "pissa\n    s·BA = the r largest" in text
    assert "refused before training" in text
    assert cli.main(["inits", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["pissa"]["changes_base"] is True
    assert facts["zero_b"]["unchanged"] == "exactly"


def test_a_broken_task_exits_with_1(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from loralab.tasks.conciseness import Conciseness

    monkeypatch.setattr(Conciseness, "gold", lambda self, example: "far too long an answer")
    assert loralab("tasks", "check", "conciseness") == 1
    assert "BROKEN" in capsys.readouterr().out


def test_a_dry_run_prints_a_config_that_loads(tmp_path: Path, capsys: Any) -> None:
    assert loralab("run", "countdown", "--dry-run", "evolution.population=10") == 0
    out, err = capsys.readouterr()
    path = tmp_path / "printed.yaml"
    path.write_text(out)
    assert "1,280,000 completions" in err
    assert loralab("run", str(path), "--dry-run") == 0
    assert capsys.readouterr().out == out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("", "loralab --help"),
        ("frob", "'frob'"),
        ("run", "run needs a CONFIG"),
        ("run nowhere", "nowhere"),
        ("run demo evolution.poplation=4", "did you mean evolution.population?"),
        ("run demo --frob", "--frob"),
        ("run demo task.name=nope --dry-run", "unknown task 'nope'"),
        ("run demo task.options.x=1 --dry-run", "'x'"),
        ("run --resume", "--run-dir"),
        ("run --resume --run-dir {tmp}/none", "no run at"),
        ("run --resume seed=3 --run-dir {run}", "keeps the config"),
        ("run demo --run-dir {run}", "--resume"),
        ("run demo model={tmp} --run-dir {tmp}/new", "no config.json"),
        ("run demo model=./none --run-dir {tmp}/new", "no such file or directory"),
        ("run demo --run-dir {tmp}/file/below", "cannot write"),
        ("demo frob", "key=value"),
        ("replay {run} --generation 99 --out {tmp}/out", "the journal holds 0 to 3"),
        ("replay {run} --out {run}", "not empty"),
        ("replay {run}", "--out"),
        ("report {tmp}/none", "no run at"),
        ("generate {tmp}/none --prompt x", "no such file or directory"),
        ("generate {model} --prompt x --adapter {tmp}", "adapter_config.json"),
        ("generate {model} --prompt x --max-new-tokens -1", "-1"),
        ("eval {model} --task nope", "unknown task 'nope'"),
        ("eval {model} --task conciseness --limit x", "'x' is not a whole number"),
        ("eval {model} --task conciseness --option x", "expected key=value"),
        ("weights {tmp}/none", "no such file or directory"),
        ("tasks check nope", "unknown task 'nope'"),
        ("bench nope", "'nope'"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(
    command: str, expected: str, model: str, finished: Path, tmp_path: Path, capfd: Any
) -> None:
    (tmp_path / "file").write_text("")
    words = [word.format(tmp=tmp_path, run=finished, model=model) for word in command.split()]
    assert loralab(*words) == 2
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1, err
    assert err.startswith("loralab")
    assert expected in err
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "/somewhere")

    monkeypatch.setattr("loralab.registry.Registry.names", full)
    assert loralab("tasks") == 2
    assert capsys.readouterr().err == (
        "loralab: /somewhere: No space left on device; nothing that was written before is lost\n"
    )


def test_an_interruption_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("loralab.registry.Registry.names", interrupted)
    assert loralab("tasks") == 130
    assert capsys.readouterr().err == "loralab: interrupted\n"


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loralab.registry.Registry.names", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loralab("tasks")


def test_a_closed_pipe_is_quiet() -> None:
    command = f"{sys.executable} -m loralab.cli run demo --dry-run | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def interrupted_at(prefix: str, *arguments: str) -> str:
    """Run a command, interrupt it at the first line with this prefix; all that it wrote."""
    command = [sys.executable, "-m", "loralab.cli", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith(prefix):
                process.send_signal(signal.SIGINT)
                break
        lines.append(process.stderr.read())
        assert process.wait(timeout=60) == cli.STOPPED
    return "".join(lines)


def test_a_signal_stops_after_the_generation_and_resume_goes_on(model: str, tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    endless = [s for s in SETTINGS if "generations" not in s] + ["evolution.generations=100000"]
    text = interrupted_at(
        "generation 2/", "run", "demo", f"model={model}", *endless, "--run-dir", path
    )
    assert "Traceback" not in text
    assert f"loralab run --resume --run-dir {path}" in text
    assert (tmp_path / "run" / "report.html").exists()
    done = len((tmp_path / "run" / "journal.jsonl").read_text().splitlines()) - 1
    text = interrupted_at(f"generation {done + 1}/", "run", "--resume", "--run-dir", path)
    assert f"resumed at generation {done}" in text
