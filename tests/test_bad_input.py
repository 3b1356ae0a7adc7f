"""Bad input: every option that cannot be is told in one line that names it, and nothing is left."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import vocabdistil as vd
from tests.models.tiny_teachers import KINDS, texts, tiny_teacher
from vocabdistil.cli import main
from vocabdistil.core.errors import VocabdistilError
from vocabdistil.distillation.recipes import LossWeights
from vocabdistil.models.students import Preset


def distinct_texts() -> list[str]:
    return [f"{text} {n}" for n in range(12) for text in texts()]


def _text(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text("\n".join(distinct_texts()), encoding="utf-8")
    return path


def _file(name: str, data: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(data)
        return path

    return make


def _folder(folder: Path) -> Path:
    path = folder / "empty"
    path.mkdir()
    return path


def _copy(folder: Path, kind: str = "bert") -> Path:
    path = folder / f"copy-of-{kind}"
    shutil.copytree(tiny_teacher(kind), path)
    return path


def _truncated(folder: Path) -> Path:
    path = _copy(folder)
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return path


def _weightless(folder: Path) -> Path:
    path = _copy(folder)
    (path / "model.safetensors").unlink()
    return path


def _decoder(folder: Path) -> Path:
    path = _copy(folder)
    (path / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    return path


def _unknown_decoder(folder: Path) -> Path:
    path = _copy(folder)
    (path / "config.json").write_text(json.dumps({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}))
    return path


def _broken_config(folder: Path) -> Path:
    path = _copy(folder)
    (path / "config.json").write_text("{")
    return path


def _broken_tokenizer(folder: Path) -> Path:
    path = _copy(folder)
    (path / "tokenizer.json").write_text("{}")
    return path


def _too_many_ids(folder: Path) -> Path:
    path = _copy(folder)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["one more"])
    tokenizer.save_pretrained(path)
    return path


def _slow(folder: Path) -> Path:
    path = _copy(folder)
    (path / "tokenizer.json").unlink()
    (path / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertJapaneseTokenizer"}')
    return path


def _custom(folder: Path) -> Path:
    path = _copy(folder)
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "own.py").write_text("raise SystemExit(9)")
    return path


def _sentence(name: str, config: dict[str, Any]) -> Callable[[Path], Path]:
    """A sentence-transformers folder with a module after the pooling."""

    def make(folder: Path) -> Path:
        path = _copy(folder)
        types = [f"sentence_transformers.models.{part}" for part in ("Transformer", "Pooling", name)]
        places = ["", "1_Pooling", "2_Last"]
        (path / "modules.json").write_text(
            json.dumps([{"type": kind, "path": place} for kind, place in zip(types, places, strict=True)])
        )
        for place, settings in (("1_Pooling", {"word_embedding_dimension": 16}), ("2_Last", config)):
            (path / place).mkdir()
            (path / place / "config.json").write_text(json.dumps(settings))
        return path

    return make


def _settings(name: str, text: str) -> Callable[[Path], Path]:
    """A sentence-transformers folder, one of whose files says something else."""

    def make(folder: Path) -> Path:
        path = _sentence("Normalize", {})(folder)
        (path / name).write_text(text)
        return path

    return make


def _tokenizer(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Path]:
    """A folder whose tokenizer is read, but can do nothing."""

    def make(folder: Path) -> Path:
        path = _copy(folder) / name
        settings = json.loads(path.read_text())
        change(settings)
        path.write_text(json.dumps(settings))
        return path.parent

    return make


def _fifo(folder: Path) -> Path:
    os.mkfifo(folder / "fifo.svg")
    return folder / "fifo.svg"


def _link(folder: Path) -> Path:
    """A symbolic link to itself."""
    (folder / "loop").symlink_to("loop")
    return folder / "loop"


def _damaged_run(folder: Path) -> Path:
    partial = folder / "out.partial"
    partial.mkdir()
    (partial / "run.json").write_text('{"identity": 5, "format": 2}')
    return folder / "out"


def _damaged_cache(folder: Path) -> Path:
    path = folder / "cache"
    path.mkdir()
    (path / "manifest.json").write_text('{"format": 1')
    return path


def _token_cache(folder: Path) -> Path:
    """A folder of another kind with a manifest."""
    path = folder / "tokens"
    path.mkdir()
    (path / "manifest.json").write_text('{"format": 2, "tokenizers": [], "shards": []}')
    return path


def _existing(folder: Path) -> Path:
    path = folder / "out"
    path.mkdir()
    (path / "mine.txt").write_text("keep")
    return path


# What stands for a path in a command line -> how it is made in a fresh folder.
PLACES: dict[str, Callable[[Path], Path]] = {
    "text": _text,
    "text-empty": _file("empty.txt", b""),
    "text-blank": _file("blank.txt", b"\n \n\t\n"),
    "text-latin1": _file("latin1.txt", "Grüße\n".encode("latin-1") * 50),
    "text-short": _file("short.txt", b"one\ntwo\n"),
    "text-rows": _file("rows.jsonl", b'{"text": "one"}\n{"body": "two"}\n'),
    "text-zip": _file("zip.txt", b"PK\x03\x04\x14\0\0\0"),
    "text-cut": _file("cut.txt", gzip.compress(b"one\ntwo\n" * 100)[:-5]),
    "pairs": _file("pairs.csv", b"one,two,1\nthree,four,2\nfive,six,0.5\n"),
    "pairs-narrow": _file("narrow.csv", b"one,two,1\nthree,four\nfive,six,0.5\n"),
    "pairs-nan": _file("nan.csv", b"a,b,score\none,two,1\nthree,four,2\nfive,six,nan\n"),
    "pairs-two": _file("two.csv", b"one,two,1\nthree,four,2\n"),
    "pairs-same": _file("same.csv", b"one,two,1\nthree,four,1\nfive,six,1.0\n"),
    "pairs-latin1": _file("latin1.csv", "one,two,1\nGrüße,four,2\n".encode("latin-1")),
    "labels": _file("labels.csv", b"text,label\none,a\ntwo,a\nthree,b\nfour,b\n"),
    "labels-single": _file("single.csv", b"text,label\none,a\ntwo,a\nthree,b\n"),
    "labels-one": _file("one.csv", b"one,a\ntwo,a\n"),
    "labels-wide": _file("wide.csv", b"one,a,b\n"),
    "lstm": _sentence("LSTM", {}),
    "weightless-dense": _sentence("Dense", {"activation_function": "torch.nn.modules.linear.Identity"}),
    "foreign-dense": _sentence("Dense", {"activation_function": "os.system"}),
    "modules-of-text": _settings("modules.json", '["Transformer", "Pooling"]'),
    "modules-without-type": _settings("modules.json", '[{"path": ""}, {"path": "1_Pooling"}]'),
    "modules-of-numbers": _settings("modules.json", '[{"type": 1, "path": 2}, {"type": 3, "path": 4}]'),
    "pooling-of-text": _settings("1_Pooling/config.json", '"mean"'),
    "pooling-of-lists": _settings("1_Pooling/config.json", '{"word_embedding_dimension": 16, "pooling_mode": [[1]]}'),
    "prompts-in-a-list": _settings("config_sentence_transformers.json", '{"prompts": ["query: "]}'),
    "prompt-of-numbers": _settings("config_sentence_transformers.json", '{"prompts": {"query": 5}}'),
    "prompt-by-a-list": _settings("config_sentence_transformers.json", '{"default_prompt_name": ["query"]}'),
    "length-of-text": _settings("sentence_bert_config.json", '{"max_seq_length": [1]}'),
    "length-of-letters": _settings("sentence_bert_config.json", '{"max_seq_length": "long"}'),
    "damaged-dense": _settings("2_Last/model.safetensors", "no tensors"),
    "no-tokens": _tokenizer("tokenizer.json", lambda settings: settings["model"].update(vocab={})),
    "nothing-unknown": _tokenizer("tokenizer.json", lambda settings: settings["model"].update(unk_token="[NOPE]")),
    "no-length": _tokenizer("tokenizer_config.json", lambda settings: settings.update(model_max_length="long")),
    "fifo": _fifo,
    "under-a-file": lambda folder: _file("file", b"data")(folder) / "out",
    "loop": _link,
    "damaged-run": _damaged_run,
    "damaged-cache": _damaged_cache,
    "cache-of-tokens": _token_cache,
    "under-nothing": lambda folder: folder / "none" / "there" / "out",
    "folder": _folder,
    "missing": lambda folder: folder / "missing" / "there",
    "truncated": _truncated,
    "weightless": _weightless,
    "decoder": _decoder,
    "unknown-decoder": _unknown_decoder,
    "broken-config": _broken_config,
    "broken-tokenizer": _broken_tokenizer,
    "too-many-ids": _too_many_ids,
    "slow": _slow,
    "custom": _custom,
    "existing": _existing,
    "copy": _copy,
    "inside": lambda folder: folder / "text.txt" / "out",
    "long": lambda folder: folder / ("a" * 300),
    "out": lambda folder: folder / "out",
    **{kind: lambda folder, kind=kind: tiny_teacher(kind) for kind in KINDS},
    "bert-body": lambda folder: tiny_teacher("bert", head=False),
}

TRIM = {"teacher": "@bert", "text": "@text", "out": "@out", "vocab-size": "240"}
DISTILL = {**TRIM, "steps": "2", "batch-size": "4", "max-length": "32"}
COVERAGE = {"teacher": "@bert", "text": "@text", "student": "@bert"}
EVALUATE = {"model": "@bert", "pairs": "@pairs", "labels": "@labels"}
BASES = {"trim": TRIM, "distill": DISTILL, "coverage": COVERAGE}
COMMANDS = {
    **BASES,
    "evaluate": EVALUATE,
    "demo": {"out": "@out"},
    "teacher": {"text": "@text", "out": "@out", "vocab-size": "300", "dim": "8", "heads": "2"},
    "loyalty": {"teacher": "@bert", "student": "@bert", "text": "@text"},
    "bench": {"": "@bert", "text": "@text"},
}

# Command, options that differ from those above (None: without this one), what the line says.
CASES: list[tuple[str, dict[str, Any], str]] = [
    # Vocabulary
    ("trim", {"vocab-size": "9"}, r"--vocab-size: expected at least the \d+ special tokens and characters .* got 9"),
    ("trim", {"vocab-size": "9", "vocabulary": "train"}, "--vocab-size: expected at least .* got 9"),
    ("distill", {"vocab-size": "9"}, "--vocab-size: expected at least .* got 9"),
    ("distill", {"vocab-size": "9", "vocabulary": "trim"}, "--vocab-size: expected at least .* got 9"),
    *(
        (command, {"vocab-size": size}, f"--vocab-size: expected a number .*, got {size}")
        for command in BASES
        for size in ("0", "-5", "99999999999999999999")
    ),
    ("trim", {"vocab-size": "1e3"}, "--vocab-size: .*1e3"),
    ("trim", {"vocabulary": "@bert"}, "--vocab-size: expected nothing beside --vocabulary .*, got 240"),
    ("trim", {"vocabulary": "@missing", "vocab-size": None}, "--vocabulary: no such folder: .*missing"),
    ("distill", {"vocabulary": "@missing", "vocab-size": None}, "--vocabulary: no such folder: .*missing"),
    ("trim", {"vocabulary": "@text", "vocab-size": None}, "--vocabulary: expected a model folder, got the file .*text"),
    ("trim", {"vocabulary": "@folder", "vocab-size": None}, "--vocabulary: no tokenizer in .*empty"),
    ("distill", {"vocabulary": "@folder", "vocab-size": None}, "--vocabulary: no tokenizer in .*empty"),
    ("trim", {"vocabulary": "@slow", "vocab-size": None}, "--vocabulary: .*slow tokenizer"),
    ("trim", {"vocabulary": "@broken-tokenizer", "vocab-size": None}, "--vocabulary: cannot load a tokenizer"),
    ("trim", {"vocabulary": ""}, "--vocabulary: expected train, trim or a folder, got nothing"),
    ("trim", {"vocabulary": "tain", "vocab-size": None}, "--vocabulary: .*tain"),
    ("trim", {"family": "unigram"}, "--family: expected none without --vocabulary train, got unigram"),
    ("distill", {"family": "sentencepiece"}, "--family: expected wordpiece, .* or unigram, got 'sentencepiece'"),
    ("distill", {"family": ""}, "--family: expected wordpiece, .* or unigram, got ''"),
    # The body
    ("trim", {"layers": "0"}, "--layers: expected a number above 0, got 0"),
    ("trim", {"layers": "-1"}, "--layers: expected a number above 0, got -1"),
    ("trim", {"layers": "5"}, "--layers: expected a number from 1 to 4, .*got 5"),
    ("distill", {"layers": "99"}, "--layers: expected a number from 1 to 4, .*got 99"),
    ("trim", {"layers": "2", "keep-layers": "0,3"}, "--keep-layers: expected none where --layers .*got 0,3"),
    *(
        (command, {"keep-layers": layers}, f"--keep-layers: expected ascending layers from 0 to 3.*got '?{layers}'?$")
        for command in ("trim", "distill")
        for layers in ("5,2", "0,0", "a,b", "0,99", "", "1,,2", "-1,2", "0 1", "1.5")
    ),
    ("trim", {"keep-layers": "0,१"}, "--keep-layers: expected ascending"),
    ("trim", {"keep-layers": "9" * 5000}, "--keep-layers: expected ascending"),
    ("trim", {"teacher": "@modernbert", "vocab-size": "420", "keep-layers": "1,2"}, "--keep-layers: .*got 1,2"),
    ("trim", {"dim": "12", "heads": "5"}, "--heads: expected a number from 1 to 2.*got 5"),
    ("trim", {"dim": "9", "heads": "2"}, "--heads: expected a number that divides the width 9, got 2"),
    ("trim", {"teacher": "@mpnet", "heads": "1"}, "--heads: expected 2, the teacher's.*got 1"),
    ("trim", {"dim": "17"}, "--dim: expected a number from 1 to 16, .*got 17"),
    ("trim", {"dim": "0"}, "--dim: expected a number above 0, got 0"),
    ("trim", {"heads": "-2"}, "--heads: expected a number above 0, got -2"),
    ("trim", {"ffn": "33"}, "--ffn: expected a number from 1 to 32, .*got 33"),
    ("trim", {"ffn": "4294967297"}, "--ffn: expected a number .*got 4294967297"),
    *(
        ("trim", {"teacher": f"@{kind}", name: "1", "vocab-size": None}, f"--{name}: expected .*no rule makes .*got 1")
        for kind in ("deberta-v3", "modernbert", "t5", "albert")
        for name in ("dim", "heads", "ffn")
    ),
    ("trim", {"dim": "8", "no-fit": True}, "--dim: expected none with --no-fit, .* got 8"),
    ("distill", {"ffn": "8", "no-fit": True}, "--ffn: expected none with --no-fit, .* got 8"),
    # Teachers
    *(
        (command, {"teacher": place}, f"--teacher: {message}")
        for command in BASES
        for place, message in (
            ("@missing", "no such folder: .*missing"),
            ("@text", "expected a model folder, got the file .*text.txt"),
            ("@folder", "no tokenizer in .*empty"),
            ("@slow", ".*slow tokenizer"),
            ("@broken-tokenizer", "cannot load a tokenizer from .*copy"),
            ("", "expected .*got"),
            ("no-such-name", "cannot load .*no-such-name"),
            ("a\0b", "expected .*got"),
            ("a" * 5000, "expected .*got"),
        )
    ),
    *(
        (command, {"teacher": place}, f"--teacher: {message}")
        for command in ("trim", "distill")
        for place, message in (
            ("@weightless", "cannot load a model from .*copy"),
            ("@truncated", "cannot load a model from .*copy"),
            ("@unknown-decoder", ".*has model_type 'mamba'; expected an encoder"),
            ("@broken-config", "cannot load .*copy"),
            ("@too-many-ids", r"the tokenizer of .* has ids up to \d+, its model \d+ embeddings"),
            ("@custom", ".*needs code of its own to load .*; --trust-remote-code runs it"),
        )
    ),
    ("trim", {"teacher": ["@bert", "@bert"]}, "--teacher: expected one, got 2"),
    ("trim", {"draft": True}, "--draft: expected a decoder to make a draft head of, got bert"),
    ("distill", {"teacher": "@decoder"}, "--student: expected the folder of a decoder, as the teacher is .*, got none"),
    *(
        (command, {"teacher" if command == "trim" else "model": f"@{place}"}, message)
        for command in ("trim", "evaluate")
        for place, message in (
            *(
                (place, ": cannot read the sentence-transformers settings of .*copy-of-bert: ")
                for place in (
                    "modules-of-text",
                    "modules-without-type",
                    "modules-of-numbers",
                    "pooling-of-text",
                    "pooling-of-lists",
                    "prompts-in-a-list",
                    "prompt-of-numbers",
                    "prompt-by-a-list",
                    "length-of-text",
                    "length-of-letters",
                )
            ),
            ("no-tokens", ": cannot load a tokenizer from .*copy-of-bert: "),
            ("nothing-unknown", ": cannot load a tokenizer from .*copy-of-bert: "),
            ("no-length", ": cannot load a tokenizer from .*copy-of-bert: "),
        )
    ),
    ("trim", {"teacher": "~nobody-of-this-name/model"}, "--teacher: no such folder: ~nobody"),
    ("trim", {"teacher": "@loop"}, "--teacher: no such folder: .*loop|--teacher: expected .*symbolic links"),
    ("trim", {"out": "@loop"}, "--out: .*loop"),
    ("distill", {"out": "@damaged-run", "resume": True}, "--resume: .*out.partial holds no run to continue"),
    ("distill", {"out": "@damaged-run"}, "--out: .*out.partial holds an interrupted run; --resume continues it"),
    (
        "distill",
        {"out": "@damaged-run", "cache-teacher": "@missing", "recipe": "embedding"},
        "--out: .*out.partial holds an interrupted run",
    ),
    ("distill", {"cache-teacher": "@damaged-cache", "recipe": "embedding"}, "--cache-teacher: .*json is damaged: "),
    ("distill", {"cache-teacher": "@cache-of-tokens", "recipe": "embedding"}, "--cache-teacher: .*json is damaged: "),
    ("distill", {"cache-teacher": "@bert", "recipe": "embedding"}, "--cache-teacher: .*bert has other files and no "),
    ("distill", {"cache-teacher": "@text", "recipe": "embedding"}, "--cache-teacher: .*text.txt is not a folder"),
    ("distill", {"cache-teacher": "@folder", "recipe": "embedding", "resume": True}, "--resume: no interrupted run"),
    *(
        (command, {"out": "@under-nothing", "vocab-size": "9"}, "--vocab-size: expected at least .* got 9")
        for command in ("trim", "distill")
    ),
    *(
        ("distill", {"cache-teacher": place, "recipe": "embedding", "out": "out"}, f"--out: .* holds {place}, which")
        for place in ("out", "out/cache", "out.partial", "out.partial/cache")
    ),
    ("trim", {"language": "en,\udc80"}, "--language: expected text that UTF-8 can hold"),
    ("trim", {"license": "\udc80"}, "--license: expected text that UTF-8 can hold"),
    ("demo", {"out": "@loop"}, "--out: .*loop"),
    ("demo", {"out": "@under-a-file"}, "--out: cannot make .*out"),
    ("demo", {"out": "/proc/none/out"}, "--out: cannot make /proc/none/out"),
    ("demo", {"seed": "-1"}, "--seed: expected a number from 0, got -1"),
    ("teacher", {"heads": "3"}, r"--heads: expected a divisor of --dim \(8\), got 3"),
    ("teacher", {"text": "@missing"}, "--text: no such file: .*missing"),
    ("teacher", {"cased": True, "steps": "1e3"}, "--steps: expected a whole number, got '1e3'"),
    ("bench", {"text": "@missing"}, "--text: no such file: .*missing"),
    ("bench", {"text": "@text", "length": "16.5"}, "--length: expected a whole number, got '16.5'"),
    ("loyalty", {"student": "@missing"}, "--student: no such folder: .*missing"),
    ("loyalty", {"texts": "2"}, "--texts: expected a number above 2, got 2"),
    ("trim", {"prompt": "query \udc80"}, "--prompt: expected .*got"),
    ("distill", {"prompt": "query \udc80"}, "--prompt: expected .*got"),
    # Text
    *(
        (command, {"text": place}, f"--text: {message}")
        for command in BASES
        for place, message in (
            ("@missing", "no such file: .*missing"),
            ("@folder", "not a file: .*empty"),
            ("@text-empty", ".*empty.txt is empty"),
            ("@text-blank", ".*blank.txt is empty"),
            ("@text-latin1", ".*is not UTF-8: byte 0xfc at offset 2"),
            ("@text-rows", r".*rows.jsonl:2: expected a JSON object with a string .text., got .*two"),
            ("@text-zip", ".*zip.txt is a zip archive, no text"),
            ("@text-cut", ".*cut.txt is damaged: "),
            ("", "expected .*got"),
            ("a" * 5000, "expected .*got"),
        )
    ),
    ("trim", {"text": ["@text", "@missing"]}, "--text: no such file: .*missing"),
    ("trim", {"text": ["@text", "@text-empty"]}, "--text: .*empty.txt is empty"),
    ("distill", {"text": "@text-short"}, "--text: too little text: 2 examples"),
    *((command, {"unit": "word"}, "--unit: expected .*got 'word'") for command in BASES),
    # Output
    *(
        (command, {"out": place}, f"--out: {message}")
        for command in ("trim", "distill")
        for place, message in (
            ("@existing", ".*out exists; --overwrite replaces it"),
            ("", "expected the name of a folder, got"),
            (".", ". holds .*text.txt, which the run reads"),
            ("/", "/ holds .*bert, which the run reads"),
            ("..", ".. holds .*text.txt, which the run reads"),
            ("@long", "expected the name of a folder, got .*: File name too long"),
            ("@inside", "cannot make .*text.txt"),
            ("a\0b", "expected .*got"),
        )
    ),
    ("trim", {"teacher": "@copy", "out": "@copy", "overwrite": True}, "--out: .* holds .*, which the run reads"),
    ("distill", {"teacher": "@copy", "out": "@copy", "overwrite": True}, "--out: .* holds .*, which the run reads"),
    ("trim", {"out": "@text", "overwrite": True}, "--out: .*"),
    # Numbers
    *(
        ("distill", {name: value}, f"--{name}: .*{message or value}")
        for name, values in {
            "temperature": ("1e-30", "nan", "0", "-1", "inf", "x"),
            "lr": ("nan", "0", "-1", "inf", "x"),
            "held-out": ("0", "1", "nan", "-1", "x"),
            "epochs": ("0", "nan", "inf", "-1"),
            "steps": ("0", "-1", "1.5", "99999999999999999999"),
            "batch-size": ("0", "-1", "100000000000"),
            "save-every": ("0", "-1"),
            "log-every": ("0", "-1"),
            "warmup": ("1", "-0.1", "nan"),
            "weight-decay": ("nan", "-1", "inf"),
            "student-max-length": ("1", "2", "-1", "99999999999999999999"),
            "teacher-weights": ("inf", "nan", "0", "-1", "a", ""),
            "weights": ("kl=-1", "kl=nan", "kl=inf", "kl=0,logits=0,mlm=0"),
            "logits": ("junk", ""),
            "layer-map": ("junk", ""),
            "preset": ("junk", ""),
            "device": ("junk", "", "cuda:1"),
            "precision": ("junk", "fp16"),
        }.items()
        for value in values
        for message in ["expected numbers of at least 0, one above" if name == "weights" else ""]
    ),
    *(
        (command, {name: value}, f"--{name}: .*{value}")
        for command in ("trim", "distill")
        for name, values in {
            "max-length": ("1", "2", "-3", "x", "99999999999999999999"),
            "whiten": ("1", "-0.1", "nan", "x"),
            "seed": ("-1", "4294967296", "x"),
            "threads": ("0", "-1", "1000000", "99999999999999999999"),
            "time-batch": ("0", "-1", "99999999999999999999"),
            "time-length": ("0", "-1", "99999999999999999999"),
        }.items()
        for value in values
    ),
    ("distill", {"temperature": "1e30"}, r"--temperature: .*got 1e\+30"),
    ("distill", {"teacher-weights": "1,2"}, r"--teacher-weights: expected one number above 0 per teacher, got \[1"),
    ("distill", {"weights": "junk"}, "--weights: unknown loss 'junk'; expected kl, "),
    ("distill", {"weights": "=1"}, "--weights: unknown loss ''; expected kl, "),
    ("distill", {"weights": "kl"}, "--weights: kl: expected a number, got ''"),
    # What does not go together
    ("distill", {"whiten": "0.3"}, "--whiten: .* cannot be whitened: its MLM head"),
    ("trim", {"teacher": "@t5", "whiten": "0.3"}, "--whiten: .* cannot be whitened: the layers of t5"),
    ("distill", {"teacher": "@bert-body", "logits": "match"}, "--logits: match needs a teacher with an MLM head"),
    ("distill", {"teacher": "@t5", "logits": "reduce"}, "--logits: reduce needs a teacher with an MLM head"),
    *(
        ("distill", {"preset": "tiny", name: value}, f"--{name}: expected none with --preset, got {value}")
        for name, value in (("layers", "2"), ("dim", "8"), ("heads", "2"), ("ffn", "8"), ("keep-layers", "0,1"))
    ),
    ("distill", {"student": "@bert", "preset": "tiny"}, "--student: expected none with --preset, got"),
    ("distill", {"student": "@bert"}, "--vocab-size: expected none with --student.*got 240"),
    ("distill", {"student": "@bert", "vocab-size": None, "vocabulary": "trim"}, "--vocabulary: .*got trim"),
    ("distill", {"student": "@missing", "vocab-size": None}, "--student: no such folder: .*missing"),
    ("distill", {"student": "", "vocab-size": None}, "--student: expected .*got"),
    ("distill", {"student": "@truncated", "vocab-size": None}, "--student: cannot load a model"),
    ("distill", {"resume": True}, "--resume: no interrupted run at .*out.partial"),
    # Coverage
    ("coverage", {"text": None}, "--text: expected a file, or --show with a text, got neither"),
    ("coverage", {"text": None, "student": None, "show": "a"}, "--student: expected a tokenizer, or --text"),
    ("coverage", {"method": "junk"}, "--method: expected .*got 'junk'"),
    ("coverage", {"student": "@missing"}, "--student: no such folder"),
    ("coverage", {"student": "@folder"}, "--student: no tokenizer in"),
    ("coverage", {"student": "@slow"}, "--student: .*slow tokenizer"),
    ("coverage", {"student": ""}, "--student: expected .*got"),
    ("coverage", {"student": None, "vocab-size": "9"}, "--vocab-size: expected at least .*got 9"),
    ("coverage", {"html": "@inside"}, "--html: expected a file to write, in a folder, got .*out"),
    ("coverage", {"html": "@long"}, "--html: expected a file to write, got .*aaa.*: File name too long"),
    ("coverage", {"html": "@folder"}, "--html: expected a file to write, in a folder, got .*empty"),
    ("coverage", {"html": "@fifo"}, "--html: expected a file to write, in a folder, got .*fifo"),
    ("coverage", {"html": ""}, "--html: expected a file to write, got nothing"),
    ("coverage", {"show": "a\udc80"}, "--show: expected .*got"),
    *(
        ("coverage", {"worst": value}, f"--worst: expected a .*number.*{value}")
        for value in ("0", "-1", "1.5", "x", "", "99999999999999999999")
    ),
    ("coverage", {"text": None, "show": "a", "worst": "3"}, "--worst: expected --text, to find them in, got none"),
    # Evaluate
    ("evaluate", {"model": None}, "arguments are required: --model"),
    ("evaluate", {"pairs": None, "labels": None}, "--pairs: expected a file here or with --labels, got neither"),
    *(
        ("evaluate", {"model": ["@bert", place]}, f"--model: {message}")
        for place, message in (
            ("@missing", "no such folder: .*missing"),
            ("@text", "expected a model folder, got the file .*text.txt"),
            ("@folder", "no tokenizer in .*empty"),
            ("@slow", ".*slow tokenizer"),
            ("@truncated", "cannot load a model from .*copy"),
            ("@decoder", ".*has model_type 'gpt2'; expected an encoder"),
            ("@custom", ".*needs code of its own to load .*; --trust-remote-code runs it"),
            ("@lstm", "expected sentence-transformers modules .*got Transformer, Pooling, LSTM"),
            ("@damaged-dense", "cannot load weights from .*2_Last/model.safetensors: "),
            ("@weightless-dense", "cannot make vectors as the folder .*copy-of-bert says: it has no 'linear.weight'"),
            ("@foreign-dense", "cannot make vectors as .*the activation os.system, which is none of torch.nn"),
            ("", "expected a folder or a model's name, got nothing"),
            ("no-such-name", "cannot load .*no-such-name"),
            ("a\0b", "expected .*got"),
            ("a" * 5000, "expected .*got"),
        )
    ),
    *(
        ("evaluate", {name: place}, f"--{name}: {message}")
        for name in ("pairs", "labels")
        for place, message in (
            ("@missing", "no such file: .*there"),
            ("@folder", "not a file: .*empty"),
            ("@text-empty", ".*empty.txt: expected at least"),
            ("@text", r".*text.txt:\d+: expected . columns"),
            ("", "expected a file, got nothing"),
            ("a" * 5000, "expected a CSV file, got"),
            ("a\0b", "expected a CSV file, got"),
        )
    ),
    ("evaluate", {"pairs": ["@pairs", "@missing"]}, "--pairs: no such file: .*there"),
    ("evaluate", {"pairs": "@pairs-narrow"}, r"--pairs: .*narrow.csv:2: expected 3 columns .*, got 2"),
    ("evaluate", {"pairs": "@pairs-nan"}, r"--pairs: .*nan.csv:4: expected a finite number as the score, got 'nan'"),
    ("evaluate", {"pairs": "@pairs-two"}, r"--pairs: .*two.csv: expected at least 3 pairs, got 2"),
    ("evaluate", {"pairs": "@pairs-same"}, r"--pairs: .*same.csv: expected scores that differ, got 1 for every pair"),
    ("evaluate", {"pairs": "@pairs-latin1"}, r"--pairs: .*latin1.csv:2: not UTF-8: byte 0xfc"),
    ("evaluate", {"pairs": "@labels"}, r"--pairs: .*labels.csv:1: expected 3 columns .*, got 2"),
    ("evaluate", {"labels": "@labels-single"}, r"--labels: .*single.csv:4: expected at least 2 texts .*got 1 of 'b'"),
    ("evaluate", {"labels": "@labels-one"}, r"--labels: .*one.csv: expected at least 2 classes, got 1"),
    ("evaluate", {"labels": "@labels-wide"}, r"--labels: .*wide.csv:1: expected 2 columns \(text, label\), got 3"),
    ("distill", {"dev": "@pairs-nan"}, r"--dev: .*nan.csv:4: expected a finite number as the score, got 'nan'"),
    ("evaluate", {"prompt": "query \udc80"}, "--prompt: expected text that UTF-8 can hold"),
    *(
        ("evaluate", {name: value}, f"--{name}: .*{value}")
        for name, values in {
            "max-length": ("2", "-3", "x", "1.5", "99999999999999999999"),
            "seed": ("-1", "4294967296", "x"),
            "threads": ("0", "-1", "1000000"),
        }.items()
        for value in values
    ),
    ("evaluate", {"picture": "@missing"}, "--picture: expected an .svg or .png file to write, got .*there"),
    ("evaluate", {"picture": "@fifo"}, "--picture: expected an .svg or .png file to write, in a folder, got .*fifo"),
    ("evaluate", {"picture": ""}, "--picture: expected an .svg or .png file to write, got nothing"),
    ("evaluate", {"picture": "a.pdf"}, "--picture: expected an .svg or .png file to write, got a.pdf"),
    ("evaluate", {"picture": "none/a.svg"}, "--picture: expected an .svg or .png file .*, in a folder, got none/a.svg"),
]


class Places:
    """Files and folders of one test, made when they are first named."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made = folder, {}

    def __call__(self, value: str) -> str:
        if not value.startswith("@"):
            return value
        if value not in self.made:
            self.made[value] = PLACES[value[1:]](self.folder)
        return str(self.made[value])

    def contents(self) -> dict[Path, tuple[bytes | None, int]]:
        """What is in the folder, and when it was changed."""
        return {
            path: (path.read_bytes() if path.is_file() else None, path.lstat().st_mtime_ns)
            for path in self.folder.rglob("*")
        }


def command_line(command: str, changes: dict[str, Any], places: Places) -> list[str]:
    argv = [command]
    for name, value in {**COMMANDS[command], **changes}.items():
        values = [places(item) for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]
        if value is True:
            argv.append(f"--{name}")
        elif name == "text" and values:
            argv += ["--text", *values]
        elif not name:
            argv += values
        else:
            argv += [f"--{name}={item}" for item in values]
    return argv


def name_of(case: tuple[str, dict[str, Any], str]) -> str:
    changes = ",".join(f"{name}={value!r:.20}" for name, value in case[1].items())
    return f"{case[0]}:{changes}".encode("ascii", "replace").decode()


def shown(value: object) -> str:
    """The same in every process: without addresses."""
    text = re.sub("0x[0-9a-f]+", "", repr(value))[:40]
    return text.encode("ascii", "replace").decode()


@pytest.mark.parametrize(("command", "changes", "message"), CASES, ids=map(name_of, CASES))
def test_one_line_and_nothing_left(tmp_path, capsys, monkeypatch, command, changes, message):
    monkeypatch.chdir(tmp_path)
    places = Places(tmp_path)
    argv = command_line(command, changes, places)
    capsys.readouterr()
    before = places.contents()
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert re.search(message, captured.err), captured.err
    assert len(captured.err) < 1000
    assert places.contents() == before


_WATCHED = """
import json, sys
from vocabdistil.cli import main
for argv in json.load(sys.stdin):
    assert main(argv) == 2, argv
    assert not {"torch", "transformers"} & set(sys.modules), argv
"""


def test_what_files_tell_is_told_before_torch_is_imported(tmp_path):
    lines: list[tuple[str, dict[str, Any]]] = [
        *(
            (command, {option: place})
            for command, option in (("trim", "teacher"), ("distill", "teacher"), ("evaluate", "model"))
            for place in (
                "@folder", "@broken-tokenizer", "@no-tokens", "@broken-config", "@unknown-decoder", "@weightless",
                "@truncated", "@too-many-ids", "no-such-name",
            )
        ),
        *((command, {option: "@decoder"}) for command, option in (("distill", "teacher"), ("evaluate", "model"))),
        ("trim", {"draft": True}),
        ("distill", {"student": "@truncated", "vocab-size": None}),
        ("coverage", {"student": "@broken-tokenizer"}),
        ("trim", {"vocabulary": "@broken-tokenizer", "vocab-size": None}),
        ("trim", {"layers": "5"}),
        ("distill", {"keep-layers": "0,9"}),
        ("trim", {"dim": "9", "heads": "2"}),
        ("trim", {"teacher": "@mpnet", "heads": "1"}),
        ("trim", {"teacher": "@modernbert", "keep-layers": "1,2"}),
        *((command, {"text": place}) for command in BASES for place in ("@text-empty", "@text-latin1", "@text-zip")),
        *(
            ("evaluate", {"pairs": f"@{place}"})
            for place in ("missing", "pairs-narrow", "pairs-nan", "pairs-two", "pairs-same", "pairs-latin1")
        ),
        *(("evaluate", {"labels": f"@labels-{name}"}) for name in ("single", "one", "wide")),
        ("distill", {"dev": "@pairs-nan"}),
        *(
            (command, {option: f"@{place}"})
            for command, option in (("trim", "teacher"), ("loyalty", "student"), ("evaluate", "model"))
            for place in ("lstm", "modules-of-numbers", "pooling-of-text", "prompt-by-a-list", "length-of-text")
        ),
        *((command, {option: "@custom"}) for command, option in (("trim", "teacher"), ("evaluate", "model"))),
        ("trim", {"teacher": "@no-length"}),
        ("distill", {"out": "@inside"}),
        ("distill", {"resume": True}),
        ("distill", {"out": "@damaged-run", "resume": True}),
        ("distill", {"out": "@damaged-run"}),
        ("teacher", {"out": "@damaged-run"}),
        ("demo", {"out": "/proc/none/out"}),
        *(
            ("distill", {"cache-teacher": place, "recipe": "embedding"})
            for place in ("@damaged-cache", "@cache-of-tokens", "@bert", "@text")
        ),
    ]  # fmt: skip
    folders = [tmp_path / str(i) for i in range(len(lines))]
    for folder in folders:
        folder.mkdir()
    argvs = [
        command_line(command, changes, Places(folder))
        for (command, changes), folder in zip(lines, folders, strict=True)
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", _WATCHED], input=json.dumps(argvs), env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("\n") == len(lines)


@pytest.mark.parametrize("teach", [vd.trim, vd.distill])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": ["a text", 5]}, "text: expected strings, or rows with a column 'text', got int at 1"),
        ({"text": ["a text", None]}, "text: .*got NoneType at 1"),
        ({"text": ["a text", b"bytes"]}, "text: .*got bytes at 1"),
        ({"text": [{"words": "a"}]}, "text: .*got NoneType at 0|text: .*got dict at 0"),
        ({"text": [1.5]}, "text: .*got float at 0"),
        ({"text": []}, "text: expected at least one"),
        ({"text": iter([])}, "text: expected at least one text, got none"),
        ({"text": [" ", "\n"]}, "text: expected at least one text, got none"),
        ({"text": {"text": ["a"]}}, "text: expected files or a list of texts, got dict"),
        ({"text": None}, "text: expected files or a list of texts, got NoneType"),
        ({"text": 5}, "text: expected files or a list of texts, got int"),
        ({"text": b"a text"}, "text: expected .*got"),
        ({"text": ""}, "text: expected a file, got nothing"),
        ({"text": "a text " * 1000}, "text: expected a file, got"),
        ({"text": ["a text", "\ud800 half a pair"]}, r"text: expected text that UTF-8 can hold, got .* at 1"),
        ({"teacher": None}, "teacher: expected a folder or a model's name, got NoneType"),
        ({"teacher": []}, "teacher: expected at least one, got none"),
        ({"teacher": [3]}, "teacher: expected a folder or a model's name, got int"),
        ({"teacher": {"a": 1}}, "teacher: expected a folder or a model's name, got dict"),
        ({"out": None}, "out: expected the name of a folder, got NoneType"),
        ({"out": 5}, "out: expected the name of a folder, got int"),
        ({"out": "a\nb/\0"}, "out: expected the name of a folder, got"),
        ({"vocabulary": ""}, "vocabulary: expected train, trim or a folder, got"),
        ({"vocabulary": 8000}, "vocabulary: expected train, trim or a folder, got int"),
        ({"vocab_size": "150"}, "vocab_size: expected a whole number, got '150'"),
        ({"vocab_size": 150.0}, "vocab_size: expected a whole number, got 150.0"),
        ({"vocab_size": True}, "vocab_size: expected a whole number, got True"),
        ({"vocab_size": float("nan")}, "vocab_size: expected a whole number, got nan"),
        ({"family": ["bpe"], "vocabulary": "train"}, "family: expected wordpiece, "),
        ({"layers": 1.5}, "layers: expected a whole number, got 1.5"),
        ({"fit": "no"}, "fit: expected True or False, got 'no'"),
        ({"quiet": 1}, "quiet: expected True or False, got 1"),
        ({"fit": False, "dim": 8}, "dim: expected none with fit=False, .* got 8"),
        ({"layers": 1, "keep_layers": [0]}, "keep_layers: expected none where layers says how many, got 0"),
        ({"family": "bpe", "vocabulary": "trim"}, "family: expected none without vocabulary='train', got bpe"),
        ({"layers": [0, 1]}, r"layers: expected a whole number, got \[0, 1\]"),
        ({"keep_layers": []}, "keep_layers: expected ascending layers from 0 to 3"),
        ({"keep_layers": [0.0, 3.0]}, "keep_layers: expected ascending layers from 0 to 3"),
        ({"keep_layers": [3, 0]}, "keep_layers: expected ascending layers from 0 to 3"),
        ({"keep_layers": [-1]}, "keep_layers: expected ascending layers from 0 to 3"),
        ({"keep_layers": 3}, "keep_layers: expected layers with commas between them, got 3"),
        ({"dim": float("nan")}, "dim: expected a whole number, got nan"),
        ({"heads": "2"}, "heads: expected a whole number, got '2'"),
        ({"ffn": None, "dim": -8}, "dim: expected a number above 0, got -8"),
        ({"prompt": 5}, "prompt: expected text, got int"),
        ({"prompt": "\ud800"}, "prompt: expected text that UTF-8 can hold"),
        ({"language": 5}, "language: expected codes such as en, got 5"),
        ({"language": ["ru", 5]}, "language: expected text, got int"),
        ({"license": 5}, "license: expected text, got int"),
        ({"max_length": 64.0}, "max_length: expected a whole number, got 64.0"),
        ({"max_length": 1}, "max_length: expected a number above 2, got 1"),
        ({"unit": None}, "unit: expected line or paragraph, got None"),
        ({"unit": ["line"]}, "unit: expected line or paragraph, got"),
        ({"seed": float("nan")}, "seed: expected a .*, got nan"),
        ({"seed": "0"}, "seed: expected a whole number, got '0'"),
        ({"seed": 0.5}, "seed: expected a whole number, got 0.5"),
        ({"seed": None}, "seed: expected a whole number, got None"),
        ({"threads": 1.0}, "threads: expected a whole number, got 1.0"),
        ({"time_batch": None}, "time_batch: expected a whole number, got None"),
        ({"time_length": "64"}, "time_length: expected a whole number, got '64'"),
        ({"time_batch": 2**11, "time_length": 2**11}, "time_batch: expected a number up to 512, got 2048"),
    ],
    ids=shown,
)
def test_in_python(tmp_path, monkeypatch, teach, changes, message):
    monkeypatch.chdir(tmp_path)
    options = {"teacher": tiny_teacher("bert"), "text": distinct_texts(), "out": "out", "vocab_size": 240}
    with pytest.raises(VocabdistilError, match=message) as caught:
        teach(**{**options, "quiet": True, **changes})
    assert "\n" not in str(caught.value) and "--" not in str(caught.value) and len(str(caught.value)) < 1000
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": ["tiny"]}, "preset: expected base, small"),
        ({"preset": Preset(2, 25, 4, 48, 150)}, r"preset: heads: expected a divisor of dim \(25\), got 4"),
        ({"preset": Preset(0, 24, 4, 48, 150)}, "preset: layers: expected a number above 0, got 0"),
        ({"preset": Preset(2, 24, 4, 48.5, 150)}, "preset: ffn: expected a whole number, got 48.5"),
        ({"student": 5}, "student: expected a folder or a model's name, got int"),
        ({"steps": "3"}, "steps: expected a whole number, got '3'"),
        ({"steps": float("nan")}, "steps: expected a whole number, got nan"),
        ({"epochs": "3"}, "epochs: expected a number above 0, got '3'"),
        ({"epochs": 1e30}, "epochs: "),
        ({"batch_size": 4.0}, "batch_size: expected a whole number, got 4.0"),
        ({"lr": "1e-4"}, "lr: expected a number above 0, got '1e-4'"),
        ({"warmup": 1.0}, "warmup: expected a share from 0 to below 1, got 1.0"),
        ({"schedule": "cosin"}, "schedule: expected linear, cosine or constant, got 'cosin'"),
        ({"recipe": "papr"}, "recipe: expected auto, embedding, masked, paper,"),
        ({"recipe": None}, "recipe: expected auto, embedding, masked, paper,"),
        ({"minutes": 0}, "minutes: expected a number above 0, got 0"),
        ({"minutes": "5"}, "minutes: expected a number above 0, got '5'"),
        ({"minutes": 5, "steps": 3}, "minutes: expected none where steps says how long, got 5"),
        ({"accumulate": 0}, "accumulate: expected"),
        ({"accumulate": 1.5}, "accumulate: expected"),
        ({"patience": 0}, "patience: expected"),
        ({"dev": ""}, "dev: expected a CSV file"),
        ({"cache_teacher": ""}, "cache_teacher: expected a folder"),
        ({"temperature": "2"}, "temperature: expected a number above 0"),
        ({"weight_decay": None}, "weight_decay: expected a number of at least 0, got None"),
        ({"weights": {"kl": 1}}, "weights: expected LossWeights or their text form, got dict"),
        ({"weights": None}, "weights: expected LossWeights or their text form, got NoneType"),
        ({"weights": LossWeights(kl=float("nan"))}, "weights: expected numbers of at least 0, one above"),
        ({"weights": LossWeights(kl="1")}, "weights: expected numbers of at least 0, one above"),
        ({"logits": ["match"]}, "logits: expected match, reduce"),
        ({"teacher_weights": 1.0}, "teacher_weights: expected one number above 0 per teacher, got 1.0"),
        ({"teacher_weights": [float("nan")]}, "teacher_weights: expected one number above 0 per teacher"),
        ({"teacher_weights": ["1"]}, "teacher_weights: expected one number above 0 per teacher"),
        ({"layer_map": "lst"}, "layer_map: expected last, skip"),
        ({"held_out": "0.1"}, "held_out: expected a share between 0 and 1, got '0.1'"),
        ({"held_out": None}, "held_out: expected a share between 0 and 1, got None"),
        ({"device": None}, "device: expected auto, cpu or cuda, got None"),
        ({"precision": 16}, "precision: expected fp32 or bf16, got 16"),
        ({"save_every": None}, "save_every: expected a whole number, got None"),
        ({"student_max_length": 64.0}, "student_max_length: expected a whole number, got 64.0"),
    ],
    ids=shown,
)
def test_training_options_in_python(tmp_path, changes, message):
    options = {"teacher": tiny_teacher("bert"), "text": distinct_texts(), "out": tmp_path / "out", "quiet": True}
    with pytest.raises(VocabdistilError, match=f"^{message}") as caught:
        vd.distill(**options | changes)
    assert "--" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_training_that_diverges(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = Places(tmp_path)
    argv = command_line("distill", {"lr": "1e30", "steps": "4", "quiet": True}, places)
    before = places.contents()
    capsys.readouterr()
    assert main(argv) == 2
    assert re.match("vocabdistil: --lr: the training diverged", capsys.readouterr().err)
    assert places.contents() == before


def test_a_vocabulary_larger_than_the_text_supports_is_a_note(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = command_line("trim", {"vocab-size": "2147483647", "time-length": "8"}, Places(tmp_path))
    assert main(argv) == 0
    captured = capsys.readouterr()
    size = len(AutoTokenizer.from_pretrained(tmp_path / "out"))
    assert size == len(AutoTokenizer.from_pretrained(tiny_teacher("bert")))
    assert f"has only {size} tokens: all of them are kept" in captured.out
