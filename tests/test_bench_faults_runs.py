"""The fault benchmark's runs from plan to record, on a model of a few thousand weights; its world
and its command."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import small_world
from fault_records import record
from loralab.bench.faults import command, origin
from loralab.bench.faults.faults import FAULTS
from loralab.bench.faults.healthy import CONTROLS, SETUPS
from loralab.bench.faults.items import Item, fault_of, items, plan_of
from loralab.bench.faults.origin import described
from loralab.bench.faults.plan import Plan
from loralab.bench.faults.tasks import Small
from loralab.errors import UserError
from loralab.health.reading import Reading
from loralab.health.rules import judge

GUARDED = True


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return small_world.made(tmp_path_factory.mktemp("world"))


def record_of(small: Any, plan: Plan) -> dict[str, Any]:
    """The record of a run, as it is read back."""
    from loralab.bench.faults.trial import run_trial

    made = run_trial(plan, Small("word", 0, train=8, test=3), small, 0)
    again: dict[str, Any] = json.loads(json.dumps(command.plain(made)))
    return again


def test_a_run_by_gradient_keeps_all_that_is_judged_and_each_loss_from_the_start(
    small: Any,
) -> None:
    plan = Plan(steps=3)
    fault_of("nan-step").change(plan)
    made = record_of(small, plan)
    assert [row["step"] for row in made["log"] if "eval_loss" in row][:1] == [0]
    assert {"loss", "grad_norm", "learning_rate", "entropy", "mean_token_accuracy"} <= set(
        made["log"][1]
    )
    assert [row["step"] for row in made["readings"]][:2] == [0, 1]
    assert 2 in {row["step"] for row in made["findings"] if row["rule"] == "numbers.nan"}
    assert {row["severity"] for row in made["doctor"]["findings"]} == {"fail"}
    assert len(made["used"]["right"]) == 3
    assert set(made["used"]) == set(made["base"])


def test_a_merged_model_is_what_is_used(small: Any) -> None:
    plan = Plan(steps=2)
    SETUPS["sine-merged"](plan)
    assert 0 <= record_of(small, plan)["used"]["score"] <= 1


def test_a_searchs_numbers_can_be_judged_again(small: Any) -> None:
    plan = Plan()
    SETUPS["search"](plan)
    assert plan.search is not None
    plan.search |= {"generations": 2, "population": 4, "test_samples": 2}
    made = record_of(small, plan)
    numbers = [Reading.from_json(row) for row in made["numbers"]]
    assert [one.step for one in numbers] == [0, 1]
    assert {"es.dominance", "es.ties"} <= set(numbers[0].values)
    assert made["dominance"] == numbers[0].values["es.dominance"]
    texts = [Reading.from_json(row) for row in made["readings"]]
    assert [one.step for one in texts] == [0, 1, 2]
    anew = [*judge(texts[:1]), *(one for reading in numbers for one in judge([reading]))]
    told = {(row["rule"], row["severity"]) for row in made["findings"]}
    assert told <= {(one.rule, one.severity) for one in [*anew, *judge(texts)]}
    assert 0 < made["guard_share"] < 100


@pytest.mark.parametrize("off", [0.0, -0.3])
def test_the_reported_baseline_is_measured_as_the_canary_measures_it(
    small: Any, off: float
) -> None:
    plan = Plan(steps=2)
    SETUPS["evaluated-word"](plan)
    plan.baseline_off = off
    made = record_of(small, plan)
    values = made["doctor"]["readings"][-1]["values"]
    assert values["canary.baseline"] == pytest.approx(-off, abs=1e-9)
    assert made["evaluation"]["reported"] - made["evaluation"]["real"] == pytest.approx(-off)


def test_the_reported_baseline_is_of_all_that_is_tested(
    small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loralab.bench.faults import trial
    from loralab.health import canaries
    from loralab.tasks.base import Score

    monkeypatch.setattr(trial, "_EXAMINED", 2)
    given: list[int | None] = []
    error = canaries.sampling_error
    monkeypatch.setattr(
        canaries, "sampling_error", lambda own, of, rest: given.append(of) or error(own, of, rest)
    )
    worth = {e.id: at / 4 for at, e in enumerate(Small("word", 0, 8, 3).examples("test"))}
    plan = Plan(steps=2)
    SETUPS["evaluated-word"](plan)
    plan.score = lambda task, example, text: Score(worth[example.id], True)
    values = record_of(small, plan)["doctor"]["readings"][-1]["values"]
    # Of 0, 1/4 and 1/2 all three are reported, the first two are measured again.
    assert values["canary.baseline"] == pytest.approx(1 / 4 - 1 / 8)
    assert given == [3]


def test_a_world_gives_copies_that_do_not_touch_each_other(small: Any) -> None:
    first, second = small.open()[0], small.open()[0]
    name = next(iter(first.state_dict()))
    first.state_dict()[name].zero_()
    assert second.state_dict()[name].any()
    assert small.open()[0].state_dict()[name].any()


def test_a_guard_is_asked_in_the_words_of_its_part(small: Any) -> None:
    from loralab.bench.faults.tasks import kinds_of, problems

    asked = [one.messages[0]["content"] for one in small.prompts if one.messages]
    own = {p.question for k in kinds_of("development") for p in problems(k, "development")}
    assert len(asked) == 10
    assert set(asked) <= own
    assert len(small.prompts) == 12


def test_stories_of_the_guards_are_nobody_elses(small: Any) -> None:
    from loralab.bench.faults.words import PARTS
    from loralab.bench.faults.world import World

    stories = [f"{at} times the sun had set on {at} hills and {at} sheep" for at in range(60)]
    begun = {}
    for part in PARTS:
        world = World("small", small.open()[0].name_or_path, stories, part)
        texts = [one for one in world.prompts if one.text is not None]
        begun[part] = {f"{one.text}{one.good}" for one in texts}
        assert len(begun[part]) == 2
        harm = {world.tokenizer.decode(r.input_ids, skip_special_tokens=True) for r in world.prose}
        assert len(harm) == 20
        first = {one.split()[0] for one in harm}
        # What the decoder may read begins with the 24th.
        assert first == {str(at) for at in range(20)}
        assert {one.split()[0] for one in begun[part]} <= {str(at) for at in range(20, 24)}
    assert not begun["development"] & begun["unseen"]


def test_a_decoder_made_otherwise_is_not_taken_for_this_one(small: Any) -> None:
    from loralab.bench.faults.world import Making
    from loralab.bench.faults.world import small_world as world_of

    place = Path(small.open()[0].name_or_path)
    with pytest.raises(UserError, match="made otherwise"):
        world_of(place.parent, ["a story"] * 60, Making(steps=5), tell=lambda _: None)


def options(tmp_path: Path, *words: str) -> Any:
    config = tmp_path / "set.yaml"
    config.write_text(
        "words: development\n"
        "worlds:\n  small: {seeds: [0, 1], tasks: [code, word], tasks_each: 1}\n",
        encoding="utf-8",
    )
    return command.parser().parse_args(["--config", str(config), *words])


def test_settings_are_the_files_or_what_the_options_say_instead(tmp_path: Path) -> None:
    asked = command.settings(options(tmp_path, "--seeds", "7,8"))
    assert asked["worlds"]["small"]["seeds"] == [7, 8]
    with pytest.raises(UserError, match="no 'large'; known: small"):
        command.settings(options(tmp_path, "--worlds", "large"))
    given = options(tmp_path)
    Path(given.config).write_text("words: mine\nworlds: {}\n", encoding="utf-8")
    with pytest.raises(UserError, match="known: development, unseen"):
        command.settings(given)
    text = "words: development\nworlds: {small: {tasks: [opposite]}}\n"
    Path(given.config).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="task 'opposite'"):
        command.settings(given)


def test_shards_part_a_set_and_leave_nothing_out() -> None:
    wanted = [Item("fault", fault.name, "small", "code", 0) for fault in FAULTS]
    parts = [command.shard(wanted, f"{at}/3") for at in range(3)]
    assert sorted(i.name for part in parts for i in part) == sorted(i.name for i in wanted)
    assert command.shard(wanted, None) == wanted
    for wrong in ("3/3", "1", "a/2", "-1/2"):
        with pytest.raises(UserError, match="expected I/N"):
            command.shard(wanted, wrong)


def test_the_page_is_of_the_whole_unseen_set_alone(tmp_path: Path) -> None:
    def is_the_table(*words: str, missing: int = 0) -> bool:
        given = command.parser().parse_args(list(words))
        wanted = items({"small": {"seeds": [0], "tasks": ["code"], "tasks_each": 1}})
        found: dict[Item, Any] = dict.fromkeys(wanted[missing:])
        return command.is_the_table(given, wanted, found)

    assert is_the_table("--set", "unseen")
    assert not is_the_table("--set", "unseen", missing=1)
    assert not is_the_table()
    for part in (["--only", "pissa"], ["--seeds", "10"], ["--worlds", "small"], ["--quick"],
                 ["--config", "mine.yaml"]):  # fmt: skip
        assert not is_the_table("--set", "unseen", *part), part
    with pytest.raises(UserError, match="development set alone"):
        command.main(["--set", "unseen", "--config", str(options(tmp_path).config), "--margins"])


def fall(*_: Any) -> dict[str, Any]:
    raise RuntimeError("out of luck")


def one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_trial: Any) -> list[str]:
    """Arguments of a set of one run, which is made up."""
    from loralab.bench.faults import trial, world

    monkeypatch.setattr(trial, "run_trial", run_trial)
    monkeypatch.setattr(world, "read_stories", lambda _: [])
    monkeypatch.setattr(world, "small_world", lambda *_: SimpleNamespace(tested=3))
    return [
        "--config", options(tmp_path).config, "--stories", "s", "--work", str(tmp_path),
        "--only", "pissa", "--seeds", "0",
    ]  # fmt: skip


def test_a_run_that_breaks_off_is_kept_as_such_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*one_run(tmp_path, monkeypatch, fall), "--shard", "0/1"]
    assert command.main(given) == 0
    [place] = (tmp_path / "development" / "runs").rglob("*.json")
    kept = json.loads(place.read_text(encoding="utf-8"))
    assert kept["error"] == "RuntimeError: out of luck"
    assert kept["name"] == "pissa"
    assert "1 of 1" in capsys.readouterr().out
    one_run(tmp_path, monkeypatch, lambda *_: record() | {"base": {"score": 0.1}})
    assert command.main(given) == 0
    assert "1 of 1" in capsys.readouterr().out
    assert "error" not in json.loads(place.read_text(encoding="utf-8"))
    assert command.main(given) == 0
    assert "1 of 1" not in capsys.readouterr().out


def test_what_another_plan_or_other_code_measured_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = record() | {"base": {"score": 0.1}}
    given = one_run(tmp_path, monkeypatch, lambda *_: dict(made))

    def told(*words: str) -> tuple[str, str]:
        assert command.main([*given, *words]) == 0
        out = capsys.readouterr()
        return out.out, out.err

    assert "1 of 1" in told()[0]
    out, err = told("--table-only")
    assert ("1, of development" in out, err) == (True, "")
    code = dict(command.code())
    monkeypatch.setattr(command, "code", lambda: code | {"health/look.py": "0"})
    out, err = told("--table-only")
    assert "1 of another plan or version were found" in out
    assert "0, of development" in out
    assert "1 runs of another plan or version, left out; what differs: health/look.py" in err
    out, err = told("--table-only", "--any-version")
    assert "1, of development" in out
    assert "1 of another plan or version were found" in out
    assert "judged all the same" in err
    assert "1 missing" in told("--plan")[0]
    assert "1 of 1" in told()[0], "run again"
    assert told("--table-only")[1] == ""
    place = Path(given[1])
    text = place.read_text(encoding="utf-8")
    place.write_text(text.replace("tasks_each: 1", "tasks_each: 1, plan: {lr: 0.5}"), "utf-8")
    assert "what differs: plan\n" in told("--table-only")[1]
    assert "1 of 1" in told()[0], "run again"


def test_plans_are_plain_data_and_differ_where_what_they_do_does() -> None:
    def of(kind: str, name: str) -> Any:
        return described(plan_of(Item(kind, name, "small", "code", 0)))

    every = [("fault", one.name) for one in FAULTS] + [("control", one.name) for one in CONTROLS]
    every += [("healthy", name) for name in SETUPS]
    plans = {one: of(*one) for one in every}
    assert json.loads(json.dumps(list(plans.values()))) == list(plans.values())
    assert plans == {one: of(*one) for one in every}
    for fault in FAULTS:
        mine = plans["fault", fault.name]
        assert [one for one, plan in plans.items() if plan == mine] == [("fault", fault.name)]


def test_code_is_what_measures_and_not_what_judges(tmp_path: Path) -> None:
    names = set(origin.code())
    assert {"bench/faults/trial.py", "bench/faults/tasks.py", "health/look.py"} <= names
    assert {"health/guard.py", "health/prompts.json"} <= names
    assert not [one for one in names if "rules" in one or "thresholds" in one or "page" in one]
    for folder in ("bench/faults", "health"):
        (tmp_path / folder).mkdir(parents=True)
    file = tmp_path / "health" / "look.py"
    digests = []
    for text in ("a = 1\n", "# said\na  =  1\n", "a = 2\n"):
        file.write_text(text, encoding="utf-8")
        digests.append(origin.code(tmp_path)["health/look.py"])
    assert digests[0] == digests[1] != digests[2]
