"""The command line: exit codes, one-line errors, JSON."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from transformers import AutoTokenizer

import vocabdistil as vd
from vocabdistil.cli import main


@pytest.fixture(scope="module")
def untrained(teacher_folder, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "student"
    command = ["distill", "--teacher", str(teacher_folder), "--text", str(text_file), "--out", str(out), "--quiet"]
    sizes = ["--vocab-size", "150", "--steps", "1", "--batch-size", "4", "--max-length", "32"]
    assert main([*command, *sizes, "--time-batch", "1", "--time-length", "8"]) == 0
    return out


def last_line(text: str) -> str:
    assert text.count("\n") == 1, text
    return text.strip()


def test_env_is_json(capsys):
    assert main(["env"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["build"]["loaded"] and found["backends"]["cpu"]["available"]


def test_the_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vocabdistil {vd.__version__}\n"


@pytest.mark.parametrize(
    ("line", "offered"), [("vocabdistil tr", {"trim"}), ("vocabdistil trim --vocab", {"--vocab-size", "--vocabulary"})]
)
def test_a_shell_is_told_how_a_line_may_go_on(line, offered, tmp_path):
    pytest.importorskip("argcomplete")
    answer = tmp_path / "answer"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    asked |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(answer), "_ARGCOMPLETE_SUPPRESS_SPACE": "1"}
    command = [sys.executable, "-c", "from vocabdistil.cli import main; main()"]
    subprocess.run(command, env=os.environ | asked, check=True)
    assert {choice.strip() for choice in answer.read_text().splitlines()} == offered


def test_loyalty_of_a_teacher_to_itself_is_1(teacher_folder, untrained, text_file, capsys):
    command = ["loyalty", "--teacher", str(teacher_folder), "--student", str(teacher_folder), str(untrained)]
    assert main([*command, "--text", str(text_file), "--texts", "20", "--max-length", "32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found[str(teacher_folder)]["pearson"] == pytest.approx(1)
    assert found[str(teacher_folder)]["label"] == found[str(teacher_folder)]["probability"] == 1
    other = found[str(untrained)]
    assert -1 <= other["spearman"] < 0.999 and 0 < other["probability"] < 0.999
    assert other["pseudo_perplexity"] > other["teacher_pseudo_perplexity"] > 1
    assert main([*command, "--text", str(text_file), "--texts", "3", "--max-length", "32"]) == 0
    assert "pseudo-perplexity" in capsys.readouterr().out.replace("\n", "")


def test_loyalty_reads_the_prompt(teacher_folder, untrained, text_file, capsys):
    command = ["loyalty", "--teacher", str(teacher_folder), "--student", str(untrained), "--text", str(text_file)]
    found = []
    for prompt in ([], ["--prompt", ""], ["--prompt", "Olga walks "]):
        assert main([*command, "--texts", "8", "--max-length", "32", "--json", *prompt]) == 0
        found.append(json.loads(capsys.readouterr().out)[str(untrained)])
    # The folder says none.
    assert found[0] == found[1] and found[2]["pearson"] != found[0]["pearson"]
    assert found[2]["pseudo_perplexity"] != found[0]["pseudo_perplexity"]
    assert main([*command, "--prompt", "\udc80"]) == 2
    assert "--prompt: expected text that UTF-8 can hold" in last_line(capsys.readouterr().err)


def test_bench_counts_parameters(teacher_folder, untrained, text_file, capsys):
    sizes = ["--batch", "2", "--length", "16", "--json"]
    assert main(["bench", str(teacher_folder), str(untrained), "--text", str(text_file), *sizes]) == 0
    teacher, student = json.loads(capsys.readouterr().out)
    assert teacher["vocab"] == 600 and student["vocab"] == 150
    assert teacher["mb"] == pytest.approx(teacher["parameters"] * 4e-6, abs=0.01)
    assert 0 < student["tokens"] <= 2 * 16


def test_tables_tell_folders_of_one_name_apart(teacher_folder, text_file, tmp_path, capsys):
    folders = [tmp_path / name / "model" for name in ("one", "other")]
    for folder in folders:
        shutil.copytree(teacher_folder, folder)
    sizes = ["--text", str(text_file), "--batch", "1", "--length", "8"]
    assert main(["bench", *map(str, folders), *sizes]) == 0
    compared = ["--student", *map(str, folders), "--text", str(text_file), "--texts", "3", "--max-length", "16"]
    assert main(["loyalty", "--teacher", str(teacher_folder), *compared]) == 0
    shown = capsys.readouterr().out
    assert shown.count("one/model") == shown.count("other/model") == 2
    assert main(["coverage", "--teacher", str(folders[0]), "--student", str(folders[1]), "--text", str(text_file)]) == 0
    assert "one/model and other/model (" in capsys.readouterr().out


def test_coverage_of_a_teacher_with_its_transformer_in_a_folder(teacher_folder, text_file, tmp_path, capsys):
    shutil.copytree(teacher_folder, tmp_path / "0_Transformer")
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 16}')
    listed = [{"type": f"models.{name}", "path": f"{k}_{name}"} for k, name in enumerate(("Transformer", "Pooling"))]
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    sides = ["--teacher", str(tmp_path), "--student", str(teacher_folder)]
    assert main(["coverage", *sides, "--text", str(text_file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["matched_vocab"] == 600


def test_coverage_of_a_tokenizer_by_itself(teacher_folder, text_file, capsys):
    folder = str(teacher_folder)
    assert main(["coverage", "--teacher", folder, "--student", folder, "--text", str(text_file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["matched_vocab"] == 600 and found["pieces_per_token"] == 1 and found["reduce_equals_own"] == 1
    assert main(["coverage", "--teacher", folder, "--vocab-size", "150", "--text", str(text_file)]) == 0
    assert "150" in capsys.readouterr().out


@pytest.fixture
def bad_teacher(teacher_folder, tmp_path):
    def make(kind: str) -> str:
        folder = tmp_path / kind
        if kind == "empty":
            folder.mkdir()
        elif kind == "slow":
            folder.mkdir()
            (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n")
            (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertJapaneseTokenizer"}')
            (folder / "config.json").write_text('{"model_type": "bert"}')
        elif kind == "no-model":
            AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(folder)
        return str(folder)

    return make


@pytest.mark.parametrize("kind", ["empty", "slow", "no-model", "missing"])
def test_bad_teachers(bad_teacher, text_file, tmp_path, capsys, kind):
    folder = bad_teacher(kind)
    assert main(["distill", "--teacher", folder, "--text", str(text_file), "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    line = last_line(captured.err)
    assert line.startswith("vocabdistil: --teacher: ") and folder in line
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_bad_text_and_usage(teacher_folder, tmp_path, capsys):
    missing = str(tmp_path / "none.txt")
    assert main(["distill", "--teacher", str(teacher_folder), "--text", missing, "--out", str(tmp_path / "o")]) == 2
    assert last_line(capsys.readouterr().err) == f"vocabdistil: --text: no such file: {missing}"
    assert main(["distill", "--out", "x"]) == 2
    assert "--teacher" in last_line(capsys.readouterr().err)
    assert main(["distil"]) == 2
    assert "distil" in last_line(capsys.readouterr().err)
    assert main(["--help"]) == 0
    assert "distill" in capsys.readouterr().out


def test_control_c_saves_a_checkpoint_and_exits_130(teacher_folder, text_file, tmp_path):
    out = tmp_path / "student"
    command = [sys.executable, "-m", "vocabdistil", "distill", "--teacher", str(teacher_folder)]
    sizes = ["--vocab-size", "150", "--steps", "100000", "--batch-size", "4", "--max-length", "32", "--save-every", "1"]
    run = subprocess.Popen(
        [*command, "--text", str(text_file), "--out", str(out), *sizes],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "student.partial").glob("checkpoint-*")) and time.monotonic() < deadline:
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=120)
    assert run.returncode == 130, err
    assert err.startswith("vocabdistil: interrupted at step ") and "--resume" in err
    assert list((tmp_path / "student.partial").glob("checkpoint-*/trainer_state.json"))
    assert not out.exists()


def test_a_closed_pipe_does_not_end_training(teacher_folder, text_file, tmp_path):
    command = [sys.executable, "-m", "vocabdistil", "distill", "--teacher", str(teacher_folder)]
    command += ["--text", str(text_file)]
    sizes = ["--vocab-size", "150", "--steps", "3", "--batch-size", "4", "--max-length", "32", "--log-every", "1"]
    timing = ["--time-batch", "1", "--time-length", "8", "--out", str(tmp_path / "student")]
    run = subprocess.Popen(
        [*command, *sizes, *timing],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    run.stdout.readline()
    run.stdout.close()
    assert "Traceback" not in run.stderr.read()
    assert run.wait() == 0 and (tmp_path / "student" / "metrics.json").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_result_that_cannot_be_written_is_an_error():
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "vocabdistil", "env"]
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert run.returncode == 2
    assert run.stderr == f"vocabdistil: cannot write to standard output: {os.strerror(errno.ENOSPC)}\n"


def test_errors_steer_no_terminal(capsys):
    assert main(["trim", "--teacher", "a\x1b[2J", "--text", "none\x07.txt", "--out", "o\x1b]0;title"]) == 2
    line = last_line(capsys.readouterr().err)
    assert line.isprintable() and "none\\x07.txt" in line
    assert main(["distil\x1b[2J"]) == 2
    assert last_line(capsys.readouterr().err).isprintable()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["loyalty", "--texts", "2"], "--texts: expected a number above 2, got 2"),
        (["loyalty", "--texts", "9" * 20], "--texts: expected a number up to 2147483647"),
        (["loyalty", "--max-length", "9" * 20], "--max-length: expected a number up to 2147483647"),
        (["loyalty", "--seed", "-1"], "--seed: expected a number from 0"),
        (["bench", "--batch", "9" * 11], "--batch: expected a number up to 2147483647"),
        (["bench", "--batch", "2049"], "--batch: expected a number up to 2048, got 2049"),
        (["bench", "--batch", "0"], "--batch: expected a number above 0"),
        (["bench", "--length", "9" * 20], "--length: expected a number up to 1048576"),
        (["bench", "--length", "2"], "--length: expected a number above 2"),
        (["bench", "--threads", "1000000"], "--threads: expected a number up to 4096"),
        (["bench", "--threads", "0"], "--threads: expected a number above 0"),
    ],
)
def test_numbers_that_cannot_be(command, message, teacher_folder, text_file, capsys):
    name, *changes = command
    folder = str(teacher_folder)
    models = ["--teacher", folder, "--student", folder] if name == "loyalty" else [folder]
    assert main([name, *models, "--text", str(text_file), *changes]) == 2
    assert message in last_line(capsys.readouterr().err)
