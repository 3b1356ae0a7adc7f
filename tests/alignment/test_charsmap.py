"""Alignments with the normalizer of real SentencePiece models (T5, XLM-R): a compiled map of characters."""

from __future__ import annotations

import functools
import io
import struct
from collections.abc import Iterator

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

import vocabdistil as vd
from tests._families import FAMILIES, family, many_scripts
from tests.alignment import test_boundary

sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")

FOLDED = [
    "ﬁnal eﬃcient oﬀer",
    "ＡＢＣ１２３！ ｱｲｳ ｶﾞｷﾞ ﾊﾟ",
    "½ cup, 3¼ ² ³ ① ⑳",
    "a\u3000b\u3000\u3000c\u00a0d\u2009e",
    "zero\u200bwidth\u200cnon\u200djoiner\ufeff bom\u00ad",
    "e\u0301 é n\u0303o ǆ Ⅷ ㎏ ㍿ ™ ℃ … ‥",
    "한국어 \u1112\u1161\u11ab 각",
    "a\x00b\x07c\x7f d\u0085e \ufffd",
    "\r\n\ttabs and lines\u2028here",
    "﷽ ﷺ",
    "walk" + "ﬁ" * 30,
]


def fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and content of the fields of a message in the wire format of Protocol Buffers."""

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            value |= (data[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if data[at - 1] < 128:
                return value, at

    at = 0
    while at < len(data):
        tag, at = varint(at)
        if tag & 7 == 0:
            start = at
            _, at = varint(at)
        else:
            size, start = {1: (8, at), 5: (4, at)}.get(tag & 7) or varint(at)
            at = start + size
        yield tag >> 3, data[start:at]


@functools.cache
def charsmap_model(rule: str, kind: str = "unigram") -> Tokenizer:
    """A tokenizer as ``transformers`` converts it from a SentencePiece model that was trained with ``rule``."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(many_scripts() + FOLDED), model_writer=out, vocab_size=420, model_type=kind,
        normalization_rule_name=rule, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    pieces, charsmap = [], b""
    for number, content in fields(out.getvalue()):
        if number == 1:
            piece = dict(fields(content))
            pieces.append((piece[1].decode(), struct.unpack("<f", piece[2])[0]))
        elif number == 3:
            charsmap = dict(fields(content))[2]
    assert len(charsmap) > 10_000
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Precompiled(charsmap),
            normalizers.Strip(left=False, right=True),
            normalizers.Replace(Regex(" {2,}"), "▁"),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(t, tokenizer.token_to_id(t)) for t in ("<s>", "</s>")]
    )
    return tokenizer


RULES = ["nmt_nfkc", "nmt_nfkc_cf", "nfkc"]


@pytest.fixture(params=RULES)
def name(request, monkeypatch):
    """A family of this name for the tests of alignments."""
    monkeypatch.setitem(FAMILIES, "charsmap", lambda: charsmap_model(request.param))
    family.cache_clear()
    yield "charsmap"
    family.cache_clear()


@pytest.mark.parametrize("method", ["boundary", "word"])
def test_alignments_are_what_their_definition_says(name, method):
    for other in ("byte-level small", "wordpiece uncased", "llama", "unigram NFKC", name):
        for text in FOLDED + test_boundary.HARD:
            test_boundary.check(text, name, other, method=method)
            test_boundary.check(text, other, name, 7, method=method)


def test_a_character_that_becomes_several_stays_whole(name):
    text = "a ﬁx ½ ＡＢ"
    data = text.encode()
    spans, _ = test_boundary.located(text, name)
    tokens = family(name).encode(text).tokens
    for start, end in spans:
        if start >= 0:
            data[start:end].decode()  # no cut inside a character
    covered = {p for start, end in spans if start >= 0 for p in range(start, end)}
    assert {p for p in range(len(data)) if data[p : p + 1].strip()} <= covered, tokens


def test_every_token_of_the_text_pairs_with_itself(name):
    tokenizer = family(name)
    batch = vd.align(FOLDED, tokenizer, tokenizer)
    assert torch.equal(batch.pairs.student_start, batch.pairs.teacher_start)
    assert batch.coverage.covered_bytes > 0.8 * batch.coverage.text_bytes


def test_rows_of_the_remap_table(name):
    tokenizer = family(name)
    same = vd.RemapTable.from_tokenizers(tokenizer, tokenizer)
    other = vd.RemapTable.from_tokenizers(tokenizer, family("byte-level small"))
    unknown = tokenizer.token_to_id("<unk>")
    for token, i in tokenizer.get_vocab().items():
        if i == unknown or token in ("<s>", "</s>"):
            continue
        # A token is what the normalizer has made: nothing is normalized again.
        assert "".join(map(tokenizer.id_to_token, same.rows(i))) == token
        said = [family("byte-level small").id_to_token(j) for j in other.rows(i)]
        assert decoders.ByteLevel().decode(said) == token.replace("▁", " ")


