"""PEFT's own behaviour tests, run on our adapter types by PEFT's own test classes.

The sources come from the index that pip is set up with, in the installed version; or set
LORALAB_PEFT_SDIST to an unpacked one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from importlib.metadata import version
from pathlib import Path

import pytest

ROWS = """
import sys
import types

try:
    import diffusers
except ImportError:  # imported by PEFT's helpers, used by none of the tests run here
    stub = types.ModuleType("diffusers")
    stub.StableDiffusionPipeline = object
    sys.modules["diffusers"] = stub

from loralab.adapters import LSLoraConfig, SineLoraConfig
from tests import test_custom_models as suite

KINDS = {
    "activation": (LSLoraConfig, {}),
    "weight": (LSLoraConfig, {"space": "weight"}),
    "sine": (SineLoraConfig, {"sinelora_frequency": 2.0}),
}
LAYOUTS = {
    "mlp": ("MLP", {"target_modules": "lin0"}),
    "two": ("MLP", {"target_modules": ["lin0", "lin1"], "lora_alpha": 1}),
    "conv1d": ("EmbConv1D", {"target_modules": ["conv1d"]}),
    "options": (
        "MLP",
        {
            "target_modules": ["lin0"],
            "modules_to_save": ["lin1"],
            "use_rslora": True,
            "lora_dropout": 0.1,
            "rank_pattern": {"lin0": 3},
            "alpha_pattern": {"lin0": 0.1},
        },
    ),
}
SPLINES = {
    "gated": {"gated": True},
    "clamp": {"boundary": "clamp", "num_knots": 7, "k_max": 2.0},
    "soft": {"interpolation_method": "soft", "output_scale_init": 0.1},
}
rows = [
    (f"loralab {kind} {layout}", model, config, {**options, **more})
    for kind, (config, more) in KINDS.items()
    for layout, (model, options) in LAYOUTS.items()
]
rows += [
    (f"loralab {kind} {name}", "MLP", LSLoraConfig, {"target_modules": ["lin0"], **more, **spline})
    for kind, (config, more) in KINDS.items()
    if config is LSLoraConfig
    for name, spline in SPLINES.items()
]
# In place: the suite's decorators hold this very list.
suite.TEST_CASES[:] = rows
# The suite knows LoRA's name for this option by LoraConfig itself, not by its subclasses.
suite.set_init_weights_false = lambda kind, options: {**options, "init_lora_weights": False}

from tests.test_custom_models import TestPeftCustomModel, TestPeftFsdpStateDict
"""

MERGES = {
    "test_merge_layers",
    "test_merge_layers_fp16",
    "test_merge_layers_is_idempotent",
    "test_merge_layers_is_deterministic_in_train_mode",
    "test_safe_merge",
    "test_disable_adapters_with_merging",
    "test_delete_merged_adapter_raises_without_mutation",
    "test_delete_merged_adapter_only_rejects_the_merged_one",
    # These four cast the model, run it, and merge it in the end.
    "test_forward_float16",
    "test_forward_bfloat16",
    "test_forward_float16_no_autocast",
    "test_forward_bfloat16_no_autocast",
}
"""Fail for "loralab activation ..." rows and must: a spline on activations cannot be merged."""


@pytest.fixture(scope="module")
def sources(request: pytest.FixtureRequest) -> Path:
    """The folder of PEFT's source distribution that holds `tests`."""
    if named := os.environ.get("LORALAB_PEFT_SDIST"):
        if not (Path(named) / "tests" / "test_custom_models.py").exists():
            pytest.fail(
                f"LORALAB_PEFT_SDIST is {named}, which holds no tests/test_custom_models.py"
            )
        return Path(named)
    release = f"peft-{version('peft')}"
    cache: Path = request.config.cache.mkdir("peft-sdist")  # type: ignore[union-attr]
    if not (cache / release / "tests").exists():
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
        wanted = [release.replace("-", "=="), "--no-build-isolation", "--dest", str(cache)]
        fetched = subprocess.run([*pip, *wanted], capture_output=True, text=True)
        archives = list(cache.glob(f"{release}.tar.gz"))
        if not archives:
            pytest.skip(f"cannot fetch the sources of {release}: {fetched.stderr.strip()[-200:]}")
        with tarfile.open(archives[0]) as archive:
            archive.extractall(cache, filter="data")
    return cache / release


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_pefts_own_tests_pass(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "test_rows.py").write_text(ROWS)
    environment = {**os.environ, "PYTHONPATH": str(sources), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-k", "loralab", "-p", "no:cacheprovider"]
    command += ["--tb=line", "--junitxml=report.xml", "test_rows.py"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (tmp_path / "report.xml").exists(), ran.stdout[-3000:] + ran.stderr[-3000:]

    wrong, passed, refused = [], 0, 0
    for case in ElementTree.parse(tmp_path / "report.xml").iter("testcase"):
        name = case.attrib["name"]
        failure = case.find("failure") if case.find("error") is None else case.find("error")
        message = "" if failure is None else failure.attrib.get("message", "")
        if name.partition("[")[0] in MERGES and "loralab activation" in name:
            refused += 1
            if "cannot be merged: its spline acts on activations" not in message:
                wrong.append(f"{name}: expected the refusal to merge, got {message or 'a pass'}")
        elif failure is not None:
            wrong.append(f"{name}: {message}")
        else:
            passed += case.find("skipped") is None
    assert not wrong, "\n".join(wrong)
    # As many as there were in PEFT 0.21.2, so that an empty run is not a pass.
    assert passed > 800
    assert refused == 7 * len(MERGES)
