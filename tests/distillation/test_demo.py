"""The text of the demonstration."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

import pytest

from vocabdistil.cli import build_parser
from vocabdistil.core.errors import VocabdistilError
from vocabdistil.distillation import demo
from vocabdistil.distillation.demo import demo_text


def test_the_text_depends_on_the_seed_alone():
    code = "from vocabdistil.distillation.demo import demo_text; print('\\n'.join(demo_text(50, 3)))"
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                       env={**os.environ, "PYTHONHASHSEED": seed}).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert runs[0] == runs[1] and runs[0].splitlines() == demo_text(50, 3) != demo_text(50, 4)


def test_the_text_supports_both_vocabularies():
    words = {word.strip(".,").lower() for line in demo_text() for word in line.split()}
    assert len(words) > 800


def test_an_earlier_demo_is_not_overwritten(tmp_path):
    (tmp_path / "teacher").mkdir()
    with pytest.raises(VocabdistilError, match="out: .*teacher exists"):
        demo.demo(tmp_path, quiet=True)


def test_an_interrupted_demo_goes_on(tmp_path, monkeypatch):
    """In the middle of the teacher, then of the student; what is made is not made again."""
    with pytest.raises(VocabdistilError, match="resume: no interrupted run at .*teacher"):
        demo.demo(tmp_path, resume=True, quiet=True)
    made = []

    def train_teacher(out, resume, **options):
        made.append(("teacher", resume))
        if not resume:
            (tmp_path / "teacher.partial").mkdir()
            raise KeyboardInterrupt
        (tmp_path / "teacher.partial").rename(out)

    def distill(config):
        made.append(("student", config.resume))
        if not config.resume:
            (tmp_path / "student.partial").mkdir()
            raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train_teacher", train_teacher)
    monkeypatch.setattr(demo, "distill", distill)
    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            demo.demo(tmp_path, resume=resume, quiet=True)
    demo.demo(tmp_path, resume=True, quiet=True)
    assert made == [("teacher", False), ("teacher", True), ("student", False), ("student", True)]


def test_it_ends_with_a_command_to_go_on_with(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "train_teacher", lambda **options: None)
    monkeypatch.setattr(demo, "distill", lambda config: None)
    demo.demo(tmp_path / "a folder")
    last = capsys.readouterr().out.splitlines()[-1]
    program, *arguments = shlex.split(last.partition(": ")[2])
    args = build_parser().parse_args(arguments)
    assert program == "vocabdistil" and args.command == "trim"
    assert args.text == [tmp_path / "a folder" / "text.txt"] and args.text[0].is_file()
