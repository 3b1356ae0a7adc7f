"""The script of what is to be known of the kernels on a GPU, as far as it runs without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vocabdistil as vd
from benchmarks import __main__ as benchmarks
from benchmarks import goals, launches, smoke
from benchmarks.report import COLUMNS

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def session(out: Path, *steps: str, **told: str) -> subprocess.CompletedProcess[str]:
    told = {"DRY": "1", "SESSION": str(out), "PYTHON": sys.executable} | told
    script = ROOT / "benchmarks" / "gpu_session.sh"
    return subprocess.run(["bash", script, *steps], env=os.environ | told, capture_output=True, text=True, timeout=500)


def test_steps_leave_logs_and_are_not_done_twice(tmp_path):
    first = session(tmp_path, "smoke", "claims", RESULTS=str(tmp_path / "kept"))
    assert first.returncode == 0, first.stdout + first.stderr
    about = json.loads((tmp_path / "environment.json").read_text())
    assert about["rows"]["device"] == "cpu" and about["versions"]["torch"] == torch.__version__
    assert "all right" in (tmp_path / "smoke.txt").read_text()
    rows = (tmp_path / "claims.csv").read_text()
    assert rows.startswith(",".join(COLUMNS)) and "b8-l256-d768-60%" in rows
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"environment.json", "claims.csv", "logs.tar.gz"}
    again = session(tmp_path, "smoke", "claims")
    assert again.returncode == 0 and again.stdout.count("done before") == 2
    assert (tmp_path / "claims.csv").read_text() == rows


# Stands in for Python, a profiler and a sanitizer on a GPU machine: writes down what it is called with, and fails or is
# stopped where it is told so.
STUB = """#!/usr/bin/env bash
[ "$1" = -c ] && exit 0
printf '%s\\n' "$(basename "$0") $*" >> "$CALLS"
case "$*" in
    *${STOPS:-nothing}*) exit 124 ;;
    *${FAILS:-nothing}*) exit 1 ;;
esac
exit 0
"""


@pytest.fixture
def stubbed(tmp_path):
    """A session as on a GPU, of programs that only write down how they are called."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("python", "ncu", "compute-sanitizer"):
        (programs / name).write_text(STUB)
        (programs / name).chmod(0o755)
    calls = tmp_path / "calls"

    def run(*steps: str, **told: str) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
        calls.write_text("")
        path = f"{programs}:{os.environ['PATH']}"
        given = {"DRY": "0", "PYTHON": str(programs / "python"), "PATH": path, "CALLS": str(calls)}
        done = session(tmp_path / "out", *steps, **(given | told))
        return done, [line.split() for line in calls.read_text().splitlines()]

    return run


def test_what_is_called_on_a_gpu(stubbed):
    done, calls = stubbed()
    assert done.returncode == 0, done.stdout + done.stderr
    measured = [call[3:] for call in calls if call[1:3] == ["-m", "benchmarks"] and call[3] not in ("smoke", "goals")]
    given = [benchmarks._parser().parse_args(arguments) for arguments in measured]
    assert {name for args in given for name in args.names} == set(benchmarks.OPERATIONS) - {"align", "collate"}
    assert all(args.device == "cuda" and args.missing for args in given)
    assert {args.out.name for args in given} == {"claims.csv", "results.csv"}
    tested = {word for call in calls if "pytest" in call for word in call if word.startswith("tests/")}
    assert tested == {"tests/test_cuda_build.py", *(f"tests/{path.name}" for path in ROOT.glob("tests/test_gpu*.py"))}
    small = {call[-1] for call in calls if call[0] == "compute-sanitizer"}
    assert small == {call.operation for call in smoke.calls(CPU)} | {"remap"}
    assert ["ncu"] == [call[0] for call in calls if call[-1] == "large"]
    again, calls = stubbed()
    assert again.returncode == 0 and all("goals" in call for call in calls)


def test_what_failed_is_told_again_and_what_was_stopped_is_done_again(stubbed):
    done, calls = stubbed("tests", STOPS="test_gpu_remap", FAILS="test_gpu_vocabulary")
    assert done.returncode == 1 and "failed or unfinished: tests" in done.stdout
    assert sum("pytest" in call for call in calls) == 6
    again, calls = stubbed("tests")
    assert again.returncode == 1 and "tests-vocabulary: done before, exit status 1" in again.stdout
    assert [call for call in calls if "pytest" in call] == [call for call in calls if "tests/test_gpu_remap.py" in call]
    without, nothing = stubbed("job", MINUTES="0")
    assert without.returncode == 1 and "no time left" in without.stdout and not nothing


def test_a_step_that_is_none_is_refused(tmp_path):
    refused = session(tmp_path, "smoke", "fry")
    assert refused.returncode == 2 and refused.stderr.strip().endswith("got fry")
    assert not (tmp_path / "smoke.txt").exists()


def test_small_launches():
    assert launches.main(["small", "span_mean"]) == 0
    assert launches.main(["small"]) == launches.main(["small", "fry"]) == launches.main([]) == 2


def test_the_smoke_test_sees_what_is_wrong(monkeypatch, capsys):
    assert smoke.smoke(CPU) == 0
    span_mean = vd.span_mean
    monkeypatch.setattr(vd, "span_mean", lambda *args, **options: 1.01 * span_mean(*args, **options))
    capsys.readouterr()
    assert smoke.smoke(CPU) == 1
    wrong = [line for line in capsys.readouterr().out.splitlines() if "<<<" in line]
    assert len(wrong) == 1 and wrong[0].startswith("span_mean") and "relative error" in wrong[0]


def row(provider: str, mode: str = "graph", **known: str) -> dict[str, str]:
    goal = goals.GOALS[0]
    about = {"operation": goal.operation, "case": goal.case, "mode": mode, "provider": provider}
    return dict.fromkeys(COLUMNS, "") | about | known


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], {"no row"}),
        ([row("ours-cuda", p50_ms="2", copy_fraction="0.5")], {"0.5"}),
        ([row("ours-cuda", p50_ms="2", copy_fraction="0.5"), row("ours-triton", copy_fraction="0.95")], set()),
        ([row("ours-cuda", p50_ms="2", copy_fraction="0.95"), row("rival", p50_ms="1")], {"2 ms, rival 1 ms"}),
        ([row("ours-cuda", error="wrong: tensor 0", copy_fraction="")], {"no row", "wrong: tensor 0"}),
        ([row("ours-cuda", error="unavailable: no nvcc"), row("ours-triton", p50_ms="1", copy_fraction="0.93")], set()),
    ],
)
def test_goals_that_are_missed(rows, said):
    first = goals.GOALS[0]
    judged = [line for line in goals.judged(rows) if line[1] == f"{first.case} {first.mode}"]
    assert {reached for *_, reached, met in judged if not met} == said


def test_a_goal_has_a_case():
    """Names of goals are those of cases: what is misspelt would never be reached."""
    from benchmarks import linear_matched_kl, span_loss

    cases = {
        (module.OPERATION, case.name)
        for module in (span_loss, linear_matched_kl)
        for case in module.cases(torch.device("cuda"))
    }
    assert {(goal.operation, goal.case) for goal in goals.GOALS} <= cases
    assert {goal.column for goal in goals.GOALS} <= set(COLUMNS)
