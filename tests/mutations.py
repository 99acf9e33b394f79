"""Small wrong changes of a program, to see whether graders tell them from the right one."""

from __future__ import annotations

import ast
import random
import warnings

_SWAPPED: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.And: ast.Or, ast.Or: ast.And,
    ast.Is: ast.IsNot, ast.In: ast.NotIn,
}  # fmt: skip


def mutants(program: str, name: str, seed: int, count: int) -> dict[str, str]:
    """Up to `count` programs, each with one change inside the function `name`, by what it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of regular expressions that are not spelled raw
        return _mutants(program, name, seed, count)


def _mutants(program: str, name: str, seed: int, count: int) -> dict[str, str]:
    places: list[tuple[str, int]] = []
    function = _function(ast.parse(program), name)
    for number, node in enumerate(ast.walk(function)):
        places += [(kind, number) for kind in _kinds(node)]
    chosen = random.Random(seed).sample(places, min(count, len(places)))
    made = {}
    for kind, number in chosen:
        tree = ast.parse(program)
        node = list(ast.walk(_function(tree, name)))[number]
        _change(node, kind)
        made[f"{kind} at line {getattr(node, 'lineno', 0)}"] = ast.unparse(
            ast.fix_missing_locations(tree)
        )
    return made


def _function(tree: ast.Module, name: str) -> ast.AST:
    found = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name]
    return found[-1]


def _kinds(node: ast.AST) -> list[str]:
    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp):
        return ["wrong operator"] if type(node.op) in _SWAPPED else []
    if isinstance(node, ast.Compare):
        return ["wrong comparison"] if type(node.ops[0]) in _SWAPPED else []
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return ["off by one"]
    if isinstance(node, ast.Return) and node.value is not None:
        return ["returns None", "returns a tuple"]
    if isinstance(node, ast.If | ast.While):
        return ["condition turned round"]
    return []


def _change(node: ast.AST, kind: str) -> None:
    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp):
        node.op = _SWAPPED[type(node.op)]()
    elif isinstance(node, ast.Compare):
        node.ops[0] = _SWAPPED[type(node.ops[0])]()
    elif isinstance(node, ast.Constant):
        node.value += 1
    elif isinstance(node, ast.Return):
        value = node.value
        assert value is not None
        node.value = (
            ast.Constant(None) if kind == "returns None" else ast.Tuple([value], ast.Load())
        )
    elif isinstance(node, ast.If | ast.While):
        node.test = ast.UnaryOp(ast.Not(), node.test)
