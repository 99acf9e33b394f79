"""Reads from an sglang wheel what its HTTP server takes and gives: `python sglang_fields.py WHEEL`.

Nothing of the wheel is imported: its source is parsed. The result, with the version it is from, is
kept in `sglang_fields.json`, against which the tests' server checks every request and answer.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KEPT = Path(__file__).with_name("sglang_fields.json")

TYPES = {
    "sglang/srt/managers/io_struct.py": (
        "GenerateReqInput",
        "LoadLoRAAdapterReqInput",
        "UnloadLoRAAdapterReqInput",
        "LoRAUpdateOutput",
    ),
    "sglang/api/v1/api_types.py": (
        "SamplingParams",
        "GenerateRequest",
        "GenerateResponse",
        "GenerateMetaInfo",
        "FinishStop",
        "FinishLength",
        "FinishAbort",
    ),
    "sglang/srt/entrypoints/openai/protocol.py": ("ModelCard", "ModelList"),
}
ROUTES = (
    "/health",
    "/model_info",
    "/server_info",
    "/generate",
    "/load_lora_adapter",
    "/unload_lora_adapter",
    "/v1/models",
)
SERVER = "sglang/srt/entrypoints/http_server.py"
OPTIONS = "sglang/srt/arg_groups/fields/"


def fields_of(tree: ast.Module, name: str) -> dict[str, bool]:
    """Annotated fields of a class and its bases in the file; whether each must be given."""
    classes = {n.name: n for n in tree.body if isinstance(n, ast.ClassDef)}
    found = classes[name]
    above: dict[str, bool] = {}
    for base in map(ast.unparse, found.bases):
        if base in classes:
            above |= fields_of(tree, base)
    return above | {
        node.target.id: node.value is None
        for node in found.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def functions(tree: ast.Module) -> Iterator[ast.AsyncFunctionDef | ast.FunctionDef]:
    yield from (n for n in tree.body if isinstance(n, ast.AsyncFunctionDef | ast.FunctionDef))


def routes(tree: ast.Module) -> dict[str, dict[str, Any]]:
    """Methods and the auth level of each route that the client asks."""
    found: dict[str, dict[str, Any]] = {}
    for function in functions(tree):
        paths, level = [], "NORMAL"
        for call in function.decorator_list:
            if not isinstance(call, ast.Call):
                continue
            written = ast.unparse(call.func)
            if written == "auth_level":
                level = ast.unparse(call.args[0]).rpartition(".")[2]
            elif written.startswith("app.") and isinstance(call.args[0], ast.Constant):
                given = {k.arg: k.value for k in call.keywords}
                verb = written.removeprefix("app.").upper()
                methods = ast.literal_eval(given["methods"]) if "methods" in given else [verb]
                paths.append((call.args[0].value, methods))
        for path, methods in paths:
            if path in ROUTES:
                found[path] = {"methods": methods, "auth": level}
    return found


def keys_of_dicts(tree: ast.Module, function: str) -> list[str]:
    """Literal keys of the dicts that a function builds."""
    [body] = [f for f in functions(tree) if f.name == function]
    return sorted(
        key.value
        for node in ast.walk(body)
        if isinstance(node, ast.Dict)
        for key in node.keys
        if isinstance(key, ast.Constant)
    )


def options(tree: ast.Module) -> list[str]:
    """Names of a group's server options."""
    return [
        node.target.id
        for group in tree.body
        if isinstance(group, ast.ClassDef)
        for node in group.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        if not node.target.id.startswith("_")
    ]


def read(wheel: Path) -> dict[str, Any]:
    """Everything the tests check, from a wheel."""
    with zipfile.ZipFile(wheel) as archive:

        def tree(path: str) -> ast.Module:
            return ast.parse(archive.read(path).decode())

        [described] = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        [version] = re.findall(r"^Version: (\S+)", archive.read(described).decode(), re.MULTILINE)
        server = tree(SERVER)
        groups = [n for n in archive.namelist() if n.startswith(OPTIONS) and n.endswith(".py")]
        return {
            "version": version,
            "types": {
                name: fields_of(tree(path), name) for path, names in TYPES.items() for name in names
            },
            "routes": routes(server),
            "model_info": keys_of_dicts(server, "model_info"),
            "server_info": keys_of_dicts(server, "server_info"),
            "options": sorted(name for path in groups for name in options(tree(path))),
        }


if __name__ == "__main__":
    KEPT.write_text(json.dumps(read(Path(sys.argv[1])), sort_keys=True) + "\n")
