"""How far a job is where there is no terminal."""

from __future__ import annotations

import pytest

from vocabdistil.core import progress
from vocabdistil.core.progress import counted, counting


@pytest.fixture
def often(monkeypatch):
    """A line at every second call."""
    now = iter(range(1000))
    monkeypatch.setattr(progress, "_EVERY", 2)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))


@pytest.mark.parametrize("items", range(1, 8))
def test_what_was_begun_to_be_told_is_told_to_its_end(items, often, capsys):
    assert list(counted(range(items), "Fitting layers")) == list(range(items))
    said = capsys.readouterr().err.splitlines()
    assert said[-1:] == ([f"Fitting layers: {items} of {items}"] if items > 1 else [])
    assert len(set(said)) == len(said)


def test_a_job_too_short_for_a_line_has_none(capsys):
    with counting("Reading", 3) as advance:
        advance(3)
    assert capsys.readouterr().err == ""


def test_what_broke_off_is_not_told_as_done(often, capsys):
    with pytest.raises(ZeroDivisionError), counting("Reading", 9) as advance:
        for _ in range(5):
            advance(1)
        raise ZeroDivisionError
    assert capsys.readouterr().err.splitlines()[-1] == "Reading: 4 of 9"
