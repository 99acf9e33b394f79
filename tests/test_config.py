"""Configs: what ships is valid, what is wrong is said in one line that names the key."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from loralab import config
from loralab.errors import UserError
from loralab.pipeline import TRAINERS

ROOT = Path(__file__).parent.parent


def failure(*overrides: str, name: str | Path = "conciseness") -> str:
    with pytest.raises(UserError) as caught:
        config.load(name, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "configs").glob("*.yaml")))
def test_every_shipped_config_goes_through_the_schema(name: str) -> None:
    loaded = config.load(name)
    assert loaded.name == name
    # What a run directory stores is itself a config, of the same digest.
    assert config.parse(loaded.to_dict(), "config.yaml").digest() == loaded.digest()
    assert config.load(ROOT / "configs" / f"{name}.yaml") == loaded


def test_the_shipped_set_is_what_the_readme_promises() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme[readme.index("| name | what | for |") : readme.index("Any key can be set")]
    assert set(config.shipped()) == set(re.findall(r"`([a-z0-9-]+)`", table)) - {"sft"}
    conciseness, countdown = config.load("conciseness"), config.load("countdown")
    assert (conciseness.evolution.generations, conciseness.evolution.population) == (30, 30)
    assert (countdown.evolution.generations, countdown.evolution.population) == (1000, 30)
    assert countdown.evolution.samples_per_generation == 128
    assert countdown.evolution.test_samples == 100
    assert countdown.generation.max_new_tokens == 1024


def test_overrides_are_yaml_and_reach_any_depth() -> None:
    loaded = config.load(
        "conciseness",
        [
            "evolution.optimizer.lr=1e-4",
            "evolution.samples_per_generation=null",
            "evolution.antithetic=false",
            "evolution.population=7",
            "adapter.target_modules=[q_proj, v_proj]",
            "generation.stop=['\\n', a=b]",
            "task.options.seed=3",
            "model=/a/b=c",
        ],
    )
    assert loaded.evolution.optimizer.lr == 1e-4
    assert loaded.evolution.samples_per_generation is None
    assert loaded.evolution.antithetic is False
    assert loaded.adapter.target_modules == ("q_proj", "v_proj")
    assert loaded.generation.stop == ("\\n", "a=b")
    assert loaded.task.options == {"seed": 3}
    assert loaded.model == "/a/b=c"


def test_scaling_is_alpha_over_rank() -> None:
    assert config.load("demo", ["adapter.rank=16", "adapter.alpha=8"]).adapter.scaling == 0.5


def test_digest_follows_values_not_spelling(tmp_path: Path) -> None:
    base = config.load("demo")
    assert config.load("demo", ["adapter.alpha=8"]).digest() == base.digest()
    assert config.load("demo", ["adapter.alpha=8.5"]).digest() != base.digest()
    shuffled = tmp_path / "c.yaml"
    values = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    shuffled.write_text(yaml.safe_dump(dict(reversed(values.items()))))
    assert config.load(shuffled).digest() == base.digest()


def test_nothing_in_a_config_can_change() -> None:
    loaded = config.load("demo")
    with pytest.raises(ValueError, match="frozen"):
        loaded.evolution.population = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "evolution.poplation=4",
            ["evolution.poplation", "4", "did you mean evolution.population"],
        ),
        ("lr=3", ["unknown key lr", "did you mean evolution.optimizer.lr"]),
        ("zzz=3", ["unknown key zzz", "known keys here: kind, name"]),
        ("evolution.population=many", ["evolution.population", '"many"', "a whole number"]),
        ("evolution.population='8'", ["evolution.population", '"8"', "a whole number"]),
        ("evolution.population=3", ["evolution", "even population", "3"]),
        ("evolution.population=0", ["evolution.population is 0", "greater than or equal to 2"]),
        ("evolution.antithetic=1", ["evolution.antithetic is 1", "true or false"]),
        ("evolution.optimizer.lr=.nan", ["evolution.optimizer.lr", "finite"]),
        ("evolution.noise_on=C", ["evolution.noise_on", '"C"', "'B', 'AB' or 'weights'"]),
        ("adapter.target_modules=[q, 1]", ["adapter.target_modules is", "list of module names"]),
        ("adapter=null", ["adapter is null", "a mapping"]),
        ("generation.stop=x", ["generation.stop", '"x"', "a list"]),
        ("name=a/b", ["name", '"a/b"']),
        ("kind=stf", ["kind", '"stf"', "'evolve'"]),
    ],
)
def test_a_wrong_override_is_named(override: str, expected: list[str]) -> None:
    text = failure(override)
    assert text.startswith("command line: ")
    for part in expected:
        assert part in text
    assert "more)" not in text


@pytest.mark.parametrize("override", ["rank", "=3", "a..b=1", "name.x=1", "a={"])
def test_a_malformed_override_is_named(override: str) -> None:
    assert repr(override) in failure(override)


def test_the_misspelling_comes_before_the_key_it_leaves_missing(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text((ROOT / "configs" / "demo.yaml").read_text().replace("\ntask:", "\ntsak:"))
    text = failure(name=path)
    assert text.startswith(f"{path}: unknown key tsak")
    assert "did you mean task?" in text
    assert text.endswith("(and 1 more)")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "expected a mapping"),
        (b"- a\n- b\n", "expected a mapping"),
        (b"kind: evolve\nkind: evolve\n", "line 2 not valid YAML: key 'kind' appears twice"),
        (b"a: [1\nb: 2\n", "not valid YAML"),
        (b"a: !!python/object:os.system x\n", "not valid YAML"),
        (b"a: 2024-99-99\n", "not valid YAML"),
        (b"\xff\xfe\xfa", "not UTF-8"),
        (b"a: \x00\n", "not valid YAML"),
        (b"name: x\n", "kind is null; expected "),
        (b"[" * 100_000, "not valid YAML"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    text = failure(name=path)
    assert text.startswith(f"{path}:")
    assert expected in text


def test_a_missing_file_suggests_what_ships(tmp_path: Path) -> None:
    assert "did you mean 'conciseness'?" in failure(name="concisness.yaml")
    assert "countdown-small" in failure(name="elsewhere")
    assert "is a directory" in failure(name=tmp_path)


SFT = {
    "kind": "sft",
    "name": "x",
    "model": "smollm2",
    "task": {"name": "gsm8k"},
    "training": {"steps": 3},
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"training": {}}, "c: training: expected either steps or epochs"),
        ({"training": {"steps": 3, "epochs": 1.0}}, "c: training: expected either steps or epochs"),
        ({"task": None}, "c: expected either task or data, which say what to learn"),
        ({"data": {"path": "x"}}, "c: expected either task or data, which say what to learn"),
        ({"full": True, "adapter": {"rank": 4}}, "c: expected either adapter or full: true"),
        ({"training": {"steps": 3, "lrr": 1e-4}}, "unknown key training.lrr (value 0.0001); did"),
        ({"evolution": {}}, "unknown key evolution"),
        ({"training": {"steps": 3, "schedule": "sine"}}, "training.schedule is"),
    ],
)
def test_a_wrong_fine_tuning_is_named(changes: dict[str, object], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        config.parse({**SFT, **changes}, "c")
    assert expected in str(caught.value)


def test_full_fine_tuning_has_no_adapter_and_stores_itself_whole() -> None:
    full = config.parse({**SFT, "full": True}, "c")
    assert full.adapter is None
    assert config.parse(full.to_dict(), "config.yaml") == full
    assert config.parse(SFT, "c").adapter == config.AdapterConfig()


def test_a_journal_takes_an_evolution_alone() -> None:
    with pytest.raises(UserError, match="journal: kind is \"sft\"; expected 'evolve'"):
        config.parse_evolve(SFT, "journal")


def test_importing_it_does_not_import_torch() -> None:
    code = "import sys, loralab.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_every_kind_has_a_trainer_that_is_there() -> None:
    assert set(TRAINERS) == set(config.KINDS)
    for target, _ in TRAINERS.values():
        module, _, name = target.partition(":")
        assert callable(getattr(import_module(module), name))
