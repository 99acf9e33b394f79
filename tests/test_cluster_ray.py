"""Real Ray, several nodes, real kills: the adapter is the one of an undisturbed process."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import clustered_run
from loralab.errors import UserError
from loralab.evolution.events import Event, Generating, Notice
from loralab.evolution.journal import read
from loralab.evolution.trainer import evolve
from loralab.run import Run
from ray_cluster import Nodes, nodes_of, wait_until

pytest.importorskip("ray")
pytestmark = [pytest.mark.timeout(1500), pytest.mark.slow]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with nodes_of(2) as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same search in this process, without a cluster."""
    path = tmp_path_factory.mktemp("cluster") / "undisturbed"
    config = clustered_run.config_for(None).model_copy(update={"cluster": None})
    with Run.create(path, config.to_dict()) as run:
        evolve(config, run, open_workbench=clustered_run.bench)
    return path


def same_bits(path: Path, other: Path) -> None:
    """The same generations, and the same adapters to the last bit."""
    one, two = (read(folder / "journal.jsonl") for folder in (path, other))
    assert one.entries == two.entries
    assert len(one.entries) == clustered_run.GENERATIONS
    for name in ("adapter", "checkpoints/final"):
        for file in (other / name).iterdir():
            assert (path / name / file.name).read_bytes() == file.read_bytes()


def test_an_actor_killed_mid_generation_changes_nothing(
    tmp_path: Path, nodes: Nodes, undisturbed: Path
) -> None:
    config = clustered_run.config_for(nodes.address, actors=2)
    killed: list[int] = []
    notices: list[str] = []

    def kill_one(event: Event) -> None:
        if isinstance(event, Notice):
            notices.append(event.text)
        if isinstance(event, Generating) and event.generation == 3 and not killed:
            wait_until(lambda: bool(nodes.actors()))
            pid = nodes.kill_actor(random.Random(0).choice)
            assert pid is not None
            killed.append(pid)

    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with Run.create(tmp_path / "run", config.to_dict()) as run:
        assert evolve(config, run, kill_one, clustered_run.bench).complete
    assert killed
    assert [text for text in notices if "is gone: its work is done again" in text]
    same_bits(run.path, undisturbed)
    rows = run.metrics()[:-1]
    assert all(0 < row["sent_bytes"] + row["received_bytes"] < 20_000 for row in rows)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    wait_until(lambda: not nodes.actors())


def test_a_cluster_that_is_not_there_is_said_in_one_line(tmp_path: Path) -> None:
    config = clustered_run.config_for("nonsense")
    with (
        Run.create(tmp_path / "run", config.to_dict()) as run,
        pytest.raises(UserError, match=r"cluster\.address nonsense: no Ray cluster"),
    ):
        evolve(config, run, open_workbench=clustered_run.bench)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_kills_of_actors_and_nodes_at_random_times_change_nothing(
    tmp_path: Path, nodes: Nodes, undisturbed: Path, seed: int
) -> None:
    """Kills fall on working actors and on starting ones, sometimes on both at once."""
    config = clustered_run.config_for(nodes.address, actors=2)
    rng, seen, notices = random.Random(seed), 0, list[str]()
    kills = sorted(rng.sample(range(2, 46), 4))  # of at least 4 answers a generation
    done = {"actor": 0, "node": 0}

    def kill(event: Event) -> None:
        nonlocal seen
        if isinstance(event, Notice):
            notices.append(event.text)
        if not isinstance(event, Generating):
            return
        seen += 1
        if seen not in kills:
            return
        time.sleep(rng.uniform(0, 0.2))
        if kills.index(seen) == 2:
            nodes.kill_node()
            done["node"] += 1
        else:
            done["actor"] += nodes.kill_actor(rng.choice) is not None

    with Run.create(tmp_path / "run", config.to_dict()) as run:
        assert evolve(config, run, kill, clustered_run.bench).complete
    assert done["node"] == 1
    assert done["actor"] >= 2
    gone = [text for text in notices if "is gone: its work is done again" in text]
    assert len(gone) >= 2, notices
    same_bits(run.path, undisturbed)


@pytest.fixture
def start(nodes: Nodes) -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """Starts drivers in processes of their own; none outlives its test."""
    drivers: list[subprocess.Popen[str]] = []

    def started(path: Path) -> subprocess.Popen[str]:
        drivers.append(
            subprocess.Popen(
                [sys.executable, clustered_run.__file__, path, nodes.address, "2"],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return drivers[-1]

    yield started
    for driver in drivers:
        driver.kill()
        driver.communicate()


def reached(path: Path) -> int:
    """Generations in a journal, the header counted too."""
    journal = path / "journal.jsonl"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def test_actors_go_with_a_killed_driver_and_a_stopped_one_ends_well(
    tmp_path: Path,
    nodes: Nodes,
    undisturbed: Path,
    start: Callable[[Path], subprocess.Popen[str]],
) -> None:
    path = tmp_path / "run"
    driver = start(path)
    wait_until(lambda: reached(path) >= 3, 400)
    actors = nodes.actors()
    scorers = [child for actor in actors for child in actor.children(recursive=True)]
    driver.send_signal(signal.SIGKILL)
    driver.wait(timeout=60)
    _, alive = psutil.wait_procs([*actors, *scorers], timeout=200)
    assert actors
    assert not alive, alive

    before = reached(path)
    driver = start(path)
    wait_until(lambda: reached(path) > before, 400)
    driver.send_signal(signal.SIGTERM)
    output = driver.communicate(timeout=200)[0]
    assert driver.returncode in (0, 3), output
    wait_until(lambda: not nodes.actors())

    driver = start(path)
    output = driver.communicate(timeout=400)[0]
    assert driver.returncode == 0, output
    same_bits(path, undisturbed)


def test_ray_starts_on_this_machine_by_itself(tmp_path: Path, undisturbed: Path) -> None:
    """In a process of its own: two clusters in one confuse Ray."""
    code = (
        "import sys; from pathlib import Path; import clustered_run as c\n"
        "from loralab.evolution.trainer import evolve; from loralab.run import Run\n"
        "config = c.config_for(None, actors=2)\n"
        "with Run.create(Path(sys.argv[1]), config.to_dict()) as run:\n"
        "    assert evolve(config, run, c.tell, c.bench).complete\n"
    )
    folder = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "run"],
        env={**os.environ, "PYTHONPATH": folder},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    same_bits(tmp_path / "run", undisturbed)
