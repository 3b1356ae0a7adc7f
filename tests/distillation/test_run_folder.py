"""The folder of a run: who may write it, what a checkpoint is, what a full disk and a killed process leave."""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import vocabdistil as vd
from tests.runs import at_step, interrupt
from vocabdistil.core.errors import VocabdistilError
from vocabdistil.distillation.demo import demo
from vocabdistil.distillation.run_folder import RunFolder, is_whole, last_checkpoint
from vocabdistil.distillation.runs import Interrupted

SMALL = {"vocab_size": 300, "layers": 1, "dim": 16, "heads": 2, "max_length": 24, "steps": 8, "batch_size": 8}


def teach(text_file, out, **changes):
    return vd.train_teacher(text=text_file, out=out, **{**SMALL, "save_every": 2, "quiet": True, **changes})


@pytest.fixture(scope="module")
def whole(text_file, tmp_path_factory):
    return load_file(teach(text_file, tmp_path_factory.mktemp("whole") / "teacher") / "model.safetensors")


def assert_same(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def stopped(text_file, out, monkeypatch, step=5, action=interrupt, error=Interrupted, **changes):
    with monkeypatch.context() as patch:
        at_step(patch, step, action)
        with pytest.raises(error) as caught:
            teach(text_file, out, **changes)
    return str(caught.value)


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(text_file, tmp_path, monkeypatch, whole):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, old[1]))

    try:
        told = stopped(text_file, tmp_path / "t", monkeypatch, action=fill, error=VocabdistilError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert told.startswith("out: cannot write ") and "\n" not in told
    assert last_checkpoint(tmp_path / "t.partial").name == "checkpoint-4"
    assert_same(teach(text_file, tmp_path / "t", resume=True), whole)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json", "whole.json"])
@pytest.mark.parametrize("cut", ["shorter", "missing"])
def test_a_checkpoint_that_was_cut_is_not_taken(name, cut, text_file, tmp_path, monkeypatch, whole):
    stopped(text_file, tmp_path / "t", monkeypatch, step=5)
    file = last_checkpoint(tmp_path / "t.partial") / name
    assert file.parent.name == "checkpoint-6"
    if cut == "missing":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size // 2)
    assert last_checkpoint(tmp_path / "t.partial").name == "checkpoint-4"
    # Stopped again before the step of the one that was cut: of those two one is whole.
    stopped(text_file, tmp_path / "t", monkeypatch, step=4, resume=True)
    kept = {path.name for path in (tmp_path / "t.partial").glob("checkpoint-*") if is_whole(path)}
    assert kept == {"checkpoint-4", "checkpoint-5"}
    assert_same(teach(text_file, tmp_path / "t", resume=True), whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_save_a_checkpoint(number, text_file, tmp_path, monkeypatch, whole):
    told = stopped(text_file, tmp_path / "t", monkeypatch, action=lambda: os.kill(os.getpid(), number))
    assert "interrupted at step 6 of 8" in told
    assert_same(teach(text_file, tmp_path / "t", resume=True), whole)


def test_a_hang_up_that_is_ignored_stays_ignored(text_file, tmp_path, monkeypatch, whole):
    """As nohup has it."""
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGHUP))
        assert_same(teach(text_file, tmp_path / "t"), whole)
    finally:
        signal.signal(signal.SIGHUP, old)


def test_a_second_run_says_who_holds_the_folder(text_file, tmp_path, monkeypatch, whole):
    told = []

    def second():
        for changes in ({}, {"overwrite": True}, {"resume": True}):
            with pytest.raises(VocabdistilError) as caught:
                teach(text_file, tmp_path / "t", **changes)
            told.append(str(caught.value))

    at_step(monkeypatch, 3, second)
    assert_same(teach(text_file, tmp_path / "t"), whole)
    assert len(told) == 3
    assert all(f"is being written by process {os.getpid()} on " in line for line in told)


def test_a_run_that_was_killed_at_its_beginning_is_continued(text_file, tmp_path, monkeypatch, whole):
    @contextmanager
    def killed(folder):
        folder._lock.release()  # as the system does
        raise SystemExit
        yield

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "held", killed)
        with pytest.raises(SystemExit):
            teach(text_file, tmp_path / "t")
    assert_same(teach(text_file, tmp_path / "t", resume=True), whole)


def test_a_run_of_another_version_is_not_continued(text_file, tmp_path, monkeypatch):
    stopped(text_file, tmp_path / "t", monkeypatch)
    file = tmp_path / "t.partial" / "run.json"
    file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != "format"}))
    with pytest.raises(VocabdistilError, match="resume: .* holds a run of another version"):
        teach(text_file, tmp_path / "t", resume=True)


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def _of_the_user(out: Path) -> None:
    out.mkdir()
    (out / "thesis.txt").write_text("mine")


def _beside(out: Path) -> None:
    _of_the_user(out.with_name(out.name + ".partial"))


def _file(out: Path) -> None:
    out.write_text("mine")


def _link(out: Path) -> None:
    out.with_name("elsewhere").mkdir()
    out.symlink_to("elsewhere")


def _dangling(out: Path) -> None:
    out.symlink_to("elsewhere")


def _linked_beside(out: Path) -> None:
    out.with_name("elsewhere").mkdir()
    out.with_name(out.name + ".partial").symlink_to("elsewhere")


@pytest.mark.parametrize("make", [_of_the_user, _beside, _file, _link, _dangling, _linked_beside])
def test_what_no_run_wrote_is_not_replaced(make, text_file, tmp_path):
    make(tmp_path / "t")
    before = contents(tmp_path)
    with pytest.raises(VocabdistilError, match="out: "):
        teach(text_file, tmp_path / "t", overwrite=True)
    assert contents(tmp_path) == before
    assert all(path.is_symlink() == (make in (_link, _dangling)) for path in [tmp_path / "t"])


def test_what_a_run_wrote_is_replaced_until_something_else_is_beside_it(text_file, tmp_path, capsys, whole):
    out = tmp_path / "t"
    out.mkdir()
    teach(text_file, out, steps=1, overwrite=True)
    teach(text_file, out, overwrite=True, quiet=False)
    assert f"The teacher is in {out}, in place of what was there" in capsys.readouterr().out
    assert_same(out, whole)
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(VocabdistilError, match="out: .* holds thesis.txt, which no run wrote there"):
        teach(text_file, out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["t"] and (out / "thesis.txt").exists()


def test_a_folder_that_cannot_be_published_leaves_the_one_before(text_file, tmp_path, monkeypatch, whole):
    teach(text_file, tmp_path / "t")
    rename = os.rename

    def refuse(source, target):
        if Path(source).name == "final":
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="no"):
        teach(text_file, tmp_path / "t", steps=1, overwrite=True)
    assert_same(tmp_path / "t", whole)


@pytest.mark.parametrize("mask", [0o022, 0o002])
def test_files_have_the_permissions_of_new_ones(mask, text_file, tmp_path):
    old = os.umask(mask)
    try:
        out = teach(text_file, tmp_path / "t", steps=1)
        trimmed = vd.trim(teacher=out, text=text_file, out=tmp_path / "s", vocab_size=200, time_length=8, quiet=True)
    finally:
        os.umask(old)
    files = [path for folder in (out, trimmed.path) for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 8 and {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~mask}


def test_the_demo_overwrites_nothing_of_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(VocabdistilError, match="out: expected the name of a folder, got file, which is a file"):
        demo("file", quiet=True)
    with pytest.raises(VocabdistilError, match="out: expected the name of a folder, got nothing"):
        demo("", quiet=True)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "text.txt").write_text("mine")
    with pytest.raises(VocabdistilError, match="out: .*text.txt is not the text of this demo"):
        demo("d", overwrite=True, quiet=True)
    (tmp_path / "d" / "text.txt").unlink()
    (tmp_path / "d" / "student").mkdir()
    (tmp_path / "d" / "student" / "thesis.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(VocabdistilError, match="out: .*student holds thesis.txt"):
        demo("d", overwrite=True, quiet=True)
    with pytest.raises(VocabdistilError, match="seed: "):
        demo("d", seed=-1, quiet=True)
    assert contents(tmp_path) == before
