"""The benchmark of initialisations: a trial on a tiny model, its record, its table."""

from __future__ import annotations

import json
from dataclasses import replace
from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from loralab.adapters.state import AdapterState, Factors
from loralab.bench import init_memory, inits
from loralab.bench.init_lab import KINDS, Budget, Kind, Lab
from loralab.bench.init_measures import effective_rank
from loralab.bench.init_table import table, write
from loralab.bench.init_trial import run_trial
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
    made = inits.record(lab, kind, row)
    assert json.loads(json.dumps(made)) == made
    assert set(made) == {"run_info", "train_info", "meta_info", "loralab"}
    known = replace(KINDS[0], label=kind.label)
    assert known.label == row["label"]


def trial(label: str, seed: int, **values: Any) -> dict[str, Any]:
    row = {
        "label": label, "seed": seed, "kl_0": 0.5, "agreement_0": 0.75, "wiki_perplexity_0": 30.0,
        "own_text_nats": 0.7, "own_text_nats_of_base": 0.6,
        "garbled": False, "relative_size": 0.1, "init_cpu_seconds": 2.0,
        "losses": [2.0 - 0.1 * i for i in range(12)], "held_out_loss": 1.0 + seed,
        "gsm8k_form": 0.5, "gsm8k": 0.0, "effective_rank": 3.0, "forgetting": 0.01,
        "train_cpu_seconds": 20.0,
    }  # fmt: skip
    return {"loralab": row | values}


def test_the_table_holds_means_and_deviations_over_seeds(tmp_path: Path) -> None:
    rows = [trial("zero_b", 0), trial("zero_b", 1), trial("mica", 0)]
    rows[0]["loralab"]["conciseness"] = {"start": -10.0, "final": -2.0, "train_last": -3.0}
    page = tmp_path / "page.md"
    page.write_text("# How\n\nAdvice.\n\n## Measured\n\n- Command: an old one\n\nold numbers\n")
    write(table(rows, {"zero_b": 1.25}, Budget(), "`the command`"), page)
    text = page.read_text()
    assert text.startswith("# How\n\nAdvice.\n\n## Measured\n\n- Command: `the command`\n")
    assert "old" not in text
    assert "(0.60 to its own)" in text
    assert "| zero_b | 0.5 | 75% | 30 | 0.7 | 0% | 0.1 | 2 | 1.25 |" in text
    assert "| mica | 0.5 | 75% | 30 | 0.7 | 0% | 0.1 | 2 | - |" in text
    assert "1.5000 ± 0.7071" in text
    assert "-10.0 ± 0.0 | -2.0 ± 0.0 | -3.0 ± 0.0 | - | - | - |" in text
    assert text.count("| mica |") == 2, "no row among the evolved"
    raw = json.loads((tmp_path / "bench-inits.json").read_text())
    assert raw["trials"] == rows
    assert raw["peak_gb"] == {"zero_b": 1.25}


def test_a_stopped_benchmark_goes_on_with_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lab: Lab
) -> None:
    made: list[tuple[str, int]] = []

    def fake(_: Lab, kind: Kind, seed: int) -> dict[str, Any]:
        made.append((kind.label, seed))
        extra = {"init": kind.init, "seconds": 1.0, "grad_norms": [1.0] * 12}
        return trial(kind.label, seed, **extra)["loralab"]  # type: ignore[no-any-return]

    monkeypatch.setattr(inits, "run_trial", fake)
    monkeypatch.setattr(inits, "Lab", lambda *_: lab)
    words = ["--wikitext", str(lab.wikitext), "--work", str(tmp_path), "--inits", "tiny;eva"]
    words += ["--page", str(tmp_path / "page.md"), "--gsm8k", lab.gsm8k]
    assert inits.main([*words, "--seeds", "0"]) == 0
    assert inits.main([*words, "--seeds", "0,1"]) == 0
    assert made == [("tiny", 0), ("eva", 0), ("tiny", 1), ("eva", 1)]
    assert str(tmp_path) not in (tmp_path / "page.md").read_text(), "no path of a machine"
    with pytest.raises(UserError, match="no row 'evaa'"):
        inits.main([*words[:4], "--inits", "evaa"])

    # The memory of a row is measured once, and the trials and their command stay on the page.
    before = (tmp_path / "page.md").read_text()
    asked: list[str] = []

    def peak(_: Lab, kind: Kind) -> float:
        asked.append(kind.label)
        return 1.5

    monkeypatch.setattr(inits, "peak_in_child", peak)
    for _ in range(2):
        assert inits.main([*words[2:], "--memory"]) == 0
    assert asked == ["tiny", "eva"]
    after = (tmp_path / "page.md").read_text()
    assert after.count("| 1.5 |") == 2
    assert after.replace("| 1.5 |", "| - |").split("## At")[1] == before.split("## At")[1]
    assert after.split("- Machine")[0] == before.split("- Machine")[0]
    # Without its working directory it goes on from what the page's raw data holds.
    (tmp_path / "trials.jsonl").unlink()
    assert inits.main([*words[2:], "--table-only"]) == 0
    assert (tmp_path / "page.md").read_text() == after
    with pytest.raises(UserError, match="--wikitext is missing"):
        inits.main(words[2:])


@pytest.mark.slow
def test_the_memory_of_a_start_is_that_of_its_own_process(lab: Lab, tmp_path: Path) -> None:
    tiny.adapter(tiny.model("llama"), seed=1, rank=8).save(tmp_path / "trained")
    [kind] = [kind for kind in KINDS if kind.label == "warm_start"]
    held = torch.ones(300_000_000)
    peak = init_memory.peak_in_child(replace(lab, trained=tmp_path / "trained"), kind)
    assert 0.1 < peak < peak_rss_gb() - 1, "not that of the process that asks"
    del held
    with pytest.raises(UserError, match=r"the memory of warm_start failed: .*nowhere"):
        init_memory.peak_in_child(replace(lab, trained=tmp_path / "nowhere"), kind)


def test_the_effective_rank_is_that_of_the_product() -> None:
    q = torch.linalg.qr(torch.randn(20, 4)).Q
    even = AdapterState({"m": Factors(q.T.clone(), q.clone())}, 1.0)
    assert effective_rank(even) == pytest.approx(4, rel=1e-4)
    sizes = torch.tensor([1.0, 0.5, 0.0, 0.0])
    share = sizes / sizes.sum()
    expected = exp(-float((share[:2] * share[:2].log()).sum()))
    uneven = AdapterState({"m": Factors(q.T.clone(), q * sizes)}, 1.0)
    assert effective_rank(uneven) == pytest.approx(expected, rel=1e-3)
