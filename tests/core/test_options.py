"""The table of options: Python and the command line have the same ones, and each of them is checked."""

from __future__ import annotations

import argparse
import inspect
import subprocess
import sys
from dataclasses import dataclass, fields
from typing import Annotated

import pytest

import vocabdistil as vd
from vocabdistil import cli
from vocabdistil.core.errors import VocabdistilError, on_command_line, spell
from vocabdistil.core.options import Choice, Flag, Option, Real, Whole, add_options, check_options, flags_of, options_of
from vocabdistil.distillation.demo import demo
from vocabdistil.distillation.options import DemoOptions
from vocabdistil.evaluation.options import EvaluateOptions


@dataclass
class Example:
    size: Annotated[int | None, Option(Whole(above=2), "how large")] = None
    share: Annotated[float, Option(Real("a share", high=1), "how much, 50% say")] = 0.5
    kind: Annotated[str, Option(Choice(names=("one", "other")), "which")] = "one"
    fit: Annotated[bool, Option(Flag(), "leave it")] = True
    own: Annotated[list[int] | None, Option(Whole(), "some", "--mine", several=True)] = None
    kept: int = 5


def read(*words: str) -> Example:
    parser = argparse.ArgumentParser()
    add_options(parser, Example)
    return Example(**vars(parser.parse_args(words)))


def test_words_become_values():
    assert read() == Example()
    given = read("--size", "7", "--share=0.25", "--kind", "other", "--no-fit", "--mine", "1", "2", "--mine", "3")
    assert given == Example(7, 0.25, "other", False, [1, 2, 3])
    check_options(given)


@pytest.mark.parametrize(
    ("words", "values", "told"),
    [
        (["--size=x"], {"size": "x"}, "size: expected a whole number, got 'x'"),
        (["--size=2"], {"size": 2}, "size: expected a number above 2, got 2"),
        (["--share=1"], {"share": 1.0}, "share: expected a share, got 1.0"),
        (["--share="], {"share": ""}, "share: expected a share, got ''"),
        (["--kind=both"], {"kind": "both"}, "kind: expected one or other, got 'both'"),
        (["--mine", "1", "0"], {"own": [1, 0]}, "own: expected a number above 0, got 0"),
    ],
)
def test_one_check_refuses_both(words, values, told):
    for example in (Example(**values), read(*words)):
        with pytest.raises(VocabdistilError) as caught:
            check_options(example)
        assert str(caught.value) == told


def test_names_are_spelled_as_their_users_write_them():
    assert (spell("fit", False), spell("own", 3), spell("kept_ones")) == ("fit=False", "own=3", "kept_ones")
    with on_command_line(flags_of(Example)):
        assert (spell("fit", False), spell("own", 3), spell("kept_ones")) == ("--no-fit", "--mine 3", "--kept-ones")
    assert spell("fit") == "fit"


def test_the_help_tells_defaults():
    parser = argparse.ArgumentParser()
    add_options(parser, Example)
    text = " ".join(parser.format_help().split())
    assert "how much, 50% say (default 0.5)" in text and "how large --share" in text and "--kept" not in text


@pytest.mark.parametrize("name", cli._COMMANDS)
def test_every_field_of_a_command_is_an_option(name):
    kind = cli._COMMANDS[name].options
    assert [field.name for field in fields(kind)] == list(options_of(kind))
    flags = list(flags_of(kind).values())
    assert len(set(flags)) == len(flags) and all(option.help for _, option in options_of(kind).values())


@pytest.mark.parametrize(("call", "options"), [(vd.evaluate, EvaluateOptions), (demo, DemoOptions)])
def test_functions_take_the_options_of_their_commands(call, options):
    taken = {name: value.default for name, value in inspect.signature(call).parameters.items()}
    for name, (field, _) in options_of(options).items():
        assert name in taken
        if name not in ("models", "pairs", "labels"):
            assert taken[name] == (False if name == "overwrite" else field.default) or name == "out"


def test_options_are_checked_before_what_takes_long_to_import():
    code = """
import sys
from vocabdistil.cli import main
assert main(["distill", "--help"]) == 0
assert main(["--version"]) == 0
assert main(["trim", "--teacher", "none/there/x", "--text", __file__, "--out", "o", "--dim", "0"]) == 2
assert main(["trim", "--teacher", "./none", "--text", sys.executable, "--out", "o"]) == 2
assert main(["evaluate", "--model", "./none", "--pairs", "x.csv"]) == 2
assert not {"torch", "transformers", "numpy"} & set(sys.modules), sorted(sys.modules)
import vocabdistil as vd
assert {"span_loss", "trim", "loyalty", "students", "DistillConfig"} <= set(dir(vd)) and "torch" not in sys.modules
"""
    code = code.replace("__file__", "sys.executable")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_every_public_name_is_there():
    assert {name for name in vd.__all__ if not hasattr(vd, name)} == set()
    assert set(vd.__all__) <= set(dir(vd))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        vd.nothing  # noqa: B018


def test_a_name_may_be_used_first_in_a_compiled_function():
    code = """
import torch
import vocabdistil as vd

@torch.compile(fullgraph=True, backend="eager")
def loss(student, teacher):
    return vd.matched_kl(student, teacher, matched)

matched = vd.MatchedVocab(torch.arange(4), torch.arange(4))
assert "matched_kl" not in vars(vd)
print(float(loss(torch.ones(2, 5), torch.eye(2, 5))))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
