"""The wings of the package: imports run one way."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import vocabdistil
from vocabdistil.core import dispatch

ROOT = Path(vocabdistil.__file__).parent
# Each may import itself and what stands before it; models and reference do not know each other.
ORDER = ("core", "alignment", "reference", "models", "ops", "evaluation", "distillation")


def wings_of(node: ast.AST, file: Path) -> list[str]:
    if not isinstance(node, ast.ImportFrom):
        return []
    parts = (node.module or "").split(".")
    if node.level:
        inside = file.relative_to(ROOT).parts[: -node.level]
        parts = [*inside, *filter(None, parts)]
    elif parts[0] == "vocabdistil":
        parts = parts[1:]
    else:
        return []
    return parts[:1] or [alias.name for alias in node.names]


@pytest.mark.parametrize("wing", ORDER)
def test_imports_run_one_way(wing):
    allowed = {*ORDER[: ORDER.index(wing) + 1], "_C"} - ({"reference"} if wing == "models" else set())
    files = sorted((ROOT / wing).glob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            assert set(wings_of(node, file)) <= allowed, f"{file}:{node.lineno}"


def test_no_module_stands_beside_the_wings():
    assert {path.stem for path in ROOT.glob("*.py")} == {"__init__", "__main__", "cli"}


def test_kernels_keep_to_what_every_triton_has():
    """3.2 does not know ``triton.knobs``, and looks for the end of a kernel that calls itself forever."""
    files = sorted((ROOT.parent / "triton_kernels").glob("*.py"))
    if not files:
        pytest.skip("triton_kernels is not beside the package")
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.Attribute) and node.attr == "knobs"), f"{file}:{node.lineno}"
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                names = {x.id for x in ast.walk(node) if isinstance(x, ast.Name)}
                assert node.name not in names, f"{file}:{node.lineno}"


def test_the_table_of_what_runs_on_a_gpu_is_that_of_the_code():
    file = Path(__file__).parent.parent / "CONTRIBUTING.md"
    if not file.is_file():
        pytest.skip("CONTRIBUTING.md is not beside the tests")
    text = file.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \| (`.*?) \|", text.split("## What runs on a GPU")[1].split("\n## ")[0], re.M)
    names = re.compile(r"`(\w+)`")
    told = {op: tuple(names.findall(backends)) for ops, backends in rows for op in names.findall(ops)}
    assert told == {op: devices["cuda"] for op, devices in dispatch.TABLE.items()}
