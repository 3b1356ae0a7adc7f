"""The model card: what the Hub reads of it, whatever names are in it, and code that runs as it stands."""

from __future__ import annotations

import copy
import dataclasses
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

import vocabdistil as vd
from tests.models.tiny_teachers import texts, tiny_teacher
from tests.runs import PRESET
from vocabdistil.cli import build_parser
from vocabdistil.distillation.command import command_of
from vocabdistil.distillation.job import DistillConfig
from vocabdistil.distillation.trim import TrimConfig
from vocabdistil.evaluation.card import model_card
from vocabdistil.models.folders import stated_licence
from vocabdistil.models.sentence import SentenceSettings, write_sentence_settings

SMALL = {"time_batch": 2, "time_length": 12, "quiet": True, "vocab_size": 300}
TRAINED = {**SMALL, "steps": 2, "batch_size": 4, "max_length": 32, "held_out": 0.2}
LINES = [f"{text} {n}" for n in range(8) for text in texts() if "\n" not in text]
ODD = [
    "no",
    "on",
    "null",
    "1.0",
    "a: b",
    "- x",
    "'",
    '"',
    "\\",
    "a\nb",
    "\n---\n",
    "#",
    "{}",
    "[",
    "*a",
    "%",
    "```",
    "|",
]
ODD += ["~", "ё\u2028ж", "\x85", "\x07", "@x", "!!python/name:os", "---", "x" * 500, " spaces "]


def front(card: str) -> dict:
    """As the Hub reads it."""
    block = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1]
    found = yaml.safe_load(block)
    assert ModelCard(card).data.to_dict() == found
    return found


def blocks(card: str) -> list[tuple[str, str]]:
    return [(m[2], m[3]) for m in re.finditer(r"^(`{3,})(\w+)\n(.*?)\n\1$", card, re.DOTALL | re.MULTILINE)]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "a text.txt"
    path.write_text("\n".join(LINES), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trimmed(text, tmp_path_factory) -> vd.DistillResult:
    out = tmp_path_factory.mktemp("card") / "small"
    return vd.trim(teacher=tiny_teacher("bert"), text=text, out=out, language="en,ru", license="mit", **SMALL)


@pytest.fixture(scope="module")
def distilled(text, tmp_path_factory) -> vd.DistillResult:
    out = tmp_path_factory.mktemp("card") / "small"
    return vd.distill(teacher=tiny_teacher("bert", head=False), text=LINES, out=out, layers=2, **TRAINED)


def embedder(folder: Path) -> Path:
    """A teacher of sentence-transformers."""
    shutil.copytree(tiny_teacher("bert", head=False), folder)
    write_sentence_settings(
        SentenceSettings(str(folder), ("mean",), True, 16, (), {"q": "q: "}, "q", None, None, False), folder
    )
    return folder


def test_names_steer_no_terminal(text, tmp_path):
    teacher = tmp_path / "bert\x1b]0;title\x07"
    shutil.copytree(tiny_teacher("bert"), teacher)
    made = vd.trim(teacher=teacher, text=text, out=tmp_path / "small\x1b[31m", **SMALL)
    card = (made.path / "README.md").read_text(encoding="utf-8")
    assert "\x1b" not in card and "\x07" not in card
    assert front(card)["library_name"] == "transformers"


def test_the_front_says_what_it_is(trimmed, distilled, text):
    found = front((trimmed.path / "README.md").read_text(encoding="utf-8"))
    assert found == {
        "library_name": "transformers", "pipeline_tag": "fill-mask", "language": ["en", "ru"],
        "license": "mit", "text_files": ["a text.txt"], "tags": ["vocabdistil", "vocabulary-trimming"],
    }  # fmt: skip
    found = front((distilled.path / "README.md").read_text(encoding="utf-8"))
    assert found["pipeline_tag"] == "sentence-similarity" and "distillation" in found["tags"]
    assert not {"language", "license", "text_files"} & found.keys()


@pytest.mark.parametrize("odd", ODD)
def test_odd_names_break_nothing(trimmed, odd):
    metrics = copy.deepcopy(trimmed.metrics)
    metrics["settings"] |= {"license": odd, "language": [odd, "en"]}
    metrics |= {"teacher": [f"x/{odd}", "owner/model"], "prompt": odd, "warnings": [odd], "baselines": {odd: {}}}
    metrics["vocabulary"]["source"] = odd
    card = model_card(odd, metrics, [odd, f"dir/{odd}"], ("bash", f"echo {shlex.quote(odd)}"))
    found = front(card)
    line, name = (" ".join(text.split()) for text in (odd, Path(odd).name))
    assert (found.get("license", ""), found["language"]) == (line, [line, "en"])
    assert found["text_files"] == [name] * 2 and "owner/model" in found["base_model"]
    languages = [language for language, _ in blocks(card)]
    assert languages == ["python", "bash"]
    compile(blocks(card)[0][1], "card", "exec")
    for heading in ("Use", "Intended use and limits", "Scores", "How it was made"):
        assert len(re.findall(f"^## {heading}$", card, re.MULTILINE)) == 1
    tables = [line for line in card.splitlines() if line.startswith("| ")]
    # A bar of a name is no border.
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} == {5, 6}


@pytest.mark.parametrize("way", ["bert", "bert-body", "t5", "xlm-roberta", "sentence", "narrow", "preset"])
def test_the_code_runs_as_it_stands(way, text, tmp_path, monkeypatch, capsys):
    if way == "sentence":
        pytest.importorskip("sentence_transformers")
        teacher = embedder(tmp_path / "teacher")
    else:
        kind = {"narrow": "bert-body", "preset": "bert"}.get(way, way)
        teacher = tiny_teacher(kind.removesuffix("-body"), head=not kind.endswith("-body"))
    make, options = (vd.distill, TRAINED | {"preset": PRESET}) if way == "preset" else (vd.trim, SMALL)
    options = options | ({"dim": 8, "heads": 2, "prompt": "q\"'\n: "} if way == "narrow" else {})
    made = make(teacher=teacher, text=text, out=tmp_path / 'it\'s "small"', **options)
    language, code = blocks((made.path / "README.md").read_text(encoding="utf-8"))[0]
    assert language == "python" and len(code.splitlines()) <= 8
    if way == "sentence":
        assert "SentenceTransformer" in code
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert ("token_str" if way in ("bert", "xlm-roberta", "preset") else "tensor(") in capsys.readouterr().out


def test_baselines_and_warnings_are_told(trimmed, distilled):
    for made, measures in ((trimmed, {"pearson": 0.1234, "cosine": 0.5}), (distilled, {"pearson": 0.1234})):
        baselines = {"PCA": measures, "static vectors": {"spearman": 0.4321}}
        card = model_card("x", made.metrics | {"baselines": baselines, "warnings": ["The loss still fell."]})
        assert "0.1234" in card and "0.4321" in card and "| PCA |" in card and "| static vectors |" in card
        assert (
            "- The loss still fell.\n"
            in card.partition("## Intended use and limits")[2].partition("## Scores")[0] + "\n"
        )
    (row,) = [line for line in card.splitlines() if "Pearson" in line]
    assert row.startswith("| regression loyalty, Pearson (higher is better) | ") and row.endswith(" | 0.1234 | - |")


@pytest.mark.parametrize(
    ("cards", "licence"),
    [(["license: apache-2.0"], "apache-2.0"), (["tags: [x]"], None), (["license: [mit]"], None), (["{"], None),
     (["license: mit", "license: mit"], "mit"), (["license: mit", "license: gpl-3.0"], None),
     (["license: mit", None], None)],
)  # fmt: skip
def test_the_licence_that_the_teachers_state_is_copied(cards, licence, distilled, tmp_path):
    folders = []
    for i, said in enumerate(cards):
        (folder := tmp_path / str(i)).mkdir()
        folders.append(str(folder))
        if said is not None:
            (folder / "README.md").write_text(f"---\n{said}\n---\n# A model\n\nlicense: of its text\n")
    found = stated_licence(folders)
    card = model_card("x", distilled.metrics, stated=found)
    assert found == licence == front(card).get("license") and ("No licence was named" in card) == (found is None)
    named = model_card("x", distilled.metrics | {"settings": {"license": "own"}}, stated=found)
    assert front(named)["license"] == "own"


def test_a_trimmed_student_has_its_teacher_s_licence(text, tmp_path):
    teacher = embedder(tmp_path / "teacher")
    (teacher / "README.md").write_text("---\nlicense: mit\n---\n")
    made = vd.trim(teacher=teacher, text=text, out=tmp_path / "small", **SMALL)
    found = front((made.path / "README.md").read_text(encoding="utf-8"))
    assert found["license"] == "mit" and "base_model" not in found


def test_a_base_model_is_a_name_on_the_hub(distilled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "local").mkdir(parents=True)
    named = ["owner/model", "bert-base-cased", "owner/local", str(tmp_path), "./gone", "a b"]
    assert front(model_card("x", distilled.metrics | {"teacher": named}))["base_model"] == named[:2]


def test_licence_and_limits(trimmed, distilled):
    assert "No licence was named" not in (trimmed.path / "README.md").read_text(encoding="utf-8")
    assert "No licence was named" in (distilled.path / "README.md").read_text(encoding="utf-8")


COMMANDS = [
    "trim --teacher a --text x.txt --out o",
    "trim --teacher=-a --text 'a b.txt' ./-c.txt --out='-o' --vocabulary train --family bpe --vocab-size 9 --no-fit",
    "trim --teacher a --text x --out o --keep-layers 0,3 --prompt '- \"q\": ' --language en,ru --license 'a b'",
    "distill --teacher a --teacher b/c --text x y --out o --preset tiny --weights kl=1,mse=0.5 --teacher-weights 1,2.5",
    "distill --teacher a --text x --out o --steps 7 --lr 1e-4 --train-projection --layer-map skip --seed 3 --prompt ''",
    "distill --teacher a --text x --out o --layers 2 --trust-remote-code --temperature 1.5 --overwrite --quiet",
]


@pytest.mark.parametrize("line", COMMANDS)
def test_the_command_makes_the_same_again(line):
    def read(line: str) -> tuple:
        args = build_parser().parse_args(shlex.split(line))
        kind = {"trim": TrimConfig, "distill": DistillConfig}[args.command]
        return args.command, kind(**{field.name: getattr(args, field.name) for field in dataclasses.fields(kind)})

    command, options = read(line)
    language, made = command_of(command, options, list(map(str, options.text)))
    assert language == "bash" and made.startswith(f"vocabdistil {command} ")
    again = read(made.removeprefix("vocabdistil ").replace("\\\n", ""))[1]
    options.overwrite = options.quiet = False
    assert [Path(file) for file in again.text] == [Path(file) for file in options.text]
    assert dataclasses.replace(again, text=options.text) == options


def test_what_no_command_says_is_a_call(tmp_path, monkeypatch):
    config = DistillConfig(teacher=["a", "b"], text=["one text"], out=tmp_path, preset=PRESET, weights="kl=1", lr=0.5)
    language, made = command_of("distill", config, None)
    assert language == "python" and "\n    weights='kl=1',\n" in made
    called = {}
    monkeypatch.setattr(vd, "distill", lambda **options: called.update(options))
    exec(made, {"texts": config.text})
    assert DistillConfig(**called) == config
    assert command_of("distill", config, ["x.txt"])[1].splitlines()[4] == "    teacher=['a', 'b'],"
    language, made = command_of("trim", TrimConfig(teacher="a", text=["one"], out="o", layers=2), None)
    assert (
        made
        == "import vocabdistil as vd\n\nvd.trim(\n    teacher='a',\n    text=texts,\n    out='o',\n    layers=2,\n)"
    )
