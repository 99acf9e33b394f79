"""Step benchmarks on tiny models: every way trains, on the same rows, and is counted right."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode

import tiny
from loralab import cli
from loralab.bench import (
    curves,
    dpo,
    own_steps,
    plain_loops,
    pretrain,
    sft,
    step_page,
    trl_peers,
    workers,
)
from loralab.bench.floor import Gemm, least, lora_flops
from loralab.bench.gate import Gate, NoMoreLaps, Seen
from loralab.bench.nano_gpt import NanoGPT
from loralab.bench.timing import Lap, Timed
from loralab.bench.work import Work
from loralab.bench.workers import Race, StepLap, Way, Worker, chosen, race, same_rows
from loralab.errors import UserError
from loralab.gradient.collate import as_row, flatten, pad
from loralab.models.decoder import DecoderConfig, DecoderForCausalLM

ROWS, BATCH = 9, 3


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama")
    tiny.model("llama").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("decoder")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = DecoderConfig(
        vocab_size=tiny.VOCABULARY, num_hidden_layers=2, max_position_embeddings=32, **shape
    )
    DecoderForCausalLM(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def ids(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = torch.randint(4, tiny.VOCABULARY, (count,), generator=generator).tolist()
    return found


def instructions() -> list[dict[str, list[int]]]:
    """Rows of different lengths, of which the last three to seven tokens are learned."""
    rows = []
    for i in range(ROWS):
        tokens = ids(8 + 3 * i, i)
        prompt = len(tokens) - 3 - i % 5
        labels = [-100] * prompt + tokens[prompt:]
        rows.append({"input_ids": tokens, "labels": labels, "seq_lengths": [len(tokens)]})
    return rows


def pairs() -> list[dict[str, list[int]]]:
    return [
        {
            "prompt_ids": ids(4 + i, i),
            "chosen_ids": ids(3 + i % 4, 50 + i),
            "rejected_ids": ids(5 - i % 3, 90 + i),
        }
        for i in range(ROWS)
    ]


def stories(borders: bool) -> list[dict[str, list[int]]]:
    """Rows of one length; with borders, of two documents each."""
    lengths = [10, 14] if borders else [24]
    rows = [ids(24, i) for i in range(ROWS)]
    return [{"input_ids": r, "labels": r, "seq_lengths": lengths} for r in rows]


def work_on(folder: Path, model: str, records: Sequence[Any]) -> Work:
    rows = str(folder / "rows.json")
    work = Work(model, "float32", rows, steps=4, batch_size=BATCH, max_length=64, rank=4, lr=1e-2)
    work.write(records, "the test")
    return work


def drive(run: Callable[[Work, Gate], None], work: Work) -> list[dict[str, Any]]:
    """Laps of one and of two steps, the second after a step that nobody measures."""
    said: list[dict[str, Any]] = []
    orders = iter([{"warm": 0, "steps": 1}, {"warm": 1, "steps": 2}])
    with pytest.raises(NoMoreLaps):
        run(work, Gate(orders, said.append))
    assert said[0]["ready"]
    return said[1:]


def counted(work: Work, tokens: Callable[[Any], int]) -> list[int]:
    """Tokens of the two laps of `drive`."""
    batches = work.batches()
    steps = [sum(tokens(record) for record in next(batches)) for _ in range(4)]
    return [steps[0], steps[2] + steps[3]]


FINE_TUNING = {
    "trl": trl_peers.sft,
    "trl-labelled": trl_peers.sft_labelled,
    "peft": plain_loops.peft,
    "loralab": own_steps.sft,
    "loralab-padded": own_steps.sft_padded,
    "loralab-native": own_steps.sft_native,
}


def test_ways_to_fine_tune_see_the_same_rows_and_learn_alike(tmp_path: Path, llama: str) -> None:
    work = work_on(tmp_path, llama, instructions())
    assert set(FINE_TUNING) <= set(sft.WAYS)
    said = {name: drive(run, work) for name, run in FINE_TUNING.items()}
    for name, laps in said.items():
        assert [lap["tokens"] for lap in laps] == counted(work, lambda r: len(r["input_ids"])), name
        learned = counted(work, lambda r: sum(label != -100 for label in r["labels"]))
        assert [lap["learned"] for lap in laps] == learned, name
        assert [lap["checksum"] for lap in laps] == [lap["checksum"] for lap in said["trl"]], name
        for own, theirs in zip(laps, said["trl"], strict=True):
            assert own["losses"] == pytest.approx(theirs["losses"], abs=2e-5), name
    losses = [loss for lap in said["trl"] for loss in lap["losses"]]
    assert len(losses) == 3
    assert max(losses) - min(losses) > 1e-2  # it trains


@pytest.mark.slow
def test_ways_of_preference_optimisation_agree(tmp_path: Path, llama: str) -> None:
    work = work_on(tmp_path, llama, pairs())
    ways = {
        "trl": trl_peers.dpo,
        "trl-labelled": trl_peers.dpo_labelled,
        "loralab": own_steps.dpo,
        "loralab-native": own_steps.dpo_native,
    }
    assert set(ways) == set(dpo.WAYS)
    said = {name: drive(run, work) for name, run in ways.items()}

    def tokens(pair: Mapping[str, Any]) -> int:
        return sum(2 * len(pair["prompt_ids"]) if "prompt" in k else len(pair[k]) for k in pair)

    for name, laps in said.items():
        assert [lap["tokens"] for lap in laps] == counted(work, tokens), name
        assert [lap["checksum"] for lap in laps] == [lap["checksum"] for lap in said["trl"]], name
        assert laps[0]["losses"] == pytest.approx([math.log(2)], abs=1e-6), name
        assert laps[1]["losses"] == pytest.approx(said["trl"][1]["losses"], abs=2e-5), name
    assert abs(said["trl"][1]["losses"][1] - math.log(2)) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("borders", [False, True])
def test_ways_to_pretrain_see_the_same_rows(tmp_path: Path, decoder: str, borders: bool) -> None:
    work = work_on(tmp_path, decoder, stories(borders))
    ways = {
        "llama": plain_loops.llama,
        "nano": plain_loops.nano,
        "loralab": own_steps.pretrain,
        "loralab-native": own_steps.pretrain_native,
    }
    assert set(ways) == set(pretrain.WAYS)
    said = {name: drive(run, work) for name, run in ways.items()}
    for name, laps in said.items():
        assert [lap["tokens"] for lap in laps] == [BATCH * 24, 2 * BATCH * 24], name
        learned = 22 if borders else 23
        assert [lap["learned"] for lap in laps] == [BATCH * learned, 2 * BATCH * learned], name
        assert [lap["checksum"] for lap in laps] == [lap["checksum"] for lap in said["nano"]], name
        if name != "nano" and not borders:
            losses = said["llama"][1]["losses"]
            assert laps[1]["losses"] == pytest.approx(losses, abs=2e-5), name


def test_a_batch_is_counted_alike_however_it_lies() -> None:
    rows = [as_row(record) for record in instructions()[:4]]
    padded, flat = Seen.of(pad(rows, tiny.PAD)), Seen.of(flatten(rows))
    assert padded == flat
    assert padded.tokens == sum(len(row.input_ids) for row in rows)
    assert padded.learned == sum(row.learned for row in rows)
    assert Seen.of(flatten(rows[::-1])) == flat
    other = as_row({**instructions()[3], "input_ids": ids(17, 5)})
    assert Seen.of(flatten([*rows[:3], other])).checksum != flat.checksum
    sums = [Seen.of({"input_ids": torch.tensor([t]), "labels": torch.tensor([t])}).checksum
            for t in ([6, 6], [5, 7])]  # fmt: skip
    assert sums[0] != sums[1]


def test_a_gate_measures_the_steps_of_a_lap_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("loralab.bench.gate.time.perf_counter", lambda: now[0])
    said: list[dict[str, Any]] = []
    orders: Iterator[dict[str, int]] = iter([{"warm": 2, "steps": 3}, {"warm": 0, "steps": 1}])
    gate = Gate(orders, said.append)
    gate.open()
    rows = [as_row(record) for record in instructions()]
    gate.watch(flatten(rows[:1]))  # a loader may be a batch ahead
    for step in range(6):
        gate.watch(flatten(rows[step + 1 : step + 2]))
        now[0] += 2.0**step
        with nullcontext() if step < 5 else pytest.raises(NoMoreLaps):
            gate.step(float(step))
    assert [(lap["run"], lap["losses"]) for lap in said[1:]] == [
        (4.0 + 8.0 + 16.0, [2.0, 3.0, 4.0]),
        (32.0, [5.0]),
    ]
    assert [lap["tokens"] for lap in said[1:]] == [14 + 17 + 20, 23]


def test_a_worker_trains_in_a_process_of_its_own(tmp_path: Path, llama: str) -> None:
    work = work_on(tmp_path, llama, instructions())
    worker = Worker(Way("PEFT", "loralab.bench.plain_loops:peft"), work)
    try:
        first, second = worker.lap(0, 1), worker.lap(1, 2)
    finally:
        worker.close()
    here = drive(plain_loops.peft, work)
    assert [first.tokens, second.tokens] == [lap["tokens"] for lap in here]
    assert second.losses == pytest.approx(here[1]["losses"], abs=1e-6)
    assert 0.1 < first.peak_gb <= second.peak_gb < 5


def test_a_worker_that_cannot_train_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    work = work_on(tmp_path, "model", instructions())
    for script, error, match in (
        ('print("""{"error": "no compiler"}""")', UserError, "no compiler"),
        ('import sys; sys.exit("ImportError: no trl")', RuntimeError, "it ended: ImportError: no"),
        ("", RuntimeError, "it wrote nothing"),
    ):
        monkeypatch.setattr(workers, "COMMAND", (sys.executable, "-S", "-c", script))
        with pytest.raises(error, match=match):
            Worker(Way("a way", "module:function"), work)
    monkeypatch.setattr(workers, "COMMAND", (sys.executable, "-S", "-c", ANSWERS))
    ways = {"a": Way("", "a"), "lame": Way("", "lame"), "b": Way("", "b")}
    said: list[str] = []
    done = race(ways, work, 2, 3, 1, said.append, {"gemm": lambda: Lap(0.0, 1.0, 1.0, 5)})
    assert list(done.timed) == ["a", "b", "gemm"]
    assert done.skipped == {"lame": "not here"}
    assert done.peaks == {"a": 2.0, "b": 2.0}
    assert [lap.losses for lap in done.laps("b")] == [(3.0,), (3.0,)]
    with pytest.raises(RuntimeError, match="elsewhere trained on other rows than a"):
        race({**ways, "elsewhere": Way("", "elsewhere")}, work, 1, 3, 1)
    turns = [line.split(":")[0] for line in said if line[0].isdigit()]
    assert turns == ["1 a", "1 b", "1 gemm", "2 a", "2 b", "2 gemm"]


ANSWERS = """
import json, sys
lap = {"run": 2.0, "cpu": 1.0, "tokens": 9, "learned": 4, "losses": [3.0]}
for line in sys.stdin:
    order = json.loads(line)
    if order.get("way") == "lame":
        said = {"error": "not here"}
    elif "way" in order:
        lap["checksum"] = len(order["way"])
        said = {"ready": True, "peak_gb": 1.0}
    else:
        assert order == {"warm": 1, "steps": 3}
        said = {**lap, "peak_gb": 2.0}
    print(json.dumps(said), flush=True)
"""
"""A worker that answers as told."""


def lap_of(**values: Any) -> StepLap:
    given = {"load": 0.0, "run": 2.0, "cpu": 1.0, "tokens": 100, "learned": 40, "checksum": 7}
    return StepLap(**{**given, "losses": (3.0,), "peak_gb": 1.0, **values})


def test_other_rows_are_found_out() -> None:
    same_rows({"a": (lap_of(), lap_of()), "b": (lap_of(run=9.0), lap_of())})
    for change in ({"tokens": 101}, {"learned": 41}, {"checksum": 8}):
        with pytest.raises(RuntimeError, match="b trained on other rows than a"):
            same_rows({"a": (lap_of(), lap_of()), "b": (lap_of(), lap_of(**change))})


def test_floor_counts_what_autograd_runs() -> None:
    model = tiny.model("llama").requires_grad_(False)
    work = Work("", "float32", "", 1, rank=4)
    lengths = [11, 11]
    expected = lora_flops(model, 4, lengths, sum(lengths))
    peft_model = get_peft_model(model, work.lora())
    peft_model.enable_input_require_grads()
    peft_model.set_attn_implementation("eager")
    tokens = torch.randint(4, 60, (2, 11))
    with FlopCounterMode(display=False) as counter:
        peft_model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    unseen = 12 * 64 * 2 * sum(n * n - n * (n + 1) / 2 for n in lengths)  # what causality hides
    assert counter.get_total_flops() == expected + unseen


def test_floor_in_words() -> None:
    gemm = Timed((Lap(0.0, 2.0, 2.0, 10**12), Lap(0.0, 1.0, 1.0, 10**12), Lap(0.0, 4.0, 4.0, 1)))
    section = least(gemm, 1e9, {"ours": 250.0})
    assert "500 GFLOP/s" in section.intro
    assert "500 tokens/s" in section.intro
    assert "ours: 50% of it" in section.intro
    weight = torch.empty(8, 4)
    lap = Gemm(weight, 6, torch.float32, seconds=0.001).lap()
    assert lap.tokens > 0
    assert lap.tokens % (2 * 6 * 8 * 4) == 0


def test_nano_gpt_predicts_from_what_came_before_alone(decoder: str) -> None:
    config = DecoderConfig.from_pretrained(decoder)
    torch.manual_seed(0)
    model = NanoGPT(config)
    tokens = torch.randint(4, 60, (1, 12))
    targets = torch.full((1, 12), -100)
    targets[0, 4] = 9
    changed = tokens.clone()
    changed[0, 5:] = 3
    assert model(tokens, targets) == model(changed, targets)
    changed[0, 4] = 3
    assert model(tokens, targets) != model(changed, targets)


def test_page_has_ratios_of_speed_and_memory() -> None:
    timed = {
        "trl": Timed((lap_of(cpu=8.0), lap_of(cpu=40.0), lap_of(cpu=6.0))),
        "loralab": Timed((lap_of(cpu=2.0), lap_of(cpu=4.0), lap_of(cpu=2.0, run=0.5))),
    }
    done = Race(timed, {"trl": 4.0, "loralab": 1.0}, {"loralab-native": "no compiler"})
    section = step_page.speed(done, sft.WAYS, {"trl": "TRL", "trl-labelled": "TRL patched"})
    assert section.columns[3:6] == ["x TRL", "peak GB", "of TRL's"]
    assert section.rows[1][:2] == ["loralab, plain PyTorch", 50.0]
    assert section.rows[1][3:6] == ["4.00", "1.00", "0.25"]
    assert any("loralab, native kernels: skipped, no compiler." in note for note in section.notes)


def test_curves_are_compared_with_the_reference_in_float32() -> None:
    found = curves.Curves(
        {
            "float32": {"trl": (3.0, 2.0), "loralab": (3.0, 2.25)},
            "bfloat16": {"trl": (3.5, 2.0), "loralab": (3.0, 1.875)},
        }
    )
    assert found.apart("loralab", "float32", "trl") == 0.25
    assert found.apart("trl", "bfloat16", "trl") == 0.5
    rows = curves.section(found, sft.WAYS, "trl").rows
    assert [row[-1] for row in rows] == [None, "0.25", "0.5", "0.12"]


def test_command_line_writes_the_page(
    llama: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_race(ways: Mapping[str, Way], work: Work, *_: Any) -> Race:
        assert work.steps == 1
        assert len(work.records()) == 4
        timed = {name: Timed((lap_of(),)) for name in ways}
        gemm = Timed((Lap(0.0, 1.0, 1.0, 10**9),))
        return Race({**timed, sft.GEMM: gemm}, dict.fromkeys(ways, 1.0), {})

    monkeypatch.setattr(step_page, "pin", lambda core: core)
    monkeypatch.setattr(step_page, "race", run_race)
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"aa bb {i}", "answer": f"cc dd {i}\n#### {i}"} for i in range(5)]
    Path("train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = ["--quick", "--model", llama, "--data", ".", "--examples", "4", "--json", "raw.json"]
    assert cli.main(["bench", "sft", *given, "--ways", "trl", "loralab"]) == 0
    page = capsys.readouterr().out
    assert "| TRL SFTTrainer and PEFT |" in page
    assert "## The floor" in page
    raw = json.loads(Path("raw.json").read_text())
    assert list(raw["ways"]) == ["trl", "loralab"]
    assert raw["command"].startswith("`loralab bench sft --quick")
    assert not Path("docs").exists()
    # The whole of the page is of this kind, and no path of the machine is on it.
    given[given.index(".")] = str(tmp_path)
    assert cli.main(["bench", "sft", *given[:-2], "--out", "page.md"]) == 0
    assert capsys.readouterr().out.count("skipped") == 0
    assert str(tmp_path) not in Path("page.md").read_text() + Path("page.json").read_text()


@pytest.mark.parametrize("name", ["dpo", "pretrain"])
def test_the_other_kinds_are_prepared_and_told(
    name: str, llama: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    raced: list[Work] = []

    def run_race(ways: Mapping[str, Way], work: Work, *_: Any) -> Race:
        raced.append(work)
        assert len(work.records()) == 3
        for record in work.records():
            lengths = {key: len(record[key]) for key in record}
            if name == "dpo":
                assert set(lengths) == {"prompt_ids", "chosen_ids", "rejected_ids"}
                assert record["chosen_ids"] != record["rejected_ids"]
            else:
                assert lengths["input_ids"] == work.max_length
                assert work.load("float32")[0].config.num_hidden_layers == 4
        return Race({n: Timed((lap_of(),)) for n in ways}, dict.fromkeys(ways, 1.0), {})

    monkeypatch.setattr(step_page, "pin", lambda core: core)
    monkeypatch.setattr(step_page, "race", run_race)
    monkeypatch.chdir(tmp_path)
    talk = "\n\nHuman: aa bb{}\n\nAssistant: {} dd"
    rows = [{"chosen": talk.format(i, "cc"), "rejected": talk.format(i, "ee")} for i in range(6)]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("text.txt").write_text("<|endoftext|>".join(tiny.words(300, i) for i in range(4)))
    words = {
        "dpo": ["--model", llama, "--data", "pairs.jsonl", "--pairs", "3", "--laps", "2"],
        "pretrain": ["--data", "text.txt", "--rows", "3", "--laps", "2", "--dtype", "bfloat16"],
    }[name]
    assert cli.main(["bench", name, *words]) == 0
    [work] = raced
    page = Path(f"docs/bench-{name}.md").read_text()
    told = {
        "dpo": ("4 pairs of pairs.jsonl, answers of up to 512 tokens", "LoRA of rank 16"),
        "pretrain": ("32 rows of 128 tokens of text.txt, bfloat16; pretrain-tiny, ",),
    }[name]
    assert all(text in page for text in told)
    assert (work.steps, work.lr) == {"dpo": (6, 5e-5), "pretrain": (24, 3e-3)}[name]


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("pretrain", ["--rows", "0"], "--rows is 0; expected 1 or more"),
        ("sft", ["--steps", "0"], "--steps is 0; expected 1 or more"),
        ("dpo", ["--warm", "-1"], "--warm is -1; expected 0 or more"),
        ("sft", ["--batch-size", "0"], "--batch-size is 0; expected 1 or more"),
        ("pretrain", ["--laps", "0"], "there is nothing to measure"),
        ("sft", ["--laps", "0", "--curve", "2", "--ways", "peft"], "there is nothing to measure"),
        ("sft", ["--core", "4096"], "--core 4096: Invalid argument; expected one of"),
        ("pretrain", ["--data", "short.txt"], "short.txt: not one row to train on"),
    ],
)
def test_what_would_never_end_or_measure_nothing_is_refused(
    name: str,
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if "--core" not in words:
        monkeypatch.setattr(step_page, "pin", lambda core: core)
    monkeypatch.setattr(step_page, "race", None)
    Path("short.txt").write_text(tiny.words(20, 0))
    assert cli.main(["bench", name, *words]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1


def test_rows_are_there_before_anything_trains_on_them(tmp_path: Path) -> None:
    work = Work("", "float32", str(tmp_path / "rows.json"), steps=1, max_length=9)
    with pytest.raises(UserError, match="HH: not one row to train on, at a max_length of 9 tokens"):
        work.write([], "HH")
    assert not list(tmp_path.iterdir())


def test_unknown_way() -> None:
    with pytest.raises(UserError, match="way 'unsloth' is unknown"):
        chosen(["unsloth"], sft.WAYS)
