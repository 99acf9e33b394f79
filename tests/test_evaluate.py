"""pass@k, errors, run directories as models: what `loralab eval` measures and writes."""

from __future__ import annotations

import json
import math
import random
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch

import tiny
from loralab import cli, tasks
from loralab.adapters.state import AdapterState
from loralab.config import GenerationConfig
from loralab.engines.base import Completion, Request
from loralab.errors import UserError
from loralab.evaluate import Evaluation, engine_of, evaluate
from loralab.models.decoder import DecoderConfig, DecoderForCausalLM
from loralab.models.load import load
from loralab.report import build_report
from loralab.run import Run
from loralab.subject import subject_of
from loralab.tasks.base import Example, Prompt, Score, Split
from loralab.tasks.metrics import bootstrap, mean_of, passes, share_of

SAMPLED = GenerationConfig(max_new_tokens=4, temperature=1.0)


class Dice:
    """Answers a number of the request's own seed, so that completions differ by sample alone."""

    accepts = frozenset({"lora"})

    def __init__(self) -> None:
        self.calls: list[int] = []

    def load(self, adapters: Any) -> None:
        pass

    def generate(self, requests: list[Request], progress: Any = None) -> list[Completion]:
        self.calls.append(len(requests))
        answers = []
        for request in requests:
            roll = random.Random(request.sampling.seed).randrange(4)
            if roll == 3:
                answers.append(Completion("", (), "error", "no room"))
            else:
                answers.append(Completion(str(roll), (roll,), "stop"))
        return answers


class Guess:
    """Right where the answer is the example's number; `level` is a number no mean gives."""

    name = "guess"
    reward_floor = -1.0
    full_marks = 1.0

    def __init__(self, count: int = 7, judged: bool = True) -> None:
        self.count = count
        self.judged = judged

    def examples(self, split: Split) -> list[Example]:
        return [Example(str(i), {"n": i % 3}) for i in range(self.count)]

    def prompt(self, example: Example) -> Prompt:
        return f"roll {example.id}"

    def gold(self, example: Example) -> str | None:
        return str(example.data["n"])

    def score(self, example: Example, completion: str) -> Score:
        right = completion == str(example.data["n"])
        return Score(float(right), right if self.judged else None)

    def metrics(self, answered: Any) -> dict[str, float]:
        return {"level": max(len(text) for _, text in answered) + len(answered) / 1000}


def by_problem(result: Evaluation) -> list[list[bool]]:
    n = result.samples
    rights = [bool(r.score.correct) for r in result.rollouts]
    return [rights[at : at + n] for at in range(0, len(rights), n)]


def test_pass_at_k_is_over_every_choice_of_k_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loralab.evaluate.CHUNK", 10)
    engine, seen = Dice(), []
    result = evaluate(
        engine, Guess(), SAMPLED, samples=5, k=(1, 3, 5), judged=lambda part: seen.extend(part)
    )
    assert engine.calls == [10, 10, 10, 5]
    assert seen == result.rollouts
    assert [r.example.id for r in result.rollouts] == [str(i) for i in range(7) for _ in range(5)]
    groups = by_problem(result)
    assert any(any(g) and not all(g) for g in groups)
    for k in (1, 3, 5):
        each = [fmean(map(any, combinations(group, k))) for group in groups]
        score = result.scores[f"pass@{k}"]
        assert score.value == pytest.approx(fmean(each))
        assert score.error == pytest.approx(stdev(each) / math.sqrt(7))
    assert result.scores["correct"].value == pytest.approx(result.scores["pass@1"].value)
    # Errors are over problems: 35 completions of 7 problems are not 35 independent ones.
    shares = [fmean(group) for group in groups]
    assert result.scores["correct"].error == pytest.approx(stdev(shares) / math.sqrt(7))
    assert result.failed == sum(r.failed == "no room" for r in result.rollouts) > 0


def test_the_first_sample_is_that_of_a_single_one_and_others_differ() -> None:
    one = evaluate(Dice(), Guess(), SAMPLED, seed=3)
    many = evaluate(Dice(), Guess(), SAMPLED, seed=3, samples=4)
    assert [r.text for r in many.rollouts[::4]] == [r.text for r in one.rollouts]
    assert [r.text for r in many.rollouts[1::4]] != [r.text for r in one.rollouts]


def test_the_tasks_own_numbers_have_errors_by_resampling_problems() -> None:
    result = evaluate(Dice(), Guess(), SAMPLED, samples=2)
    level = result.scores["level"]
    assert level.value == result.metrics["level"] == pytest.approx(1.014)
    assert level.error is not None
    assert "pass@1" not in result.scores


@pytest.mark.parametrize(
    ("task", "how", "said"),
    [
        (Guess(), {"samples": 0}, "samples is 0"),
        (Guess(), {"samples": 2, "k": (3,)}, "pass@3 needs 3 samples"),
        (Guess(), {"samples": 2, "k": (0,)}, "pass@0"),
        (Guess(judged=False), {"k": (1,)}, "right or wrong"),
        (Guess(0), {}, "no examples"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is_generated(
    task: Guess, how: dict[str, Any], said: str
) -> None:
    engine = Dice()
    with pytest.raises(UserError, match=said):
        evaluate(engine, task, SAMPLED, **how)
    with pytest.raises(UserError, match="temperature 0"):
        evaluate(engine, Guess(), GenerationConfig(), samples=2)
    assert engine.calls == []


def test_errors_and_intervals() -> None:
    shares = share_of([1.0] * 30 + [0.0] * 70)
    assert shares.error == pytest.approx(math.sqrt(0.3 * 0.7 / 99))
    # Wilson's interval of 30 of 100 is 0.219 to 0.396.
    assert (shares.low, shares.high) == (pytest.approx(0.219, abs=2e-3), pytest.approx(0.396, 5e-3))
    none = share_of([0.0] * 20)
    assert (none.error, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(3.8416 / 23.8416, rel=1e-4)  # z^2 / (n + z^2)
    assert mean_of([2.0]).error is None
    assert share_of([1.0]).high == 1.0
    # Many completions of a problem narrow the interval only as far as they narrow the error.
    assert share_of([0.5, 0.5, 0.4, 0.6]).high - share_of([1, 0, 0, 1]).high < -0.1  # type: ignore[operator]
    drawn = random.Random(1)
    values = [drawn.gauss(0, 1) for _ in range(60)]
    told = bootstrap(lambda places: {"mean": fmean(values[i] for i in places)}, 60)["mean"]
    assert told.error == pytest.approx(mean_of(values).error, rel=0.2)  # type: ignore[arg-type]
    assert passes([[True, False], [False, False]], 2).value == 0.5


# Models, adapters and runs, through the command.
@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    tiny.model("llama").save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return str(path)


def a_run(path: Path, **config: Any) -> Path:
    with Run.create(path, {"kind": "sft", "name": "x", "dtype": "float32", **config}):
        pass
    return path


def loralab(*words: str) -> int:
    try:
        return cli.main([*words, "--max-new-tokens", "4", "--task", "conciseness"])
    except SystemExit as stop:
        return int(stop.code or 0)


def said(capsys: Any, *words: str) -> dict[str, Any]:
    assert loralab("eval", *words, "--json") == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    return told


def texts(told: dict[str, Any]) -> list[str]:
    return [row["completion"] for row in told["completions"]]


def test_the_command_writes_every_completion_its_score_and_errors(
    model: str, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    words = ["--dtype", "float32", "--samples", "3", "--k", "1,2,3", "--temperature", "1"]
    assert loralab("eval", model, *words, "--shots", "0,2", "--limit", "4", "--out", str(out)) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table[0][:5] == ["task", "shots", "metric", "n", "score"]
    assert [row[1:3] for row in table[1:]] == [
        [few, name]
        for few in ("0", "2")
        for name in ("reward", "correct", "pass@1", "pass@2", "pass@3")
    ]
    run = Run.open(out)
    rows = run.completions()
    assert [(r["shots"], r["example"], r["sample"]) for r in rows] == [
        (few, f"test-{i}", s) for few in (0, 2) for i in range(4) for s in range(3)
    ]
    for row in rows:
        assert len(row["prompt"]) == (1 if row["shots"] == 0 else 5)
        assert row["reward"] == -abs(len(row["completion"]) - len(row["gold"]))
        assert row["failed"] is None
    assert len({row["completion"] for row in rows[:3]}) > 1
    first, second = run.metrics()
    assert (first["shots"], second["shots"], first["examples"]) == (0, 2, 4)
    rewards = [fmean(r["reward"] for r in rows[at : at + 3]) for at in range(0, 12, 3)]
    assert first["scores"]["reward"]["error"] == pytest.approx(stdev(rewards) / 2)
    assert run.config["k"] == [1, 2, 3]
    assert loralab("eval", model, "--out", str(out)) == 2
    assert "--out" in capsys.readouterr().err


def test_completions_that_failed_keep_their_error(model: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "test.jsonl").write_text(
        json.dumps({"question": tiny.words(200, 0), "target": "x"}) + "\n"
    )
    told = said(
        capsys, model, "--option", f"path={tmp_path}", "--out", str(tmp_path / "out"),
        "--dtype", "float32",
    )  # fmt: skip
    [row] = Run.open(tmp_path / "out").completions()
    assert told["failed"] == 1
    assert "context" in row["failed"] or "96" in row["failed"]
    assert row["reward"] == -1000.0


def test_a_runs_directory_is_its_adapter_on_its_model(
    model: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = a_run(tmp_path / "run", model=model)
    assert loralab("eval", str(run)) == 2
    assert "neither a model nor an adapter" in capsys.readouterr().err
    made = tiny.adapter(tiny.model("llama"), 3, size=1.0)
    made.save(run / "adapter")
    base = said(capsys, model, "--dtype", "float32")
    by_run = said(capsys, str(run))
    by_hand = said(capsys, model, "--dtype", "float32", "--adapter", str(run / "adapter"))
    assert texts(by_run) == texts(by_hand) != texts(base)
    assert loralab("eval", str(run), "--adapter", str(run / "adapter")) == 2
    assert "adapter of its own" in capsys.readouterr().err
    assert len(list((tmp_path / "runs").glob("eval-conciseness-*"))) == 3
    for kind in ("classify", "seq2seq", "verifier", "pipeline"):
        assert loralab("eval", str(a_run(tmp_path / kind, kind=kind))) == 2
        assert f"kind is '{kind}'" in capsys.readouterr().err


def test_a_run_that_left_a_whole_model_and_a_decoder_made_here(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1}
    decoder = DecoderForCausalLM(
        DecoderConfig(vocab_size=tiny.VOCABULARY, eos_token_id=tiny.EOS, **shape)  # type: ignore[arg-type]
    )
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    run = a_run(tmp_path / "run", kind="pretrain")
    for folder in ("model", "adapter"):  # a whole model stands before an adapter
        (run / folder).mkdir()
    decoder.save_pretrained(run / "model")
    tiny.tokenizer().save_pretrained(run / "model")
    (run / "adapter" / "adapter_config.json").write_text("{}")
    # Of a search in the weights merged/ is exact, of anything else adapter/ is.
    for kind, wanted in (("evolve", "merged"), ("sft", "adapter")):
        other = a_run(tmp_path / kind, kind=kind, model="smollm2")
        for folder, file in (("merged", "config.json"), ("adapter", "adapter_config.json")):
            (other / folder).mkdir()
            (other / folder / file).write_text("{}")
        found = subject_of(str(other))
        assert (found.adapter or found.model) == str(other / wanted)
    subject = subject_of(str(run))
    assert (subject.model, subject.adapter, subject.dtype) == (
        str(run / "model"), None, "float32",
    )  # fmt: skip
    engine, name = engine_of(subject)
    assert name is None
    [done] = engine.generate([Request("ab cd ef")])
    ids = tiny.tokenizer()("ab cd ef", return_tensors="pt").input_ids
    wanted = decoder.eval().generate(ids, max_new_tokens=64, do_sample=False)
    assert done.tokens == tuple(wanted[0, ids.shape[1] :].tolist())


def test_a_nonlinear_adapter_is_evaluated_as_it_is(model: str, tmp_path: Path) -> None:
    from peft import get_peft_model

    from loralab.adapters import LSLoraConfig

    made = get_peft_model(
        tiny.model("llama"), LSLoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "up_proj"])
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data += 0.4 * torch.randn(parameter.shape, generator=generator)
    made.save_pretrained(tmp_path / "adapter")
    ids = tiny.tokenizer()("ab cd ef", return_tensors="pt").input_ids
    wanted = made.eval().generate(input_ids=ids, max_new_tokens=64, do_sample=False)
    engine, name = engine_of(subject_of(model, str(tmp_path / "adapter"), "float32", "cpu"))
    [done] = engine.generate([Request("ab cd ef", name)])
    assert done.tokens == tuple(wanted[0, ids.shape[1] :].tolist())
    base, _ = engine_of(subject_of(model, None, "float32", "cpu"))
    assert base.generate([Request("ab cd ef")])[0].tokens != done.tokens


@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_a_run_on_a_quantised_base_is_evaluated_on_that(bits: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from peft import PeftModel

    model = str(tmp_path / "model")
    whole = tiny.save_quantisable(tmp_path / "model", noise=0.2)
    run = a_run(tmp_path / "run", model=model, quantization=bits)
    tiny.adapter(whole, 3, size=1.0).save(run / "adapter")
    engine, name = engine_of(subject_of(str(run), device="cpu"))
    [done] = engine.generate([Request("ab cd ef", name)])
    base, _ = load(model, "float32", quantization=bits)
    by_peft = PeftModel.from_pretrained(base, str(run / "adapter")).eval()
    ids = tiny.tokenizer()("ab cd ef", return_tensors="pt").input_ids
    wanted = by_peft.generate(input_ids=ids, max_new_tokens=64, do_sample=False)
    assert done.tokens == tuple(wanted[0, ids.shape[1] :].tolist())
    with by_peft.disable_adapter():
        plain = by_peft.generate(input_ids=ids, max_new_tokens=64, do_sample=False)
    assert wanted.tolist() != plain.tolist()


def test_other_runs_say_what_the_adapter_is_for(model: str, tmp_path: Path) -> None:
    tiny.adapter(tiny.model("gpt2"), 3).save(tmp_path / "run" / "adapter")
    with pytest.raises(UserError, match=r"adapter .* is not for model"):
        subject_of(model, str(tmp_path / "run" / "adapter"), "float32", "cpu").open()
    assert isinstance(AdapterState.load(tmp_path / "run" / "adapter"), AdapterState)


@pytest.mark.parametrize(
    "words", [("--samples", "3"), ("--k", "1"), ("--temperature", "0.8"), ("--stop", "x")]
)
def test_a_text_takes_no_options_of_answers(
    tmp_path: Path, capsys: Any, words: tuple[str, str]
) -> None:
    (tmp_path / "test.txt").write_text(tiny.words(40, 0))
    given = ["--task", "text", "--option", f"path={tmp_path}", "--out", str(tmp_path / "out")]
    assert cli.main(["eval", "smollm2", *given, *words]) == 2
    assert f"{words[0]} is about answers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_was_asked_is_written_down_as_it_was_resolved(
    model: str, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "answers"
    words = ["--dtype", "float32", "--samples", "3", "--temperature", "1", "--limit", "2"]
    assert loralab("eval", model, *words, "--out", str(out)) == 0
    config = Run.open(out).config
    assert config["k"] == [1, 3]
    assert config["generation"] == GenerationConfig(max_new_tokens=4, temperature=1).model_dump(
        mode="json"
    )
    page = build_report(out).read_text()
    assert "pass@3" in page
    assert "No generation" not in page
    (tmp_path / "test.txt").write_text(tiny.words(40, 0))
    given = ["--task", "text", "--option", f"path={tmp_path}", "--out", str(tmp_path / "text")]
    assert cli.main(["eval", model, "--dtype", "float32", "--limit", "20", *given]) == 0
    config = Run.open(tmp_path / "text").config
    assert config["limit"] == 20
    assert not {"k", "samples", "shots", "generation"} & set(config)
    assert "perplexity" in build_report(tmp_path / "text").read_text()


def test_shots_of_a_task_that_has_none(model: str, capsys: Any) -> None:
    assert cli.main(["eval", model, "--task", "text", "--shots", "2"]) == 2
    assert "no option 'shots'" in capsys.readouterr().err
    with pytest.raises(UserError, match="option 'shots'"):
        tasks.get("humaneval", shots=1, unsafe_exec=True)
