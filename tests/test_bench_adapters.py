"""The adapters benchmark on a tiny random Llama: all rows run, and the two ways of one agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from loralab import cli
from loralab.bench import adapters
from loralab.bench.adapters import FAST_LORA, FLOOR, ROWS, Entrant, Options
from loralab.bench.timing import Lap, Timed, ratio, seconds
from loralab.errors import UserError


@pytest.fixture(autouse=True)
def _unbound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the test process on all its cores."""
    monkeypatch.setattr(adapters, "pin", lambda core: core)


@pytest.fixture(scope="module")
def base() -> Any:
    return tiny.model("llama").requires_grad_(False)


SMALL = Options(tokens=24, laps=2, rank=4, peaks=())


def test_all_rows_run_and_the_two_ways_of_one_adapter_agree(base: Any) -> None:
    before = {name: p.clone() for name, p in base.named_parameters()}
    table = adapters.run(SMALL, base)
    rows = table.data["rows"]
    assert list(rows) == list(ROWS)
    for kind in ("lora", "lslora"):
        ours, peft = rows[f"fast-{kind}"]["loss"], rows[f"peft-{kind}"]["loss"]
        assert ours == pytest.approx(peft, rel=1e-5)
        assert abs(ours - rows[FLOOR]["loss"]) > 1e-4
    assert all(len(row["laps"]) == 2 for row in rows.values())
    assert rows[FAST_LORA]["ratios"][FAST_LORA] == 1
    page = table.markdown()
    assert all(row.label in page for row in ROWS.values())
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())


def test_the_floor_goes_back_to_the_embeddings_and_trains_nothing(base: Any) -> None:
    entrant = Entrant(FLOOR, base, SMALL)
    assert entrant.optimizer is None
    seen: list[torch.Size] = []
    first = entrant.model.model.layers[0].self_attn.q_proj
    first.register_full_backward_hook(lambda module, into, out: seen.append(into[0].shape))
    entrant.step()
    assert seen == [torch.Size([1, 24, 64])]
    assert not any(p.requires_grad for p in entrant.model.parameters())


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.config])
def test_a_step_changes_every_trained_parameter_and_no_other(base: Any, name: str) -> None:
    entrant = Entrant(name, base, SMALL)
    assert entrant.optimizer is not None
    before = {n: p.detach().clone() for n, p in entrant.model.named_parameters()}
    entrant.step()
    for parameter, p in entrant.model.named_parameters():
        assert torch.equal(p, before[parameter]) != p.requires_grad, parameter
        assert p.requires_grad == ("lora_" in parameter)


def test_rows_share_the_weights_of_the_base(base: Any) -> None:
    entrant = Entrant("fast-lslora", base, SMALL)
    shared = {p.data_ptr() for p in base.parameters()}
    own = [p for p in entrant.model.parameters() if p.data_ptr() not in shared]
    assert {id(p) for p in own} == {id(p) for p in entrant.model.parameters() if p.requires_grad}
    assert not any("lora" in name for name, _ in base.named_modules())


def test_ratio_pairs_rounds_and_takes_processor_time() -> None:
    def timed(*cpu: float) -> Timed:
        return Timed(tuple(Lap(0.0, 9.0 * seconds, seconds, 8) for seconds in cpu))

    assert ratio(timed(2, 40, 6), timed(1, 10, 4)) == 2
    assert seconds(timed(1, 5, 2)) == 18


@pytest.mark.parametrize(("tokens", "shape"), [(24, (1, 24)), (256, (1, 256)), (600, (3, 200))])
def test_batch(tokens: int, shape: tuple[int, int]) -> None:
    ids = adapters.batch(50, tokens)
    assert ids.shape == shape
    assert ids.max() < 50


def test_command_line_writes_json_and_prints_the_page(
    base: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(adapters, "load", lambda *_: (base, None))
    monkeypatch.chdir(tmp_path)
    arguments = ["bench", "adapters", "--quick", "--json", "raw.json", "--rows", FLOOR, FAST_LORA]
    assert cli.main(arguments) == 0
    raw = json.loads(Path("raw.json").read_text())
    assert list(raw["rows"]) == [FLOOR, FAST_LORA]
    assert raw["command"].startswith("`loralab bench adapters --quick")
    assert "| LoRA, loralab |" in capsys.readouterr().out
    assert not Path("docs").exists()


def test_memory_of_a_row_is_that_of_its_own_process(base: Any) -> None:
    assert 0.05 < adapters.peak_of(FAST_LORA, SMALL, base) < 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(rows=("dora",)), "row 'dora'"),
        (Options(tokens=1), "tokens is 1"),
        (Options(laps=0), "--laps is 0"),
    ],
)
def test_bad_options(options: Options, message: str) -> None:
    with pytest.raises(UserError, match=message):
        adapters.run(options)
