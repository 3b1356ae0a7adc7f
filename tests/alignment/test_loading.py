"""Models by their names, where the hub cannot be reached."""

from __future__ import annotations

import shutil

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import get_session

import vocabdistil as vd
from tests.models.tiny_teachers import tiny_teacher
from vocabdistil.cli import main
from vocabdistil.core.errors import VocabdistilError
from vocabdistil.evaluation.student import load_embedder


@pytest.fixture
def unreachable(tmp_path, monkeypatch):
    """A cache with one model, and a hub that refuses connections; gives how often it was asked."""
    asked = []

    def head(*args, **kwargs):
        asked.append(args)
        raise OSError("refused")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(type(get_session()), "head", head)
    kept = tmp_path / "cache" / "models--some--model"
    revision = "0" * 40
    shutil.copytree(tiny_teacher("bert"), kept / "snapshots" / revision)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(revision)
    return asked


@pytest.mark.parametrize("name", ["no-such-model", "nobody/no-such-model", "no such: model"])
def test_a_name_that_nobody_has_is_told_at_once(unreachable, tmp_path, name):
    with pytest.raises(VocabdistilError) as caught:
        vd.align(["a text"], name, tiny_teacher("bert"))
    told = f"teacher: cannot load {name}: no such folder, not in the local cache ({tmp_path / 'cache'}), "
    assert str(caught.value) == told + "and https://hub.invalid cannot be reached"
    assert len(unreachable) == 1


def test_every_command_tells_it(unreachable, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("a text\n")
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("one,two,1\nthree,four,2\nfive,six,0\n")
    for command in (
        ["trim", "--teacher", "nobody/none", "--text", str(text), "--out", str(tmp_path / "out")],
        ["distill", "--teacher", "some/model", "--student", "nobody/none", "--text", str(text), "--out", f"{text}.out"],
        ["coverage", "--teacher", "some/model", "--student", "nobody/none", "--show", "a"],
        ["loyalty", "--teacher", "nobody/none", "--student", "some/model", "--text", str(text)],
        ["evaluate", "--model", "some/model", "nobody/none", "--pairs", str(pairs)],
        ["bench", "nobody/none", "--text", str(text)],
    ):
        assert main(command) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and "cannot load nobody/none: no such folder, not in the local cache" in told


def test_what_is_in_the_cache_is_taken_from_there(unreachable):
    batch = vd.align(["Olga walks home."], "some/model", tiny_teacher("bert"))
    assert len(batch.pairs) > 0
    assert load_embedder("some/model").model.name == "some/model"


def test_a_hub_that_answers_is_asked_for_the_model(unreachable, monkeypatch):
    from vocabdistil.alignment.loading import check_source

    monkeypatch.setattr(type(get_session()), "head", lambda *args, **kwargs: None)
    assert check_source("nobody/none", "teacher") == "nobody/none"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(type(get_session()), "head", lambda *args, **kwargs: pytest.fail("asked"))
    assert "models--some--model" in check_source("some/model", "teacher")
    with pytest.raises(VocabdistilError, match="teacher: cannot load nobody/none: .* must not be asked"):
        check_source("nobody/none", "teacher")
