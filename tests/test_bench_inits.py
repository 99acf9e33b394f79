"""The benchmark of initialisations: a trial on a tiny model, its record, its table."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from loralab.adapters.state import AdapterState, Factors
from loralab.bench import init_memory, init_trial, inits
from loralab.bench.init_lab import KINDS, Budget, Kind, Lab
from loralab.bench.init_measures import effective_rank
from loralab.bench.init_table import table
from loralab.bench.init_trial import run_trial
from loralab.bench.table import BEGIN, END
from loralab.bench.timing import peak_rss_gb
from loralab.errors import UserError

SMALL = Budget(
    rank=4, alpha=4.0, calibration_texts=4, calibration_tokens=16, sft_steps=3, sft_batch=2,
    held_out=2, scored=2, answer_tokens=4, wiki_windows=2, wiki_tokens=12, es_generations=1,
    es_population=2, warm_steps=1, countdown_generations=1, countdown_population=2,
    countdown_prompts=1, countdown_held_out=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp("lab")
    tiny.model("llama").save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    (folder / "gsm8k").mkdir()
    for split in ("train", "test"):
        rows = [
            {"question": f"aa bb c{c} dd", "answer": f"ee f{c} gg\n#### {n}"}
            for n, c in enumerate("abcdefgh")
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "gsm8k" / f"{split}.jsonl").write_text(text)
    (folder / "wiki.txt").write_text(" ".join(f"a{c} b{c} c{c}" for c in "abcdefgh") * 3)
    return Lab(str(folder / "model"), str(folder / "gsm8k"), folder / "wiki.txt", SMALL)


@pytest.mark.parametrize(
    "kind",
    [
        Kind("pissa", "pissa"),
        Kind("warm", "warm_start", {"path": lambda lab: str(lab.reference)}),
        Kind("progressive", "progressive", {"steps": 2}, evolves=False),
        Kind("loftq", "loftq", evolves=False),
    ],
    ids=lambda kind: kind.label,
)
def test_a_trial_measures_everything_and_goes_into_the_table(kind: Kind, lab: Lab) -> None:
    row = run_trial(lab, kind, seed=0)
    assert len(row["losses"]) == SMALL.sft_steps
    assert row["kl_0"] >= -1e-6
    assert 0 <= row["agreement_0"] <= 1
    assert row["wiki_perplexity_0"] > 1
    if kind.init in ("pissa", "progressive"):
        assert row["agreement_0"] > 0.9
    if kind.evolves:
        assert set(row["conciseness"]) == set(row["countdown"])
    else:
        assert "conciseness" not in row
    made = inits.record(lab, kind, row, "the command")
    assert json.loads(json.dumps(made)) == made
    assert set(made) == {"run_info", "train_info", "meta_info", "loralab"}
    assert made["loralab"]["setting"] == lab.setting
    assert made["loralab"]["label"] == kind.label


def test_evolution_here_is_measured_without_a_guard(lab: Lab) -> None:
    assert init_trial._conciseness(lab, 0).guard is None
    assert init_trial._countdown(lab, 0).guard is None


def trial(label: str, seed: int, **values: Any) -> dict[str, Any]:
    row = {
        "label": label, "seed": seed, "kl_0": 0.5, "agreement_0": 0.75, "wiki_perplexity_0": 30.0,
        "own_text_nats": 0.7, "own_text_nats_of_base": 0.6,
        "garbled": False, "relative_size": 0.1, "init_cpu_seconds": 2.0,
        "losses": [2.0 - 0.1 * i for i in range(12)], "held_out_loss": 1.0 + seed,
        "gsm8k_form": 0.5, "gsm8k": 0.0, "effective_rank": 3.0, "forgetting": 0.01,
        "train_cpu_seconds": 20.0, "init": label, "seconds": 1.0, "grad_norms": [1.0] * 12,
    }  # fmt: skip
    setting = {"model": "m", "gsm8k": "1f", "wikitext": "2e", "budget": {"rank": 4, "lr": 0.5}}
    return {
        "loralab": row | {"setting": setting, "command": "the command"} | values,
        "run_info": {"created_at": f"2026-11-2{seed}T10:00:00+00:00"},
        "meta_info": {
            "package_info": {"torch": "2.0"},
            "system_info": {"machine": "old" if seed else "new"},
        },
    }


def test_the_table_holds_means_and_deviations_over_seeds(tmp_path: Path) -> None:
    rows = [trial("zero_b", 0), trial("zero_b", 1), trial("mica", 0)]
    rows[0]["loralab"]["conciseness"] = {"start": -10.0, "final": -2.0, "train_last": -3.0}
    page = tmp_path / "page.md"
    table(rows, {"zero_b": 1.25}).write(page)
    text = page.read_text()
    for fact in (
        "Command: `the command`", "Machine: new; old", "Dates: 2026-11-20; 2026-11-21",
        "Seeds: 0, 1", "Trials: zero_b 2, mica 1", "Budget: rank 4, lr 0.5", "Versions: torch 2.0",
    ):  # fmt: skip
        assert f"- {fact}\n" in text
    assert "(0.60 to its own)" in text
    assert "| zero_b | 0.5 | 75% | 30 | 0.7 | 0% | 0.1 | 2 | 1.25 |" in text
    assert "| mica | 0.5 | 75% | 30 | 0.7 | 0% | 0.1 | 2 | - |" in text
    assert "1.5000 ± 0.7071" in text
    assert "-10.0 ± 0.0 | -2.0 ± 0.0 | -3.0 ± 0.0 | - | - | - |" in text
    assert text.count("| mica |") == 2, "no row among the evolved"
    raw = json.loads((tmp_path / "page.json").read_text())
    assert raw["trials"] == rows
    assert raw["peak_gb"] == {"zero_b": 1.25}


Made = list[tuple[str, int]]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    """Trials and memories (seed -1) that were measured, none of them in earnest."""
    found: Made = []

    def run_trial(_: Lab, kind: Kind, seed: int) -> dict[str, Any]:
        found.append((kind.label, seed))
        row: dict[str, Any] = trial(kind.label, seed)["loralab"]
        return {key: row[key] for key in row if key not in ("setting", "command")}

    def peak_alone(lab: Lab, kind: Kind) -> float:
        assert lab.budget.sft_steps == 1
        found.append((kind.label, -1))
        return 1.5

    monkeypatch.setattr(inits, "run_trial", run_trial)
    monkeypatch.setattr(inits, "peak_alone", peak_alone)
    return found


def test_a_stopped_benchmark_goes_on_with_what_is_missing(
    tmp_path: Path, made: Made, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# How\n\nAdvice.\n\n{BEGIN}\nold\n{END}\n\nMore advice.\n")
    words = ["--wikitext", str(lab.wikitext), "--work", str(tmp_path), "--inits", "tiny;eva"]
    words += ["--page", str(page), "--gsm8k", lab.gsm8k, "--model", lab.model_name]
    assert inits.main([*words, "--seeds", "0"]) == 0
    log = tmp_path / "trials.jsonl"
    log.write_text(log.read_text() + '{"torn')
    assert inits.main([*words, "--seeds", "0,1"]) == 0
    assert made == [("tiny", 0), ("eva", 0), ("tiny", 1), ("eva", 1)]
    before = page.read_text()
    assert before.startswith(f"# How\n\nAdvice.\n\n{BEGIN}\n\n- Command: `loralab bench inits")
    assert before.endswith(f"{END}\n\nMore advice.\n")
    assert str(tmp_path) not in before, "no path of a machine"
    with pytest.raises(UserError, match="no row 'evaa'"):
        inits.main([*words[:4], "--inits", "evaa"])

    # The memory of a row is measured once, and the trials and their command stay on the page.
    made.clear()
    for _ in range(2):
        assert inits.main([*words[2:], "--memory"]) == 0
    assert made == [("tiny", -1), ("eva", -1)]
    after = page.read_text()
    assert after.count("| 1.5 |") == 2
    assert after.replace("| 1.5 |", "| - |").split("## At")[1] == before.split("## At")[1]
    assert after.split("## At")[0] == before.split("## At")[0]
    # Without its working directory, and elsewhere, it tells what the page's raw data holds.
    log.unlink()
    monkeypatch.setattr(inits, "machine", lambda: "another machine")
    monkeypatch.setattr(inits, "versions", lambda *_: {"torch": "99"})
    assert inits.main([*words[2:], "--table-only"]) == 0
    assert page.read_text() == after
    with pytest.raises(UserError, match="--wikitext is missing"):
        inits.main(words[2:])
    with pytest.raises(UserError, match="nowhere is no file"):
        inits.main([*words[2:], "--wikitext", "nowhere"])


def test_trials_of_another_setting_do_not_pass_for_those_asked_for(
    tmp_path: Path, made: Made, lab: Lab
) -> None:
    shutil.copytree(lab.model_name, tmp_path / "other")
    other_text = tmp_path / "other.txt"
    other_text.write_text(lab.wikitext.read_text() + " aa")
    page, second = tmp_path / "page.md", tmp_path / "second.md"

    def main(model: str, wikitext: Path, page: Path, *words: str) -> int:
        given = ["--model", model, "--wikitext", str(wikitext), "--gsm8k", lab.gsm8k]
        given += ["--work", str(tmp_path / "work"), "--page", str(page), "--inits", "tiny"]
        return inits.main([*given, *words])

    assert main(lab.model_name, lab.wikitext, page, "--seeds", "0") == 0
    before = page.read_text()
    for model, text, other in (
        (str(tmp_path / "other"), lab.wikitext, "model"),
        (lab.model_name, other_text, "wikitext"),
    ):
        with pytest.raises(UserError, match=f"page.md holds trials of another {other}; choose"):
            main(model, text, page, "--seeds", "0")
        for words in (["--seeds", "0"], ["--memory"], ["--memory"]):
            assert main(model, text, second, *words) == 0
        shown = json.loads(second.with_suffix(".json").read_text())["trials"]
        assert [trial["loralab"]["setting"]["model"] for trial in shown] == [model]
        second.with_suffix(".json").unlink()
    assert made.count(("tiny", 0)) == 3
    assert made.count(("tiny", -1)) == 2, "the text has no part in the memory"
    assert page.read_text() == before


def test_a_part_that_is_measured_anew_joins_what_was_published(
    tmp_path: Path, made: Made, lab: Lab
) -> None:
    given = ["--model", lab.model_name, "--wikitext", str(lab.wikitext), "--gsm8k", lab.gsm8k]
    given += ["--page", str(tmp_path / "page.md")]
    first = [*given, "--work", str(tmp_path / "first"), "--inits", "tiny;eva", "--seeds", "0,1"]
    assert inits.main(first) == 0
    fresh = [*given, "--work", str(tmp_path / "fresh"), "--inits", "tiny", "--seeds", "1"]
    made.clear()
    assert inits.main(fresh) == 0
    assert made == [("tiny", 1)]
    text = (tmp_path / "page.md").read_text()
    assert "- Trials: tiny 2, eva 2\n" in text
    assert [f"--seeds {seeds}`" in text for seeds in ("0,1", "1")] == [True, True]


@pytest.mark.slow
def test_the_memory_of_a_start_is_that_of_its_own_process(lab: Lab, tmp_path: Path) -> None:
    tiny.adapter(tiny.model("llama"), seed=1, rank=8).save(tmp_path / "trained")
    [kind] = [kind for kind in KINDS if kind.label == "warm_start"]
    held = torch.ones(300_000_000)
    peak = init_memory.peak_alone(replace(lab, trained=tmp_path / "trained"), kind)
    assert 0.1 < peak < peak_rss_gb() - 1, "not that of the process that asks"
    del held
    with pytest.raises(UserError, match=r"the memory of warm_start failed: .*nowhere"):
        init_memory.peak_alone(replace(lab, trained=tmp_path / "nowhere"), kind)


def test_the_effective_rank_is_that_of_the_product() -> None:
    q = torch.linalg.qr(torch.randn(20, 4)).Q
    even = AdapterState({"m": Factors(q.T.clone(), q.clone())}, 1.0)
    assert effective_rank(even) == pytest.approx(4, rel=1e-4)
    sizes = torch.tensor([1.0, 0.5, 0.0, 0.0])
    share = sizes / sizes.sum()
    expected = exp(-float((share[:2] * share[:2].log()).sum()))
    uneven = AdapterState({"m": Factors(q.T.clone(), q * sizes)}, 1.0)
    assert effective_rank(uneven) == pytest.approx(expected, rel=1e-3)
