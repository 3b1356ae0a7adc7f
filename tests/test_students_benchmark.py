"""The comparison of students: its table, the rows that it keeps, what it makes of them, and each method once."""

from __future__ import annotations

import csv
import importlib.util
import json
import random
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.students import __main__ as command
from benchmarks.students import methods, rows, table
from benchmarks.students.methods import Made, steps_within
from benchmarks.students.table import Run, ablation, comparison, matches
from vocabdistil.models.presets import PRESETS

TEACHER = "tiny"


@pytest.fixture
def data(tmp_path: Path, demo_lines: list[str]) -> Path:
    """Text, and pairs that share more words the higher their score is."""
    draw = random.Random(0)
    (tmp_path / "modern_en.txt").write_text("\n".join(demo_lines[:300]), encoding="utf-8")
    with open(tmp_path / "sts_dev_en.csv", "w", encoding="utf-8", newline="") as file:
        for line in demo_lines[300:340]:
            words, score = line.split(), draw.randint(0, 5)
            changed = [word if draw.randint(1, 5) <= score else draw.choice(demo_lines[0].split()) for word in words]
            csv.writer(file).writerow([line, " ".join(changed), score])
    return tmp_path


@pytest.fixture(autouse=True)
def prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(table.PROMPTS, TEACHER, "")


def stored(name: str = "a/trim", **changes: object) -> dict[str, object]:
    row = dict.fromkeys(rows.COLUMNS, "")
    row |= {"student": name, "teacher": TEACHER, "method": "trim", "options": "{}", "seed": 0, "parameters": 1500000}
    row |= {"tokens": 100, "score": 0.5, "of_teacher": 0.6, "commit": "abc", "date": "2026-01-01"}
    return row | changes


def test_every_student_stands_beside_its_baselines():
    runs = list(comparison())
    names = [run.name for run in runs]
    assert len(set(names)) == len(names)
    for student, told in table.STUDENTS.items():
        mine = {run.name.partition("/")[2]: run for run in runs if run.name.startswith(f"{student}/")}
        assert {"trim", "model2vec", "pooled", "distill"} <= set(mine)
        for kind in ("pooled", "distill"):
            assert mine[kind].options.items() >= (told.size | {"minutes": told.minutes}).items()
        assert mine["trim"].options == told.size
        assert mine["model2vec"].options["vocab_size"] == told.size["vocab_size"]
        assert ("preset" in mine) is (told.preset is not None)
        if told.preset is not None:
            assert told.size.items() >= asdict(PRESETS[told.preset]).items()
    for run in runs:
        assert run.method in methods.METHODS and json.loads(json.dumps(run.options)) == run.options
        assert all(name in table.PROMPTS for name in run.teachers)


def test_a_budget_is_for_what_trains_alone():
    for run in comparison(minutes=2):
        trains = run.method in ("pooled", "distill")
        assert (run.options.get("minutes") == 2) is trains and "steps" not in run.options
    for run in comparison(steps=7):
        assert run.options.get("steps") == (7 if run.method in ("pooled", "distill") else None)
        assert "minutes" not in run.options


def test_the_ablation_gives_every_loss_the_same_steps_on_two_teachers():
    runs = list(ablation())
    assert {run.options["steps"] for run in runs} == {table.ABLATION_STEPS}
    assert len({run.teachers for run in runs}) == 2
    assert {run.options["steps"] for run in ablation(steps=5)} == {5}
    timed = [run.options for run in ablation(minutes=1)]
    assert {options["minutes"] for options in timed} == {1} and not any("steps" in options for options in timed)


@pytest.mark.parametrize(
    ("pattern", "found"),
    [("", 3), ("minilm-1/", 1), ("minilm-1", 2), ("distill", 2), ("minilm-1*/distill", 2), ("e5", 0)],
)
def test_names_are_chosen_by_pattern(pattern, found):
    names = ["minilm-1/distill", "minilm-10/distill", "x/trim"]
    assert sum(matches(name, pattern) for name in names) == found


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--seeds", "0,x"], "expected numbers with commas between them, got '0,x'"),
        (["--minutes", "0"], "expected a number above 0, got 0"),
        (["--steps", "-3"], "expected a number above 0, got -3"),
        (["--steps", "3", "--minutes", "1"], "not allowed with argument"),
        (["--only", "nobody"], "no row is named so: nobody"),
        ([], "VOCABDISTIL_DATA"),
    ],
)
def test_bad_options_are_told(arguments, told, capsys, monkeypatch):
    monkeypatch.delenv("VOCABDISTIL_DATA", raising=False)
    with pytest.raises(SystemExit) as error:
        command.main(arguments)
    assert error.value.code == 2 and told in capsys.readouterr().err


def test_options_are_parsed():
    args = command.parser().parse_args(["--seeds", "0,1,2", "--steps", "9", "--only", "e5", "--missing"])
    assert args.seeds == [0, 1, 2] and args.steps == 9 and args.only == "e5" and args.missing


def test_the_file_in_the_repository_can_be_read():
    found = rows.read(rows.RESULTS)
    assert found
    for row in found:
        options = json.loads(row["options"])
        static = row["method"] == "model2vec" and options["pca_dims"] > 0
        assert options.get("vocab_size", 0) > 0 or "preset" in options or static
        assert float(row["of_teacher"]) == pytest.approx(float(row["score"]) / float(row["teacher_score"]), abs=2e-4)


def test_rows_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "results.csv"
    assert rows.read(path) == []
    told = [stored(options=json.dumps({"a": [1, "x, y"]})), stored("a/distill", seed=1)]
    for row in told:
        rows.append(path, row)
    assert rows.read(path) == [{name: str(value) for name, value in row.items()} for row in told]


def test_a_torn_row_costs_no_other(tmp_path):
    path = tmp_path / "results.csv"
    rows.append(path, stored("a/first"))
    with open(path, "a", encoding="utf-8") as file:
        file.write('a/torn,tiny,trim,{},0,15')
    rows.append(path, stored("a/last"))
    assert [row["student"] for row in rows.read(path)] == ["a/first", "a/last"]


def test_a_file_with_other_columns_is_told(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("teacher,score\nx,1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="expected the columns student,"):
        rows.read(path)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_report_has_mean_and_spread_and_the_best_first():
    options = json.dumps({"minutes": 20})
    found = [stored(score=0.70, of_teacher=0.8, commit="old")]
    for seed, score in enumerate((0.80, 0.82, 0.84)):
        found.append(stored("a/distill", options=options, seed=seed, score=score, start=0.7, of_teacher=score))
    lines = rows.report([{name: str(value) for name, value in row.items()} for row in found]).splitlines()
    assert cells(lines[2]) == ["a, tiny", "distill", "20 min", "1.5", "100", "3", "0.8200 ± 0.0200", "0.7000", "0.820"]
    assert cells(lines[3]) == ["", "trim", "", "1.5", "100", "1", "0.7000", "", "0.800"]
    assert len(lines) == 4


def test_the_report_takes_the_newest_row_of_a_seed_and_the_newest_options():
    told = [
        stored(options='{"layers": 1}', seed=0, score=0.1, date="2026-01-01"),
        stored(options='{"layers": 1}', seed=1, score=0.2, date="2026-01-02"),
        stored(options='{"layers": 2}', seed=0, score=0.3, date="2026-01-03"),
        stored(options='{"layers": 2}', seed=0, score=0.4, date="2026-01-05", commit="def"),
        stored(options='{"layers": 2}', seed=1, score=0.6, date="2026-01-04"),
        stored(options='{"layers": 2, "steps": 9}', score=0.9, date="2026-01-06"),
    ]
    lines = rows.report([{name: str(value) for name, value in row.items()} for row in told]).splitlines()
    assert [cells(line)[2] for line in lines[2:4]] == ["9 steps", ""]
    assert cells(lines[3])[5:7] == ["2", "0.5000 ± 0.1414"]
    assert lines[-1] == "Seeds of different commits: a/trim."


def test_a_killed_table_keeps_its_rows_and_goes_on(data, tmp_path, monkeypatch, capsys):
    runs = [Run(f"a/{i}", "trim", (TEACHER,), "en", {}) for i in range(4)]
    results, calls = tmp_path / "results.csv", []

    def make(method, **told):
        calls.append(told["seed"])
        if len(calls) == 2:
            raise RuntimeError("no such luck")
        if len(calls) == 4:
            raise KeyboardInterrupt
        return Made(10, 5, 0.5)

    monkeypatch.setattr(command, "make", make)
    monkeypatch.setattr(command, "_teacher_score", lambda *told: 1.0)
    with pytest.raises(KeyboardInterrupt):
        command.run_table(runs, [3], {TEACHER: "x"}, data, results)
    assert [row["student"] for row in rows.read(results)] == ["a/0", "a/2"]
    assert "a/1: seed 3: RuntimeError: no such luck" in capsys.readouterr().err
    assert command.run_table(runs, [3], {TEACHER: "x"}, data, results, again=False) == 0
    assert [row["student"] for row in rows.read(results)] == ["a/0", "a/2", "a/1", "a/3"]
    assert command.run_table(runs[:1], [3], {TEACHER: "x"}, data, results) == 0
    assert len(rows.read(results)) == 5


def test_what_is_not_there_is_left_out(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(methods.importlib.util, "find_spec", lambda name: None)
    runs = [
        Run("a/static", "model2vec", (TEACHER,), "en", {"pca_dims": 8}),
        Run("a/two", "trim", (TEACHER, "nobody"), "en", {}),
    ]
    assert command.run_table(runs, [0], {TEACHER: "x"}, data, tmp_path / "results.csv") == 0
    assert rows.read(tmp_path / "results.csv") == []
    told = capsys.readouterr().out.splitlines()
    assert told == ["a/static: left out, needs model2vec, skeletoken", "a/two: left out, needs nobody"]


@pytest.mark.parametrize(
    ("seconds", "steps"),
    # 0.1 s a step and 0.01 s a text: a batch of 10 costs 0.2 s until all 100 texts were read, then 0.1 s.
    [(1.0, 5), (2.0, 10), (3.0, 20), (0.01, 1), (-5.0, 1)],
)
def test_the_teacher_reads_a_text_once(seconds, steps):
    assert steps_within(seconds + 1e-9, 0.1, 0.01, 10, 100) == steps


SIZE = {"vocabulary": "trim", "vocab_size": 200, "layers": 1}
MADE = {
    "trim": SIZE,
    "distill": SIZE | {"weights": {"pooled": 1, "kl": 1}, "steps": 2, "batch_size": 8},
    "pooled": SIZE | {"lr": 1e-3, "batch_size": 8, "warmup": 0.0, "steps": 2},
    "model2vec": {"vocab_size": 200, "pca_dims": 16},
}


def make_row(method: str, options: dict, data: Path, teacher_folder: Path) -> dict[str, object]:
    if absent := methods.missing(method):
        pytest.skip(f"needs {', '.join(absent)}")
    run = Run(f"a/{method}", method, (TEACHER,), "en", options)
    return command.row_of(run, 0, {TEACHER: str(teacher_folder)}, data)


@pytest.mark.parametrize("method", MADE)
def test_a_row_of_each_method(method, data, tmp_path, teacher_folder):
    row = make_row(method, MADE[method], data, teacher_folder)
    rows.append(tmp_path / "results.csv", row)
    (back,) = rows.read(tmp_path / "results.csv")
    assert json.loads(back["options"]) == MADE[method] and back["method"] == method
    assert -1 <= float(back["score"]) <= 1
    assert float(back["of_teacher"]) == pytest.approx(float(back["score"]) / float(back["teacher_score"]), abs=1e-3)
    trained = method in ("distill", "pooled")
    assert back["steps"] == ("2" if trained else "") and bool(back["start"]) is (method == "pooled")
    if method == "model2vec":
        assert int(back["parameters"]) == 16 * int(back["tokens"]) and int(back["tokens"]) <= 200
    else:
        assert int(back["tokens"]) == 200 and float(back["text_tokens"]) >= 1


def test_pooled_distillation_starts_at_the_trimmed_student_and_learns(data, teacher_folder):
    trimmed = make_row("trim", SIZE, data, teacher_folder)
    row = make_row("pooled", MADE["pooled"] | {"steps": 20}, data, teacher_folder)
    assert row["start"] == trimmed["score"] and row["parameters"] == trimmed["parameters"]
    assert row["score"] != row["start"]


def test_pooled_distillation_keeps_to_its_minutes(data, teacher_folder, monkeypatch):
    found = []
    monkeypatch.setattr(methods, "steps_within", lambda *told: found.append(told) or 3)
    options = {name: value for name, value in MADE["pooled"].items() if name != "steps"} | {"minutes": 5.0}
    assert make_row("pooled", options, data, teacher_folder)["steps"] == 3
    ((seconds, step, text, batch, texts),) = found
    assert 0 < seconds < 300 and step > 0 and text > 0 and batch == 8 and 0 < texts < 300


def test_the_command_lists_runs_and_reports(data, tmp_path, teacher_folder, monkeypatch, capsys):
    monkeypatch.setattr(command, "teacher_folders", lambda e5: {TEACHER: str(teacher_folder)})
    monkeypatch.setattr(table, "STUDENTS", {"tiny-1": table.Student(TEACHER, "en", SIZE, 1)})
    monkeypatch.setattr(table, "TRIMMED", {})
    monkeypatch.setenv("VOCABDISTIL_DATA", str(data))
    results = ["--results", str(tmp_path / "results.csv")]
    assert command.main(["--list", *results]) == 0
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        "tiny-1/trim", "tiny-1/pooled", "tiny-1/distill",
    ]  # fmt: skip
    assert command.main(["--only", "trim", "--seeds", "0,1", *results]) == 0
    assert [row["seed"] for row in rows.read(tmp_path / "results.csv")] == ["0", "1"]
    capsys.readouterr()
    assert command.main(["--report", *results]) == 0
    assert cells(capsys.readouterr().out.splitlines()[2])[:2] == ["tiny-1, tiny", "trim"]


def test_packages_are_looked_for():
    assert methods.missing("trim") == []
    there = all(importlib.util.find_spec(name) for name in ("model2vec", "skeletoken"))
    assert bool(methods.missing("model2vec")) is not there
