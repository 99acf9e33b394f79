"""The population benchmark on a tiny random Llama: all rows run, and in fp32 they agree."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loralab.bench import population
from loralab.bench.competitors import ROWS, Garage, Options
from loralab.bench.peers import PerturbAndRestore
from loralab.bench.timing import Lap, Timed, peak_rss_gb, take_turns
from loralab.bench.workloads import Workload, build, equal_share, random_members
from loralab.errors import UserError

IN_PROCESS = ("reference", "peft-set", "peft-mixed", "torch")
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.fixture(autouse=True)
def _unbound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the test process on all its cores."""
    monkeypatch.setattr(population, "pin", lambda core: core)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(["<pad>", "<end>", *letters])}
    bytes_only = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_only,
        pad_token="<pad>",
        eos_token="<end>",
        chat_template=TEMPLATE,
    )


def tiny_llama(tokenizer: Any, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


def options(**changes: Any) -> Options:
    quick = Options(**population.QUICK, vllm_python=Path("no/such/python"))
    return replace(quick, long_prompts=3, tokens=12, fraction=0.4, **changes)


def test_fp32_rows_generate_the_same_text(tokenizer: Any) -> None:
    model = tiny_llama(tokenizer, torch.float32)
    chosen = options(dtype="float32", repeats=2)
    table = population.run(chosen, (model, tokenizer))

    skipped = table.data["skipped"]
    assert {"vllm", "ours"} <= set(skipped)
    assert "no/such/python" in skipped["vllm"]
    assert "float32" in skipped["ours"]
    for workload, prompts in (("short", 2), ("long", 3)):
        rows = table.data["workloads"][workload]["rows"]
        assert set(rows) == set(IN_PROCESS)
        for name, row in rows.items():
            assert [lap["tokens"] for lap in row["laps"]] == [3 * prompts * 12] * 2
            assert row["equal_to_reference"] == (None if name == "reference" else 1.0)
    assert "| PEFT, one mixed batch |" in table.markdown()
    # With a budget rows have fewer laps than were asked for: each says how many.
    assert "over the laps that the `laps` column gives" in table.facts["laps"]
    assert [row[6] for row in table.sections[0].rows] == [2] * len(IN_PROCESS)


@pytest.mark.slow
def test_bf16_rows_generate_equally_many_tokens(tokenizer: Any) -> None:
    model = tiny_llama(tokenizer, torch.bfloat16)
    chosen = options(workloads=("long", "unshared"))
    table = population.run(chosen, (model, tokenizer))
    rows = table.data["workloads"]["long"]["rows"]
    if "ours" in table.data["skipped"]:
        pytest.skip(f"no native backend here: {table.data['skipped']['ours']}")
    assert set(rows) == set(ROWS) - {"vllm"}
    assert {row["laps"][0]["tokens"] for row in rows.values()} == {3 * 3 * 12}
    assert set(table.data["workloads"]["unshared"]["rows"]) == {"ours"}
    assert table.data["kernels"]["ours"].startswith("native")


def test_reference_is_the_merged_model_and_leaves_the_weights(tokenizer: Any) -> None:
    model = tiny_llama(tokenizer, torch.float32)
    before = copy.deepcopy(model.state_dict())
    members = random_members(model, 3, 4, 8.0, 0.4, torch.float32, seed=1, share_A=True)
    work = build("short", tokenizer, prompts=2, tokens=12)
    peer = PerturbAndRestore(model, tokenizer)
    peer.load(members)
    generated = peer.generate(work)

    expected = []
    for member in members.values():
        merged = copy.deepcopy(model)
        for name, (a, b) in member.factors.items():
            merged.get_submodule(name).weight += member.scaling * (b @ a)
        for ids in work.ids:
            tokens = torch.tensor([ids])
            out = merged.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, do_sample=False
            )
            expected.append(out[0, len(ids) :].tolist())
    assert generated == expected
    assert len({tuple(sequence) for sequence in generated}) > 3, "members must differ in text"
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_generation_runs_past_the_end_token(tokenizer: Any) -> None:
    model = tiny_llama(tokenizer, torch.float32)
    chosen = options(dtype="float32", workloads=("short",), rows=IN_PROCESS)
    work = build("short", tokenizer, prompts=2, tokens=6)
    garage = Garage(chosen, model, tokenizer, [work], copies=True)
    peer = ROWS["reference"].make(garage)
    peer.load(garage.members("B"))
    # Whatever comes second first becomes the end token: nobody may stop there.
    end = peer.generate(work)[0][1]
    stopping = copy.deepcopy(tokenizer)
    stopping.eos_token = tokenizer.convert_ids_to_tokens(end)
    model = tiny_llama(tokenizer, torch.float32)
    model.config.eos_token_id = model.generation_config.eos_token_id = end
    table = population.run(chosen, (model, stopping))
    for name in IN_PROCESS:
        assert table.data["workloads"]["short"]["rows"][name]["laps"][0]["tokens"] == 3 * 2 * 12


@pytest.mark.parametrize("share_A", [True, False])
def test_members_have_the_size_and_sharing_asked_for(tokenizer: Any, share_A: bool) -> None:
    model = tiny_llama(tokenizer, torch.float32)
    members = random_members(model, 2, 8, 16.0, 0.1, torch.float32, seed=3, share_A=share_A)
    again = random_members(model, 2, 8, 16.0, 0.1, torch.float32, seed=3, share_A=share_A)
    first, second = members.values()
    assert len(first.factors) == 2 * 7
    assert first.digest() == again["m0"].digest() != second.digest()
    for name, (a, b) in first.factors.items():
        assert (a is second.factors[name].A) == share_A
        assert not torch.equal(b, second.factors[name].B)
        change = first.scaling * (b @ a)
        weight = model.get_submodule(name).weight
        assert change.shape == weight.shape
        rms = change.square().mean().sqrt() / weight.abs().mean()
        assert rms == pytest.approx(0.1, rel=0.3)


def test_workloads_record_what_their_prompts_share(tokenizer: Any) -> None:
    long = build("long", tokenizer, prompts=4, tokens=5)
    shared = long.shared_prefix
    assert shared > 100
    assert len({ids[:shared] for ids in long.ids}) == 1
    assert len({ids[: shared + 1] for ids in long.ids}) > 1
    unshared = build("unshared", tokenizer, prompts=4, tokens=5)
    assert unshared.shared_prefix == 0
    assert all(new[-len(old) :] == old for new, old in zip(unshared.ids, long.ids, strict=True))
    assert Workload("x", "x", ("a", "b"), ((1, 2), (1, 2, 3)), 1).shared_prefix == 2


def test_rows_take_turns_and_sit_out_beyond_their_budget() -> None:
    order: list[str] = []

    def lap(name: str, seconds: float) -> Lap:
        order.append(name)
        return Lap(0.5, seconds, seconds, 100)

    timed = take_turns(
        {"fast": lambda: lap("fast", 1.0), "slow": lambda: lap("slow", 9.0)}, 3, budget=10.0
    )
    assert order == ["fast", "slow", "fast", "slow", "fast"]
    assert timed["fast"].tokens_per_second == 100
    assert len(timed["slow"].laps) == 2
    uneven = Timed((Lap(1, 1, 1, 10), Lap(2, 10, 5, 10), Lap(9, 2, 1, 10)))
    assert (uneven.tokens_per_second, uneven.spread, uneven.load_seconds) == (5, (1, 10), 2)
    assert uneven.core_share == 0.5


def test_equal_share_counts_whole_sequences() -> None:
    assert equal_share([[1, 2], (3, 4)], [[1, 2], [3, 5]]) == 0.5


def test_peak_memory_sees_what_was_freed() -> None:
    before = peak_rss_gb()
    block = torch.ones(50_000_000)
    del block
    assert peak_rss_gb() >= before
    assert peak_rss_gb() > 0.2


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--rows", "ours", "nobody"], "unknown row 'nobody'"),
        (["--workloads", "nothing"], "unknown workload 'nothing'"),
        (["--model", "./no-such-model"], "no-such-model"),
        (["--repeats", "0"], "--repeats is 0; expected 1 or more"),
    ],
)
def test_what_the_user_can_mend_is_one_line(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert population.main(["--quick", *argv]) == 2
    err = capsys.readouterr().err.strip()
    assert said in err
    assert len(err.splitlines()) == 1


@pytest.mark.slow
def test_vllm_generates_the_text_of_the_reference(tokenizer: Any) -> None:
    python = Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python"
    if not python.exists():
        pytest.skip("no .venv-vllm beside the tests: make test-vllm makes it")
    model = tiny_llama(tokenizer, torch.float32)
    chosen = options(dtype="float32", workloads=("short",), rows=("reference", "vllm"))
    table = population.run(replace(chosen, vllm_python=python), (model, tokenizer))
    assert "vllm" not in table.data["skipped"]
    assert table.data["workloads"]["short"]["rows"]["vllm"]["equal_to_reference"] == 1.0


def test_an_absent_vllm_is_a_reason_not_a_failure(tokenizer: Any) -> None:
    model = tiny_llama(tokenizer, torch.float32)
    work = build("short", tokenizer, prompts=1, tokens=2)
    garage = Garage(options(), model, tokenizer, [work], copies=False)
    with pytest.raises(UserError, match="no environment"):
        ROWS["vllm"].make(garage)


@pytest.mark.slow
def test_a_killed_benchmark_leaves_no_files_in_memory(tokenizer: Any) -> None:
    python = Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python"
    if not python.exists():
        pytest.skip("no .venv-vllm beside the tests: make test-vllm makes it")
    model = tiny_llama(tokenizer, torch.float32)
    work = build("short", tokenizer, prompts=1, tokens=2)
    chosen = replace(options(dtype="float32"), vllm_python=python)
    peer = Garage(chosen, model, tokenizer, [work], copies=False).vllm()
    assert (peer.folder / "model" / "config.json").exists()
    # What the worker sees of a parent that is killed: its pipe closes, nobody cleans up.
    assert peer.process.stdin is not None
    peer.process.stdin.close()
    peer.process.wait(timeout=60)
    assert not peer.folder.exists()
