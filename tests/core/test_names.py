"""Short names of models."""

from __future__ import annotations

from pathlib import Path

import pytest

from vocabdistil.core.names import display_names


@pytest.mark.parametrize(
    ("names", "want"),
    [
        (["/a/teacher", "/a/student"], ["teacher", "student"]),
        (["/a/x/student", "/a/y/student"], ["x/student", "y/student"]),
        (["/a/x/student", "/b/x/student", "other"], ["a/x/student", "b/x/student", "other"]),
        (["student", "/a/student"], ["student", "a/student"]),
        (["/student", "/a/student"], ["/student", "a/student"]),
        (["x/model", "y"], ["x/model", "y"]),
        (["runs/checkpoint-500", "runs/final"], ["runs/checkpoint-500", "runs/final"]),
        (["model"], ["model"]),
        (["intfloat/multilingual-e5-small"], ["multilingual-e5-small"]),
        (["/a/b", "/a/b", "/a/b/"], ["b", "b", "b"]),
        (["a new vocabulary of 8,000", ""], ["a new vocabulary of 8,000", ""]),
        ([], []),
    ],
)
def test_names_are_short_and_differ_as_the_paths_do(names, want):
    assert display_names(names) == want


def test_the_folder_that_one_is_in(tmp_path: Path, monkeypatch):
    (tmp_path / "student").mkdir()
    monkeypatch.chdir(tmp_path / "student")
    assert display_names([".", ".."]) == ["student", tmp_path.name]
