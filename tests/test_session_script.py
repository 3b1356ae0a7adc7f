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
from benchmarks import goals, smoke
from benchmarks.report import COLUMNS

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def session(out: Path, *steps: str) -> subprocess.CompletedProcess[str]:
    told = {"DRY": "1", "OUT": str(out), "PYTHON": sys.executable}
    script = ROOT / "benchmarks" / "gpu_session.sh"
    return subprocess.run([script, *steps], env=os.environ | told, capture_output=True, text=True, timeout=500)


def test_steps_leave_logs_and_are_not_done_twice(tmp_path):
    first = session(tmp_path, "smoke", "claims")
    assert first.returncode == 0, first.stdout + first.stderr
    about = json.loads((tmp_path / "environment.json").read_text())
    assert about["rows"]["device"] == "cpu" and about["versions"]["torch"] == torch.__version__
    assert "all right" in (tmp_path / "smoke.txt").read_text()
    rows = (tmp_path / "results.csv").read_text()
    assert rows.startswith(",".join(COLUMNS)) and "b8-l256-d768-60%" in rows
    again = session(tmp_path, "smoke", "claims")
    assert again.returncode == 0 and again.stdout.count("done before") == 2
    assert (tmp_path / "results.csv").read_text() == rows


def test_a_step_that_fails_is_named_and_done_again(tmp_path):
    (tmp_path / "results.csv").write_text("other,columns\n")
    failed = session(tmp_path, "claims", "job")
    assert failed.returncode == 1 and "failed or unfinished: claims" in failed.stdout
    assert "expected the columns" in (tmp_path / "claims.txt").read_text()
    (tmp_path / "results.csv").unlink()
    mended = session(tmp_path, "claims", "job")
    assert mended.returncode == 0 and mended.stdout.count("done before") == 1


def test_a_step_that_is_none_is_refused(tmp_path):
    refused = session(tmp_path, "smoke", "fry")
    assert refused.returncode == 2 and refused.stderr.strip().endswith("got fry")
    assert not (tmp_path / "smoke.txt").exists()


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
