"""The stub of the compiled module says what is there, and no more."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import vocabdistil
from vocabdistil.core import native

STUB = Path(vocabdistil.__file__).with_name("_C.pyi")


def public(names) -> set[str]:
    return {name for name in names if not name.startswith("_")}


def arguments(function: ast.FunctionDef) -> int:
    return len(function.args.posonlyargs) + len(function.args.args)


def counted(doc: str) -> int:
    """How many arguments the first line of what the module writes about a function names."""
    line = doc.splitlines()[0]
    return len(re.findall(r"\b(?:arg\d+|self)\b", line))


def test_the_stub_and_the_module_agree():
    module = native.module()
    tree = ast.parse(STUB.read_text(encoding="utf-8"))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    values = {node.target.id for node in tree.body if isinstance(node, ast.AnnAssign)}
    there = {*functions, *classes, *public(values)}
    if not module.cuda_compiler:
        there -= {name for name in functions if name.startswith("cuda_")}
    assert public(dir(module)) == there
    for name in there & functions.keys():
        assert arguments(functions[name]) == counted(getattr(module, name).__doc__), name
    for name, node in classes.items():
        members = {part.name: part for part in node.body if isinstance(part, ast.FunctionDef)}
        built = vars(getattr(module, name))
        assert public(built) == public(members), name
        for member, part in members.items():
            if member in built and not part.decorator_list:
                assert arguments(part) == counted(built[member].__doc__), f"{name}.{member}"
