"""The report says what happened, shows model text as text, and opens in a real browser."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from loralab.report import build_report
from loralab.report.page import view_of
from loralab.report.summary import summarise
from loralab.report.text import change, duration, number, share, visible
from loralab.run import Run
from synthetic_run import CONFIG, EVIL, write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SWITCHES = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--enable-logging=stderr",
]  # fmt: skip


class Reader(HTMLParser):
    """Collects tags, attributes and the text outside `<style>`."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._in_style = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        self._in_style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        if not self._in_style:
            self.text += data


@pytest.fixture(scope="module")
def run_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_run(tmp_path_factory.mktemp("report") / "run")
    assert build_report(path) == path / "report.html"
    return path


@pytest.fixture(scope="module")
def page(run_path: Path) -> str:
    return (run_path / "report.html").read_text()


def test_the_page_says_what_happened(page: str) -> None:
    text = Reader(page).text
    for part in (
        "Held-out reward rose from −191.0 to −22.6 in 30 generations.",
        "Correct answers fell from 88 % to 63 %",
        "better on 8, worse on 0 of 8 examples",
        "−183.2 → −25.8",
        "42.6 s",
        "native",
        "What is the capital of France?",
        "Spiders are arachnids",
        "Through time: 5 evaluations",
        "weight_analysis",
        "81.7 %",
        "noise_on: B",
        "max_new_tokens: 48",
        sys.version.split()[0],
        "⏎ × 7",
    ):
        assert part in text, part


def test_figures_are_files_too(run_path: Path) -> None:
    names = {file.name for file in (run_path / "figures").iterdir()}
    assert names == {
        "reward.png", "correctness.png", "generation_time.png", "time_breakdown.png",
        "lost_signal.png", "update_size.png",
    }  # fmt: skip


def test_time_breakdown_is_sorted_and_coloured(run_path: Path) -> None:
    image = imread(run_path / "figures" / "time_breakdown.png")[:, :, :3]

    def widths(colour: str) -> dict[int, int]:
        """Pixels of the colour by row, for rows that hold any."""
        hits = (abs(image - to_rgb(colour)).max(axis=2) < 0.02).sum(axis=1)
        return {row: int(hits[row]) for row in hits.nonzero()[0]}

    coral, blue = widths("coral"), widths("steelblue")
    legend = min(coral)  # the legend lies above the bars
    assert legend in blue
    bars = {row: width for row, width in coral.items() if row > max(coral) * 0.2}
    longest = max(bars, key=lambda row: bars[row])
    assert all(width < bars[longest] / 5 for row, width in bars.items() if row > longest + 60)
    assert max(width for row, width in blue.items() if row > legend + 60) < bars[longest] / 5
    svg = next(c for c in view_of(Run.open(run_path))["charts"] if c.name == "time_breakdown").svg
    for label in ("34.8 s", "2.7 s", "1.9 s", "0.62 s", "0.41 s", "0.09 s", "4 ms"):
        assert label in svg
    heights = [
        float(re.search(rf'y="([\d.]+)"[^>]*>{name}<', svg).group(1))  # type: ignore[union-attr]
        for name in ("evaluation", "create loras", "es update", "loading", "weight analysis")
    ]
    assert heights == sorted(heights)


def assert_harmless(page: str) -> None:
    read = Reader(page)
    assert not read.tags & {"script", "img", "iframe", "object", "embed", "link", "form", "base"}
    assert not [name for name, _ in read.attributes if name.startswith("on")]
    for name, value in read.attributes:
        if name in ("href", "xlink:href", "src"):
            assert (value or "").startswith("#"), (name, value)


def test_text_of_the_model_stays_text(page: str) -> None:
    assert_harmless(page)
    assert EVIL in Reader(page).text
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert policy.group(1).startswith(
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    )
    assert "script-src" not in policy.group(1)
    assert page.index("Content-Security-Policy") < page.index("<style>")


def test_no_field_of_a_run_can_inject(tmp_path: Path) -> None:
    marks = {
        name: f"</style></title></pre></svg>\"'><script>alert('{name}')</script>$x_{{"
        for name in (
            "name", "model", "kernel", "prompt", "gold", "completion", "example", "finding", "key",
            "timing", "phase", "reward", "generation", "train", "failed",
        )
    }  # fmt: skip
    row: dict[str, Any] = {
        "generation": marks["generation"], "phase": "before", "split": "test",
        "example": marks["example"], "prompt": [{"role": marks["prompt"], "content": "x"}, {}],
        "gold": marks["gold"], "completion": marks["completion"], "reward": marks["reward"],
        "correct": None, "failed": marks["failed"],
    }  # fmt: skip
    with Run.create(tmp_path / "run", {"name": marks["name"], "model": marks["model"]}) as run:
        run.note(kernel=marks["kernel"])
        run.log_metrics({"generation": 0, "reward_mean": 1.0, "seconds": 1.0, "failed": 3,
                         "phases": {marks["phase"]: 0.5}})  # fmt: skip
        run.log_completions([row, row | {"split": "train", "completion": marks["train"]}])
        run.log_finding({marks["key"]: marks["finding"]})
        run.write("timings.json", json.dumps({marks["timing"]: {"seconds": 1.0, "calls": 1}}))
    page = build_report(tmp_path / "run").read_text()
    assert_harmless(page)
    text = Reader(page).text
    assert "3 completions could not be generated or scored" in text
    for name in marks:
        if name not in ("example", "phase"):  # not shown; cut to fit the legend
            assert f"alert('{name}')" in text, name


@pytest.mark.parametrize("generations", [0, 1, 2, 7])
def test_an_unfinished_run_has_a_report(tmp_path: Path, generations: int) -> None:
    text = Reader(build_report(write_run(tmp_path / "run", generations)).read_text()).text
    assert f"Unfinished: {generations} of 30 generations so far." in text
    if generations == 0:
        assert "No generation has finished yet." in text
    if generations == 1:
        assert "no second measurement yet" in text


def test_a_long_run_stays_a_page_one_can_open(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", 1000)
    rows = [
        {"generation": g, "phase": "before" if g == 0 else "during", "split": "test",
         "example": f"e{e}", "prompt": "p", "gold": None, "completion": "word " * 800,
         "reward": 0.1, "correct": False}
        for g in range(0, 1000, 50) for e in range(130)
    ]  # fmt: skip
    with Run.resume(path) as run:
        run.log_completions(rows)
    page = build_report(path).read_text()
    assert len(page) < 2_000_000
    text = Reader(page).text
    assert "92 more examples" in text
    assert "38 further examples are in completions.jsonl" in text
    assert "Through time: 3 of 19 evaluations" in text
    assert "Latest, generation 950" in text


def test_a_report_beside_its_writer(tmp_path: Path) -> None:
    with Run.create(tmp_path / "run", CONFIG) as run:
        run.log_metrics({"generation": 0, "reward_mean": math.nan, "held_out_reward": math.inf})
        with (run.path / "metrics.jsonl").open("a") as file:
            file.write('{"generation": 1, "rew')
        assert "NaN" not in build_report(run.path).read_text()


def log(path: Path, *rows: dict[str, Any]) -> Run:
    with Run.create(path, {}) as run:
        for row in rows:
            run.log_metrics({"reward_mean": 0.0} | row)
    return Run.open(path)


@pytest.mark.parametrize(
    ("held_out", "correct", "tone", "words"),
    [
        ((-10, -5), (0.5, 0.5), "good", "rose from −10.00 to −5.00"),
        ((-10, -5), (0.5, 0.25), "mixed", "Correct answers fell from 50 % to 25 %"),
        ((-10, -5), (None, None), "good", "rose"),
        ((-5, -10), (0.5, 0.75), "bad", "fell from −5.00 to −10.00"),
        ((-5, -5), (0.5, 0.5), "bad", "stayed at −5 "),
    ],
)
def test_the_verdict_is_not_kinder_than_the_numbers(
    tmp_path: Path, held_out: tuple[float, float], correct: Any, tone: str, words: str
) -> None:
    rows = [
        {"generation": g, "held_out_reward": held_out[g], "held_out_correct": correct[g]}
        for g in (0, 1)
    ]
    found, text = summarise(log(tmp_path / "run", *rows)).verdict()
    assert found == tone
    assert words in text


@pytest.mark.parametrize(("changes", "chance"), [((9, 11, 10, 10), False), ((40, -9, -8, 3), True)])
def test_a_change_that_may_be_chance_is_called_so(
    tmp_path: Path, changes: tuple[float, ...], chance: bool
) -> None:
    mean = sum(changes) / len(changes)
    with Run.create(tmp_path / "run", {}) as run:
        for generation, reward in ((0, -10.0), (1, -10.0 + mean)):
            run.log_metrics({"generation": generation, "reward_mean": 0, "held_out_reward": reward})
        for place, delta in enumerate(changes):
            row = {"split": "test", "example": str(place), "completion": "x"}
            run.log_completions(
                [
                    row | {"phase": "before", "reward": -10},
                    row | {"phase": "after", "reward": delta - 10},
                ]
            )
    tone, text = summarise(run).verdict()
    assert tone == ("mixed" if chance else "good")
    assert ("That may be chance: better on 2, worse on 2 of 4 examples." in text) == chance


def test_the_kept_adapter_counts_and_a_repeated_generation_counts_once(tmp_path: Path) -> None:
    run = log(
        tmp_path / "run",
        {"generation": 0, "held_out_reward": 0.0, "best_generation": 0},
        {"generation": 1, "held_out_reward": 9.0, "best_generation": 1, "seconds": 1.0},
        {"generation": 1, "held_out_reward": 5.0, "best_generation": 1, "seconds": 3.0},
        {"generation": 2, "held_out_reward": 1.0, "best_generation": 1},
    )
    summary = summarise(run)
    assert summary.held_out.after == 5.0
    assert summary.generations == 3
    assert summary.seconds_per_generation == 3.0
    page = build_report(run.path).read_text()
    assert "The adapter kept is that of generation 1" in page


def test_numbers_read_well() -> None:
    assert [number(x) for x in (-187.26, 3, 0.01234, 123456.7, math.nan, -math.inf, None)] == [
        "−187.3", "3", "0.0123", "123,457", "NaN", "−inf", "–",
    ]  # fmt: skip
    assert change(-191, -22.64) == "−191.0 → −22.6"
    assert change(None, 2) == "– → 2"
    assert [share(x) for x in (0, 0.005, 0.5, 1, None)] == ["0 %", "0.5 %", "50 %", "100 %", "–"]
    assert [duration(x) for x in (0, 0.004, 0.62, 45.23, 99.96, 192, 7500, None)] == [
        "0 s", "4 ms", "0.62 s", "45.2 s", "1 min 40 s", "3 min 12 s", "2 h 05 min", "–",
    ]  # fmt: skip


def test_what_cannot_be_seen_is_shown() -> None:
    assert visible("a\n\n\nb") == "a\n\n\nb"
    assert visible("a" + "\n" * 57) == "a\n⏎ × 57\n"
    assert visible("\x00\u202e\ud800é👩‍🚀") == "\\x00\\u202e\\ud800é👩‍🚀"
    assert visible("x" * 5000, longest=10) == "x" * 10 + "\n… 4,990 more characters"


def test_a_report_needs_no_torch(run_path: Path) -> None:
    code = (
        "import sys; from loralab.report import build_report; build_report(sys.argv[1]);"
        "print([m for m in ('torch', 'transformers', 'matplotlib.pyplot') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, run_path], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def browse(page: Path, profile: Path, *switches: str) -> tuple[str, list[str]]:
    """Open a page; its DOM after scripts had their chance, and what the console said."""
    done = subprocess.run(
        [str(CHROMIUM), *SWITCHES, f"--user-data-dir={profile}", *switches, page.as_uri()],
        capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def evil_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Had the text run, the document's title would tell."""
    evil = EVIL.replace("alert(1)", "document.title='ran';console.log('ran')")
    return build_report(write_run(tmp_path_factory.mktemp("evil") / "run", evil=evil))


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
class TestInChromium:
    def test_the_script_stays_text(self, evil_page: Path, tmp_path: Path) -> None:
        dom, console = browse(evil_page, tmp_path, "--dump-dom")
        assert console == []
        assert "<title>conciseness · loralab</title>" in dom
        assert html.escape("<script>document.title=", quote=False) in dom
        assert "<script" not in dom
        assert dom.count("<svg") == 6

    def test_without_escaping_the_policy_still_holds_and_the_console_tells(
        self, evil_page: Path, tmp_path: Path
    ) -> None:
        broken = tmp_path / "broken.html"
        broken.write_text(html.unescape(evil_page.read_text()))
        dom, console = browse(broken, tmp_path / "profile", "--dump-dom")
        assert "<script>document.title" in dom
        assert "<title>conciseness · loralab</title>" in dom  # it did not run
        assert any("Content Security Policy" in line for line in console)

    @pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "light"), (1200, "dark")])
    def test_it_looks_like_a_page(
        self, run_path: Path, tmp_path: Path, width: int, scheme: str
    ) -> None:
        shot = tmp_path / "shot.png"
        dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
        _, console = browse(
            run_path / "report.html", tmp_path / "profile", f"--screenshot={shot}",
            f"--window-size={width},1500", *dark,
        )  # fmt: skip
        assert console == []
        image = imread(shot)[:, :, :3]
        assert image.shape[:2] == (1500, width)
        assert (image[5, 5].mean() < 0.2) == (scheme == "dark")
        # Charts, cards and words: a blank or unstyled page has far fewer colours.
        assert (
            len({tuple(pixel) for pixel in (image[::3, ::3] * 255).astype(int).reshape(-1, 3)}) > 60
        )
        # Nothing sticks out at the right, on a phone either.
        assert (image[:, -6:] == image[0, 0]).all()
