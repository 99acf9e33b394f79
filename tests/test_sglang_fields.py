"""The kept fields of SGLang's server are those of its wheel, where a wheel is at hand.

pip download sglang==0.5.23 --no-deps --dest /tmp/wheels
LORALAB_SGLANG_WHEEL=/tmp/wheels/sglang-0.5.23-....whl pytest tests/test_sglang_fields.py
"""

from __future__ import annotations

import ast
import json
import os
import zipfile
from pathlib import Path

import pytest

import sglang_fields


def test_the_kept_fields_are_the_wheels() -> None:
    wheel = os.environ.get("LORALAB_SGLANG_WHEEL")
    if not wheel:
        pytest.skip("LORALAB_SGLANG_WHEEL names no wheel")
    assert json.loads(sglang_fields.KEPT.read_text()) == sglang_fields.read(Path(wheel))


def routes_of(source: str) -> set[str]:
    """What the client's calls ask: `post("x")`, `_facts("x")`, `_change(client, "x")`, and `get`
    of a client."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        made = node.func.value
        of_client = isinstance(made, ast.Call) and ast.unparse(made.func) == "JsonClient"
        if node.func.attr in ("post", "_facts", "_change") or (
            node.func.attr == "get" and of_client
        ):
            words = [a.value for a in node.args if isinstance(a, ast.Constant)]
            found |= {f"/{word}" for word in words if isinstance(word, str)}
    return found


def test_every_route_that_the_client_asks_is_kept() -> None:
    kept = json.loads(sglang_fields.KEPT.read_text())
    engines = Path(sglang_fields.__file__).parents[1] / "src/loralab/engines"
    sources = [(engines / name).read_text() for name in ("sglang.py", "sglang_link.py")]
    asked = set().union(*map(routes_of, sources))
    assert asked == set(kept["routes"]) == set(sglang_fields.ROUTES)
    assert not any("from_tensors" in source for source in sources)


def test_fields_routes_and_options_are_read_from_source(tmp_path: Path) -> None:
    server = """
@app.get("/health")
async def health(): ...
@app.api_route("/load_lora_adapter", methods=["POST"])
@auth_level(AuthLevel.ADMIN_OPTIONAL)
async def load(): ...
@app.get("/model_info")
async def model_info():
    return {"model_path": 1}
@app.get("/server_info")
async def server_info():
    return {"version": 1}
"""
    wheel = tmp_path / "sglang-9.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("sglang-9.dist-info/METADATA", "Name: sglang\nVersion: 9\n")
        archive.writestr(sglang_fields.SERVER, server)
        archive.writestr(
            f"{sglang_fields.OPTIONS}a.py", "class A:\n    port: int = 1\n    _NS = 2\n"
        )
        for path, names in sglang_fields.TYPES.items():
            classes = "".join(f"class {n}(Base):\n    must: int\n    may: int = 1\n" for n in names)
            archive.writestr(path, f"class Base:\n    rid: str = ''\n{classes}")
    found = sglang_fields.read(wheel)
    assert found["version"] == "9"
    assert found["types"]["GenerateReqInput"] == {"rid": False, "must": True, "may": False}
    assert found["routes"] == {
        "/health": {"methods": ["GET"], "auth": "NORMAL"},
        "/load_lora_adapter": {"methods": ["POST"], "auth": "ADMIN_OPTIONAL"},
        "/model_info": {"methods": ["GET"], "auth": "NORMAL"},
        "/server_info": {"methods": ["GET"], "auth": "NORMAL"},
    }
    assert (found["model_info"], found["options"]) == (["model_path"], ["port"])
