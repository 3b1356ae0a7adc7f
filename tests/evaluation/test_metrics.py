"""The schema of metrics.json: the files of both commands have the keys and types that it documents, and no others."""

from __future__ import annotations

import json
import re
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from typing_extensions import NotRequired, get_type_hints, is_typeddict

import vocabdistil as vd
from tests.models.tiny_decoders import tiny_decoder
from tests.models.tiny_teachers import texts, tiny_teacher
from tests.runs import PRESET
from vocabdistil.alignment.coverage import Coverage
from vocabdistil.evaluation import metrics as schema
from vocabdistil.evaluation.metrics import CausalMetrics, DistillMetrics, DraftMetrics, TrimMetrics


def unlike(value: Any, kind: Any, place: str = "metrics") -> list[str]:
    """What is not as documented, a line each: keys that are unknown or missing, values of another type.

    Args:
        value: what JSON has.
        kind: a ``TypedDict`` of this module, or another type that it names.
        place: what the lines call the value.
    """
    origin, inside = get_origin(kind), get_args(kind)
    if origin is NotRequired:
        return unlike(value, inside[0], place)
    if kind is Any:
        return []
    if origin in (Union, UnionType):
        found = [unlike(value, option, place) for option in inside]
        return min(found, key=len) if all(found) else []
    if origin is Literal:
        return [] if value in inside else [f"{place}: expected {' or '.join(map(repr, inside))}, got {value!r}"]
    if is_typeddict(kind):
        if not isinstance(value, dict):
            return [f"{place}: expected an object, got {type(value).__name__}"]
        kinds = get_type_hints(kind)
        lines = [f"{place}.{key}: unknown" for key in value.keys() - kinds.keys()]
        lines += [f"{place}.{key}: missing" for key in kind.__required_keys__ - value.keys()]
        return sorted(lines) + [
            line for key in value.keys() & kinds.keys() for line in unlike(value[key], kinds[key], f"{place}.{key}")
        ]
    if origin is dict:
        if not isinstance(value, dict):
            return [f"{place}: expected an object, got {type(value).__name__}"]
        return [line for key, item in value.items() for line in unlike(item, inside[1], f"{place}.{key}")]
    if origin is list:
        if not isinstance(value, list):
            return [f"{place}: expected a list, got {type(value).__name__}"]
        return [line for i, item in enumerate(value) for line in unlike(item, inside[0], f"{place}[{i}]")]
    kind = type(None) if kind is None else kind
    whole_will_do = kind is float and type(value) is int
    return [] if type(value) is kind or whole_will_do else [f"{place}: expected {kind.__name__}, got {value!r}"]


SMALL = {"time_batch": 2, "time_length": 12, "quiet": True, "vocab_size": 300}
TRAINED = {**SMALL, "steps": 2, "batch_size": 4, "max_length": 32, "held_out": 0.2}
LINES = [f"{text} {n}" for n in range(8) for text in texts()]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("bert", {}),
        ("bert-body", {"layers": 2}),
        ("xlm-roberta", {"vocabulary": "train", "dim": 8, "heads": 2, "prompt": "q: "}),
        ("t5", {}),
    ],
)
def test_trim_writes_what_is_documented(kind, options, tmp_path):
    teacher = tiny_teacher(kind.removesuffix("-body"), head=not kind.endswith("-body"))
    made = vd.trim(teacher=teacher, text=LINES, out=tmp_path / "student", **SMALL | options)
    assert unlike(json.loads((made.path / "metrics.json").read_text()), TrimMetrics) == []


@pytest.mark.parametrize("draft", [False, True])
def test_a_trimmed_decoder_and_a_draft_head_write_what_is_documented(draft, tmp_path):
    options = SMALL | {"vocab_size": 420, "draft": draft}
    made = vd.trim(teacher=tiny_decoder("gemma2"), text=LINES, out=tmp_path / "student", **options)
    schema = DraftMetrics if draft else TrimMetrics
    assert unlike(json.loads((made.path / "metrics.json").read_text()), schema) == []


@pytest.mark.parametrize("way", ["layers", "preset", "two teachers", "no head", "checkpoint"])
def test_distill_writes_what_is_documented(way, tmp_path):
    teacher, options = tiny_teacher("bert", head=way != "no head"), dict(TRAINED)
    if way == "preset":
        options |= {"preset": PRESET, "weights": "mse=1"}
    elif way == "two teachers":
        teacher = [teacher, tiny_teacher("roberta")]
    elif way == "checkpoint":
        options |= {"student": tiny_teacher("bert"), "vocab_size": None}
    made = vd.distill(teacher=teacher, text=LINES, out=tmp_path / "student", **options)
    assert unlike(json.loads((made.path / "metrics.json").read_text()), DistillMetrics) == []


def test_a_taught_decoder_writes_what_is_documented(tmp_path):
    options = {"steps": 2, "batch_size": 4, "max_length": 32, "held_out": 0.2, "quiet": True}
    sides = {"teacher": tiny_decoder("llama-3"), "student": tiny_decoder("gemma")}
    made = vd.distill(**sides, text=LINES, out=tmp_path / "student", **options)
    assert unlike(json.loads((made.path / "metrics.json").read_text()), CausalMetrics) == []


def test_the_settings_are_the_options(tmp_path):
    from dataclasses import fields

    from vocabdistil.distillation.trim import TrimConfig

    made = vd.trim(teacher=tiny_teacher("bert"), text=LINES, out=tmp_path / "student", **SMALL)
    assert made.metrics["settings"].keys() == {field.name for field in fields(TrimConfig)} - {"text"}


def test_unknown_missing_and_wrong_ones_are_told(tmp_path):
    found = vd.trim(teacher=tiny_teacher("bert"), text=LINES, out=tmp_path / "student", **SMALL).metrics
    assert unlike(found | {"extra": 1}, TrimMetrics) == ["metrics.extra: unknown"]
    assert unlike({key: found[key] for key in found if key != "models"}, TrimMetrics) == ["metrics.models: missing"]
    assert unlike(found | {"command": "distill"}, TrimMetrics) == ["metrics.command: expected 'trim', got 'distill'"]
    worse = json.loads(json.dumps(found))
    worse["coverage"][0]["methods"]["match"]["pears"] = worse["coverage"][0]["methods"]["match"].pop("pairs")
    place = "metrics.coverage[0].methods.match"
    assert unlike(worse, TrimMetrics) == [f"{place}.pairs: missing", f"{place}.pears: unknown"]
    worse = found | {"texts": "many", "prompt": None}
    assert sorted(unlike(worse, TrimMetrics)) == [
        "metrics.prompt: expected str, got None", "metrics.texts: expected int, got 'many'",
    ]  # fmt: skip
    known = {"warnings": ["slow"], "baselines": {"noise": {"pearson": 0.1}}}
    assert unlike(found | known, TrimMetrics) == []
    assert unlike(found | {"warnings": "slow"}, TrimMetrics) == ["metrics.warnings: expected a list, got str"]


@pytest.mark.parametrize("name", schema.__all__)
def test_every_key_is_described(name):
    kind = getattr(schema, name)
    described = re.findall(r"^ *((?:\w+, )*\w+): ", kind.__doc__.partition("Attributes:")[2], re.MULTILINE)
    assert sorted(key for names in described for key in names.split(", ")) == sorted(get_type_hints(kind))


def test_an_alignment_s_figures_are_those_of_coverage():
    want = Coverage(*[0] * 8, (), (), 0).as_dict().keys()
    assert get_type_hints(schema.MethodFigures).keys() == want
