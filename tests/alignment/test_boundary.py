"""The boundary and word alignments against their definition, for every pair of tokenizer families."""

from __future__ import annotations

import functools
import itertools
import json
import random
import unicodedata
from importlib import import_module

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers

import vocabdistil as vd
from tests._families import FAMILIES, SCRIPTS, byte_level, family
from tests._wordpiece import russian_text
from vocabdistil.alignment.surfaces import ALONE, BEGINS, CONTINUES, UNTOLD

module = import_module("vocabdistil.alignment.methods")
Span = tuple[int, int]

HARD = [
    "",
    " ",
    "\n",
    "a",
    "  hi  there\t\n z ",
    "e\u0301x é \ufb01x ½ ①",
    "İstanbul ǅ ẞ ß",
    "👩‍👩‍👧‍👦 flags 🇩🇪🇫🇷 👍🏽!",
    "x\u200dy\u200b z\ufeff",
    "\ufeffbom",
    "walking home,  <mask> été  walking homes <pad>x",
    "[SEP] <s> </s> [CLS] <mask> <0x41> ▁ Ġ",
    "\u00a0no\u3000break\u2028line",
    "Zalgo: h̸̢̛e̶̛͕l̷̰̓l̶̙̈́o̴̰̅",
    "한국어 \u1112\u1161\u11ab ﾊﾝｶｸ ＡＢＣ",
    "a\x00b\x07c\ufffd",
    "αΣς ΑΣ",
    "語",
    "a" * 300,
    "…" * 5 + "...",
    "\U0001f600" * 20,
    *SCRIPTS,
]
texts = st.one_of(
    st.text(max_size=40),
    st.lists(
        st.sampled_from(
            [*"abАя é\n\t語ก", "  ", "e\u0301", "😀", "\u200d", "ﬁ", "<s>", "[UNK]", "ing", "한", "İ", "▁"]
        ),
        max_size=25,
    ).map("".join),
    st.sampled_from(HARD),
)
names = st.sampled_from(sorted(FAMILIES))


def located(
    text: str, name: str, max_length: int | None = None, words: bool = False
) -> tuple[list[Span], int]:
    """Spans of the tokens, (-1, kind) for those of the template, and where the first cut-off one begins."""
    side, tokens = module.locate([text], module.known(family(name), "teacher"), "teacher", max_length, words)
    starts, ends, limit = side.row(0)
    assert len(starts) == tokens.input_ids.shape[1]
    return list(zip(starts, ends, strict=True)), limit


def refinement(
    teacher: list[Span], student: list[Span], size: int, limit: int
) -> list[tuple[list[int], list[int]]]:
    """The definition: cut at every byte where neither side has a token on both sides of it."""
    inside = [False] * (size + 1)
    for start, end in teacher + student:
        for p in range(start + 1, end) if start >= 0 else ():
            inside[p] = True
    cuts = [p for p in range(size + 1) if not inside[p] and p <= limit]
    pieces = []
    for a, b in itertools.pairwise(cuts):
        sides = [
            [k for k, (start, end) in enumerate(side) if a <= start < end <= b] for side in (teacher, student)
        ]
        if all(sides):
            pieces.append((sides[0], sides[1]))
    return pieces


def special_pairs(teacher: list[Span], student: list[Span]) -> list[tuple[int, int]]:
    found = {}
    for k, (start, kind) in enumerate(student):
        if start < 0 and kind:
            found[kind] = k
    return [(k, found[kind]) for k, (start, kind) in enumerate(teacher) if start < 0 and kind in found]


def pairs_of(pairs: vd.SpanPairs) -> list[tuple[int, int, int, int]]:
    vd.SpanPairs(pairs.student_start, pairs.student_end, pairs.teacher_start, pairs.teacher_end)
    fields = (pairs.teacher_start, pairs.teacher_end, pairs.student_start, pairs.student_end)
    return list(zip(*(field.tolist() for field in fields), strict=True))


def check(
    text: str, teacher: str, student: str, max_length: int | None = None, method: str = "boundary"
) -> None:
    words = method == "word"
    (left, left_limit), (right, right_limit) = (
        located(text, name, max_length, words) for name in (teacher, student)
    )
    data = text.encode()
    limit = min(left_limit, right_limit)
    want = [
        (sides[0][0], sides[0][-1] + 1, sides[1][0], sides[1][-1] + 1)
        for sides in refinement(left, right, len(data), limit)
    ]
    want += [(t, t + 1, s, s + 1) for t, s in special_pairs(left, right)]
    batch = vd.align([text], family(teacher), family(student), method, max_length)
    got = pairs_of(batch.pairs)
    assert got == sorted(want), (text, teacher, student, left, right)
    for t0, t1, s0, s1 in got:
        if left[t0][0] < 0:
            continue
        covered = []
        for side, a, b in ((left, t0, t1), (right, s0, s1)):
            spans = [span for span in side[a:b] if span[0] < span[1]]
            covered.append({p for start, end in spans for p in range(start, end)})
        odd = sorted(covered[0] ^ covered[1])
        assert not bytes(data[p] for p in odd).decode().strip(), (text, teacher, student, left, right)


@pytest.mark.parametrize("teacher", FAMILIES)
@pytest.mark.parametrize("student", FAMILIES)
def test_hard_texts(teacher: str, student: str) -> None:
    for text in HARD:
        check(text, teacher, student)


@settings(max_examples=150, deadline=None)
@given(texts, names, names)
def test_any_text(text: str, teacher: str, student: str) -> None:
    check(text, teacher, student)


@settings(max_examples=80, deadline=None)
@given(texts, names, names, st.integers(2, 12))
def test_truncated(text: str, teacher: str, student: str, max_length: int) -> None:
    check(text, teacher, student, max_length)


@settings(max_examples=80, deadline=None)
@given(texts, names, names, st.none() | st.integers(2, 12))
def test_words(text: str, teacher: str, student: str, max_length: int | None) -> None:
    check(text, teacher, student, max_length, "word")


@pytest.mark.parametrize("teacher", ["wordpiece", "byte-level", "roberta", "unigram", "llama"])
@pytest.mark.parametrize("student", ["wordpiece uncased", "byte-level split", "sentencepiece BPE"])
def test_words_stay_whole(teacher: str, student: str) -> None:
    text = "Walking, it's quiet:  déjà-vu 東京 42 streets\n(снег) été!"
    batch = vd.align([text], family(teacher), family(student), "word")
    finer = vd.align([text], family(teacher), family(student))
    assert 8 <= len(batch.pairs) <= len(finer.pairs)
    sides = ((0, 1, family(teacher)), (2, 3, family(student)))
    for start, end, tokenizer in sides:
        encoding = tokenizer.encode(text)
        words = encoding.word_ids
        if tokenizer.pre_tokenizer is None:
            continue  # white space separates: see the next test
        for pair in pairs_of(batch.pairs):
            for at in (pair[start], pair[end]):
                if 0 < at < len(words) and words[at] is not None:
                    assert words[at - 1] != words[at], (encoding.tokens, pair)


def _cut_at_spaces_first() -> Tokenizer:
    tokenizer = Tokenizer.from_str(family("unigram").to_str())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    return tokenizer


def _marked_between_words_only() -> Tokenizer:
    tokenizer = Tokenizer.from_str(family("unigram bytes").to_str())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.add_tokens(["be", AddedToken("é", lstrip=True, rstrip=True)])
    return tokenizer


TELLING = {
    name: functools.partial(family, name)
    for name in ("wordpiece", "wordpiece uncased", "sentencepiece BPE", "unigram", "unigram NFKC", "unigram bytes")
} | {
    "cut at spaces first": functools.cache(_cut_at_spaces_first),
    "marked between words only": functools.cache(_marked_between_words_only),
}


@settings(max_examples=300, deadline=None)
@given(texts | st.text("abe#in▁é☃ \t", max_size=16), st.sampled_from(sorted(TELLING)))
def test_words_told_by_pieces_are_those_of_the_tokenizer(text: str, name: str) -> None:
    tokenizer = TELLING[name]()
    places = module.known(tokenizer, "teacher").word_places
    assert any(places)
    encoding = tokenizer.encode(text)
    if "<unk>" in text:
        return  # found with the tokenizer's offsets, and the words that it numbers
    inner = [k for k, special in enumerate(encoding.special_tokens_mask) if not special]
    for before, k in itertools.pairwise(inner):
        place, place_before = places[encoding.ids[k]], places[encoding.ids[before]]
        told = place == CONTINUES and place_before != ALONE
        assert told == (encoding.word_ids[k] == encoding.word_ids[before]), encoding.tokens


def test_an_unknown_token_that_may_stand_in_a_text_tells_no_word() -> None:
    state = {"type": "BPE", "unk_token": "ж", "fuse_unk": True, "vocab": {"ж": 0, "▁": 1, "a": 2}, "merges": []}
    tokenizer = Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": state}))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    assert list(module.known(tokenizer, "teacher").word_places) == [UNTOLD, BEGINS, CONTINUES]
    tokenizer.add_special_tokens(["ж"])
    for text in ("a aж aжa", "aЫaж ж жЫ", "ж"):
        words = tokenizer.encode(text).word_ids
        start, end, _ = module.locate([text], module.known(tokenizer, "teacher"), "teacher", None, True)[0].row(0)
        for i, j in itertools.pairwise(range(len(words))):
            assert (words[i] == words[j]) == ((start[i], end[i]) == (start[j], end[j])), (text, i)


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        pre_tokenizers.Metaspace(split=False),
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="first")]),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.Metaspace()]),
        pre_tokenizers.WhitespaceSplit(),
    ],
)
def test_other_words_are_asked_for(pre_tokenizer) -> None:
    tokenizer = Tokenizer.from_str(family("unigram").to_str())
    tokenizer.pre_tokenizer = pre_tokenizer
    assert not module.known(tokenizer, "teacher").word_places


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("byte-level lower", "Й Ё ÉÀ Ḗ walking"),
        ("wordpiece uncased", "Walking É"),
        ("unigram", "walking ☃☃☃ ☃a"),
        ("sentencepiece BPE", "walking ☃☃☃ home"),
    ],
)
def test_folded_and_unknown_characters_are_found_without_offsets(name: str, text: str) -> None:
    source = module.known(family(name), "teacher")
    if source.info.unk_id is not None and "☃" in text:
        assert source.info.unk_id in family(name).encode(text).ids
    source.needs_offsets = False
    module.locate([text] * 8, source, "teacher", None, False)
    assert not source.needs_offsets  # as it would be if these texts had been encoded again


def test_known_words() -> None:
    def words(teacher: str, student: str, text: str) -> list[str]:
        (left, _), data = located(text, teacher, words=True), text.encode()
        pairs = pairs_of(vd.align([text], family(teacher), family(student), "word").pairs)
        covered = [(left[t0][0], left[t1 - 1][1]) for t0, t1, _, _ in pairs]
        return [data[start:end].decode().strip() for start, end in covered if start >= 0]

    assert words("wordpiece", "byte-level", "walking  quietly.") == ["walking", "quietly", "."]
    assert words("llama", "byte-level", "walking  quietly.") == ["walking", "quietly."]
    assert words("byte-level", "llama", "walking \n été") == ["walking", "été"]


def is_mark(c: str) -> bool:
    return unicodedata.category(c) in ("Mn", "Cc", "Cf", "Cn", "Co") or c == "\ufffd"


@pytest.mark.parametrize("name", FAMILIES)
def test_spans_say_what_tokens_say(name: str) -> None:
    """Each token that covers whole characters covers those that the tokenizer reports, white space aside."""
    tokenizer = family(name)
    for text in HARD:
        spans, limit = located(text, name)
        assert limit == 2**31 - 1
        encoding = tokenizer.encode(text)
        assert len(spans) == len(encoding)
        data = text.encode()
        covered: set[int] = set()
        for (start, end), (first, last), mask in zip(
            spans, encoding.offsets, encoding.special_tokens_mask, strict=True
        ):
            assert (start < 0) == bool(mask)
            if mask:
                continue
            covered |= set(range(start, end))
            try:
                got = data[start:end].decode()
            except UnicodeDecodeError:
                got = None
            if got is not None:
                reported = text[first:last]
                # A tokenizer says nothing of what it drops or composes after a character.
                kept = "".join(c for c in got if c in reported or not is_mark(c))
                if got.strip():
                    assert kept.strip() in reported or got.strip() in reported or reported.strip() in got, (
                        text,
                        got,
                    )
        left_out = bytes(b for p, b in enumerate(data) if p not in covered).decode()
        if covered:
            assert not left_out.strip(), (text, left_out)


@pytest.mark.parametrize("name", ["byte-level", "byte-level small", "llama"])
def test_bytes_are_exact(name: str) -> None:
    tokenizer = family(name)
    surfaces = module.known(tokenizer, "teacher").surfaces
    for text in HARD:
        if "<" in text:
            continue
        spans, _ = located(text, name)
        inserted = name == "llama"
        for i, (start, end) in zip(tokenizer.encode(text).ids, spans, strict=True):
            if start < 0:
                continue
            want = surfaces.texts[i]
            assert text.encode()[start:end] == (want[1:] if inserted else want)
            inserted = False


def test_known_pairs() -> None:
    def pairs(text: str, teacher: str, student: str) -> list[tuple[str, str]]:
        (left, _), (right, _) = located(text, teacher), located(text, student)
        data = text.encode()
        out = []
        for t0, t1, s0, s1 in pairs_of(vd.align([text], family(teacher), family(student)).pairs):
            if left[t0][0] >= 0:
                out.append(
                    (
                        data[left[t0][0] : left[t1 - 1][1]].decode(),
                        data[right[s0][0] : right[s1 - 1][1]].decode(),
                    )
                )
        return out

    # Composed on one side only; dropped accents; a ligature that one side takes apart.
    assert ("e\u0301", "e\u0301") in pairs("e\u0301x", "byte-level NFC", "llama")
    assert pairs("e\u0301\u00e9", "wordpiece uncased", "byte-level")[-1][1].endswith("é")
    assert any("ﬁ" in t for t, _ in pairs("a ﬁx", "unigram NFKC", "byte-level"))
    # A space that a tokenizer puts before the text covers nothing, whatever its offsets say.
    assert located("\u2603\u2603", "sentencepiece BPE")[0][1:] == [(0, 0), (0, 6)]
    # Byte tokens pair one by one.
    batch = vd.align(["🎊"], family("byte-level small"), family("llama"))
    assert batch.coverage.pairs == 4 and batch.coverage.one_to_one == 1.0


def test_a_token_that_opens_and_closes() -> None:
    raw = byte_level(300)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A <s>", special_tokens=[("<s>", 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="<s>")
    left, right = family("wordpiece").encode("hi").ids, raw.encode("hi").ids
    pairs = pairs_of(vd.align(["hi"], family("wordpiece"), tokenizer).pairs)
    assert pairs[0] == (0, 1, 0, 1)
    assert pairs[-1] == (len(left) - 1, len(left), len(right) - 1, len(right))
    # One side with a template only: nothing to pair with.
    only = pairs_of(vd.align(["hi"], family("byte-level"), tokenizer).pairs)
    assert only[0][2] == 1 and only[-1][3] == len(right) - 1


def with_mask(trim: bool, lstrip: bool, lines: list[str]) -> Tokenizer:
    """RoBERTa's way: a space before every text between added tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=lstrip)])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), trim_offsets=trim)
    return tokenizer


def plain_bytes() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([], trainer)
    return tokenizer


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("<mask>é", [(1, 2, 0, 6), (3, 4, 6, 7), (4, 5, 7, 8)]),
        ("<mask>x", [(1, 2, 0, 6), (3, 4, 6, 7)]),
        ("<mask>bed", [(1, 2, 0, 6), (2, 3, 6, 8), (3, 4, 8, 9)]),
        ("<mask> bed", [(1, 2, 0, 6), (2, 3, 6, 9), (3, 4, 9, 10)]),
        ("<mask>\u00a0x", [(1, 2, 0, 6), (3, 4, 6, 7), (4, 5, 7, 8), (5, 6, 8, 9)]),
    ],
)
@pytest.mark.parametrize("trim", [True, False])
def test_text_after_an_added_token(text: str, want: list[tuple[int, int, int, int]], trim: bool) -> None:
    teacher = with_mask(trim, False, ["be be"])
    assert pairs_of(vd.align([text], teacher, plain_bytes()).pairs) == want


def bytes_of(text: str, at: int) -> range:
    return range(len(text[:at].encode()), len(text[: at + 1].encode()))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(["<mask>", "be", "é", "😀", " ", "x", "\n", "\u00a0"]), max_size=8).map("".join))
def test_trimmed_offsets_around_added_tokens(text: str) -> None:
    for lstrip in (False, True):
        rows = []
        for trim in (True, False):
            source = module.known(with_mask(trim, lstrip, ["be be"]), "teacher")
            side, _ = module.locate([text], source, "teacher", None, False)
            starts, ends, _ = side.row(0)
            blank = {p for at, c in enumerate(text) if c.isspace() for p in bytes_of(text, at)}
            rows.append([set(range(s, e)) - blank for s, e in zip(starts, ends, strict=True)])
        assert rows[0] == rows[1], (text, lstrip)


def test_batch_equals_single_texts_for_any_number_of_threads() -> None:
    lines = HARD + [" ".join(random.Random(n).choices(SCRIPTS, k=3)) for n in range(200)]
    teacher, student = family("unigram NFKC"), family("byte-level")
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(vd.align(lines, teacher, student))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert pairs_of(other.pairs) == pairs_of(results[0].pairs)
        assert torch.equal(other.teacher.input_ids, results[0].teacher.input_ids)
    batch = results[0]
    lengths = batch.teacher.input_ids.shape[1], batch.student.input_ids.shape[1]
    want = []
    for b, line in enumerate(lines):
        single = vd.align([line], teacher, student)
        ids = single.teacher.input_ids[0].tolist()
        assert batch.teacher.input_ids[b, : len(ids)].tolist() == ids == teacher.encode(line).ids
        assert batch.teacher.attention_mask[b].sum() == len(ids)
        t, s = b * lengths[0], b * lengths[1]
        want += [(t + a, t + c, s + d, s + e) for a, c, d, e in pairs_of(single.pairs)]
    assert pairs_of(batch.pairs) == want


@pytest.mark.parametrize(("teacher", "student"), [("wordpiece", "byte-level"), ("unigram", "llama")])
def test_real_text(teacher: str, student: str) -> None:
    lines = russian_text(60)
    for line in lines:
        check(line[:200], teacher, student)
    coverage = vd.align(lines, family(teacher), family(student)).coverage
    assert coverage.teacher_covered > 0.7 and coverage.student_covered > 0.6


def test_long_text_takes_linear_time() -> None:
    # Quadratic steps over a million bytes would not end.
    text = "語 a\u0301😀 walking " * 40_000
    batch = vd.align([text, "🎉" * 200_000], family("llama"), family("wordpiece uncased"))
    assert len(batch.pairs) > 100_000


@pytest.mark.parametrize("method", ["boundary", "word", "match", "reduce"])
@pytest.mark.parametrize(
    ("teacher", "text", "count"),
    [("byte-level", "walk ", 1_000_000), ("byte-level small", "\U0001f469\u200d", 140_000)],
    ids=["words", "emoji"],
)
def test_a_million_tokens(teacher: str, text: str, count: int, method: str) -> None:
    # A quadratic step anywhere would not end.
    batch = vd.align([text * count], family(teacher), family("wordpiece"), method)
    tokens = batch.teacher.input_ids.shape[1]
    assert 0.9e6 < tokens < 1.1e6
    if method == "reduce":
        assert len(batch.pairs) == tokens
    elif teacher == "byte-level":
        # Each word with itself, but for the first, which is another token without a space before it.
        assert len(batch.pairs) == count - (method == "match")
    elif method != "match":
        assert len(batch.pairs) == 1  # one unknown word
    fields = ("student_start", "student_end", "teacher_start", "teacher_end")
    vd.SpanPairs(*(getattr(batch.pairs, field) for field in fields))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_ready_offsets(data: st.DataObject) -> None:
    size = 12
    batch = data.draw(st.integers(0, 3))
    sides, spans = [], []
    for _ in range(2):
        length = data.draw(st.integers(0, 8))
        rows = []
        for _ in range(batch):
            starts = sorted(data.draw(st.lists(st.integers(0, size), min_size=length, max_size=length)))
            ends = sorted(data.draw(st.lists(st.integers(0, size), min_size=length, max_size=length)))
            rows.append([(s, max(s, e)) for s, e in zip(starts, ends, strict=True)])
        spans.append(rows)
        sides.append(torch.tensor(rows, dtype=torch.int32).view(batch, length, 2))
    mask = torch.randint(0, 2, sides[0].shape[:2], generator=torch.Generator().manual_seed(batch))
    want = []
    for b in range(batch):
        kept = [s if m else (0, 0) for s, m in zip(spans[0][b], mask[b].tolist(), strict=True)]
        t, s = b * sides[0].shape[1], b * sides[1].shape[1]
        for left, right in refinement(kept, spans[1][b], size, size):
            want.append((t + left[0], t + left[-1] + 1, s + right[0], s + right[-1] + 1))
    assert pairs_of(vd.boundary_pairs(sides[0], sides[1].long(), mask)) == want


offsets = torch.zeros(2, 3, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((offsets.float(), offsets), TypeError, "teacher_offsets.*float32"),
        ((offsets, [[0, 1]]), TypeError, "student_offsets.*list"),
        ((offsets, offsets[:1]), ValueError, "student_offsets.*2 sequences, got 1"),
        ((offsets[..., 0], offsets), ValueError, r"teacher_offsets.*\(2, 3\)"),
        ((offsets, offsets + 2**31), ValueError, "student_offsets.*32 bits"),
        ((offsets, offsets, offsets), ValueError, "teacher_mask.*shape"),
        ((offsets.to("meta"), offsets), ValueError, "teacher_offsets.*meta"),
        ((offsets, offsets.to_sparse()), ValueError, "student_offsets.*sparse_coo"),
        ((offsets, offsets, offsets[..., 0].to_sparse()), ValueError, "teacher_mask.*sparse_coo"),
    ],
)
def test_bad_offsets(arguments: tuple, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        vd.boundary_pairs(*arguments)


@pytest.mark.parametrize("text", ["\ud800", "a\udfff"])
def test_text_that_is_no_unicode(text: str) -> None:
    with pytest.raises((TypeError, ValueError), match="texts"):
        vd.align(["fine", text], family("byte-level"), family("wordpiece"))


@pytest.mark.parametrize("text", ["10\u00a0000 x", "\u3000a\u2003é\u0085b", "\u00a0", "\u00a0\u00a0\u3000語"])
@pytest.mark.parametrize("method", ["boundary", "word", "match", "reduce"])
def test_white_space_in_bytes_is_not_counted(text: str, method: str) -> None:
    side = family("byte-level small")
    coverage = vd.coverage([text], side, side, [method]).methods[method]
    assert coverage.text_bytes == coverage.covered_bytes == len("".join(text.split()).encode())
