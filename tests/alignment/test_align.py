from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import vocabdistil as vd
from tests._families import FAMILIES, SCRIPTS, family
from tests._wordpiece import match_rule, russian_text, small_text, train
from vocabdistil.alignment.align import align
from vocabdistil.alignment.collator import AlignmentCollator
from vocabdistil.alignment.families import encode, template_ends
from vocabdistil.alignment.methods import match_pairs
from vocabdistil.alignment.remap import RemapTable
from vocabdistil.alignment.spans import SpanPairs
from vocabdistil.alignment.surfaces import known
from vocabdistil.alignment.vocab import MatchedVocab, matched_ids
from vocabdistil.core.errors import VocabdistilError


def positions(pairs: SpanPairs) -> list[tuple[int, int]]:
    assert torch.equal(pairs.student_end, pairs.student_start + 1)
    assert torch.equal(pairs.teacher_end, pairs.teacher_start + 1)
    # The checks that a hand-made object goes through.
    SpanPairs(pairs.student_start, pairs.student_end, pairs.teacher_start, pairs.teacher_end)
    return list(zip(pairs.student_start.tolist(), pairs.teacher_start.tolist(), strict=True))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_match_equals_greedy_rule(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 8))
    count = data.draw(st.integers(0, size))
    matched = MatchedVocab(
        teacher_ids=data.draw(st.permutations(range(size)))[:count],
        student_ids=data.draw(st.permutations(range(size)))[:count],
    )
    batch = data.draw(st.integers(0, 4))
    # Ids outside every vocabulary, too: they equal nothing.
    one = st.integers(-2, size + 2) | st.sampled_from([2**62, -(2**62)])
    sides = []
    for _ in range(2):
        length = data.draw(st.integers(0, 14))
        row = st.lists(one, min_size=length, max_size=length)
        flags = st.lists(st.integers(0, 1), min_size=length, max_size=length)
        ids = data.draw(st.lists(row, min_size=batch, max_size=batch))
        mask = data.draw(st.lists(flags, min_size=batch, max_size=batch))
        sides.append((ids, mask, length))
    (teacher, teacher_mask, teacher_length), (student, student_mask, student_length) = sides
    names = [
        {i: k for k, i in enumerate(matched.teacher_ids.tolist())},
        {i: k for k, i in enumerate(matched.student_ids.tolist())},
    ]
    want = []
    for b in range(batch):
        left = [names[0].get(i) if m else None for i, m in zip(teacher[b], teacher_mask[b], strict=True)]
        right = [names[1].get(i) if m else None for i, m in zip(student[b], student_mask[b], strict=True)]
        want += [(b * student_length + j, b * teacher_length + i) for j, i in match_rule(left, right)]

    def tensor(rows: list[list[int]], length: int) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.int64).view(batch, length)

    pairs = match_pairs(
        tensor(teacher, teacher_length),
        tensor(student, student_length),
        matched,
        tensor(teacher_mask, teacher_length),
        tensor(student_mask, student_length).bool(),
    )
    assert positions(pairs) == want


def test_many_tokens_and_threads() -> None:
    matched = MatchedVocab(teacher_ids=torch.arange(5), student_ids=torch.arange(5))
    generator = torch.Generator().manual_seed(3)
    teacher = torch.randint(0, 7, (50, 900), generator=generator)
    student = torch.randint(0, 7, (50, 1100), generator=generator, dtype=torch.int32)
    want = []
    for b in range(50):
        left = [t if t < 5 else None for t in teacher[b].tolist()]
        want += [(b * 1100 + j, b * 900 + i) for j, i in match_rule(left, student[b].tolist())]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert positions(match_pairs(teacher, student, matched)) == want
    finally:
        torch.set_num_threads(before)


def test_long_sequences_take_linear_time() -> None:
    # Most teacher tokens find nothing: looking for each in all the rest would need 10^10 steps.
    matched = MatchedVocab(teacher_ids=[0, 1], student_ids=[0, 1])
    teacher = torch.arange(200_000).remainder(2).view(1, -1)
    student = torch.zeros(1, 200_000, dtype=torch.int64)
    student[0, 100_000:] = 1
    assert len(match_pairs(teacher, student, matched)) == 100_001


@pytest.mark.parametrize("text", [small_text, russian_text])
def test_align_match(text) -> None:
    texts = text()[:200]
    teacher, student = train(texts, 2000), train(texts, 300)
    batch = align(texts, teacher, student, method="match")
    want = []
    for b, line in enumerate(texts):
        left, right = teacher.encode(line).tokens, student.encode(line).tokens
        assert batch.teacher.input_ids[b, : len(left)].tolist() == teacher.encode(line).ids
        assert batch.student.attention_mask[b].tolist() == [1] * len(right) + [0] * (
            batch.student.input_ids.shape[1] - len(right)
        )
        width, length = batch.student.input_ids.shape[1], batch.teacher.input_ids.shape[1]
        want += [(b * width + j, b * length + i) for j, i in match_rule(left, right)]
    assert positions(batch.pairs) == want
    coverage = batch.coverage
    assert coverage.pairs == len(want) and coverage.one_to_one == 1.0
    assert coverage.teacher_tokens == sum(len(teacher.encode(line)) for line in texts)
    assert coverage.teacher_covered == len(want) / coverage.teacher_tokens
    assert 0 < coverage.student_covered <= 1
    again = align(texts, teacher, student, "match", matched=MatchedVocab.from_tokenizers(teacher, student))
    assert positions(again.pairs) == want


def test_align_reduce() -> None:
    texts = small_text(30)
    teacher, student = train(texts, 600), train(texts, 100)
    table = RemapTable.from_tokenizers(teacher, student)
    batch = align(texts, teacher, student, method="reduce", max_length=12)
    out = table.remap(batch.teacher.input_ids, batch.teacher.attention_mask, max_length=12)
    assert torch.equal(batch.student.input_ids, out.input_ids)
    assert torch.equal(batch.pairs.student_start, out.pairs.student_start)
    assert batch.student.input_ids.shape[1] <= 12 and batch.teacher.input_ids.shape[1] <= 12
    assert batch.coverage.student_covered == 1.0
    assert torch.equal(
        align(texts, teacher, student, "reduce", 12, table=table).student.input_ids, out.input_ids
    )
    assert batch.to("cpu").coverage == batch.coverage


def test_tokenizer_settings_are_put_back_and_ignored() -> None:
    texts = small_text(8)
    teacher, student = train(texts, 300), train(texts, 100)
    teacher.enable_truncation(4)
    teacher.enable_padding(length=50, pad_id=0)
    before = teacher.truncation, teacher.padding
    for method in ("boundary", "match"):
        batch = align(texts, teacher, student, method)
        assert batch.teacher.attention_mask.sum() == batch.coverage.teacher_tokens
        assert 4 < batch.teacher.input_ids.shape[1] < 50
        assert (teacher.truncation, teacher.padding) == before
        short = align(texts, teacher, student, method, 5).student.input_ids
        assert short.tolist() == align(texts, teacher, student, "match", 5).student.input_ids.tolist()
        assert short.shape == (8, 5)


@pytest.mark.parametrize("own", [None, 16])
@pytest.mark.parametrize("method", ["boundary", "match", "reduce"])
def test_threads_share_a_tokenizer(method: str, own: int | None) -> None:
    teacher, student = train(small_text(60), 300), family("byte-level")
    if own is not None:
        teacher.enable_truncation(own)
        teacher.enable_padding(length=40)
    before = teacher.truncation, teacher.padding
    lines = [" ".join(small_text(60)[n : n + 8]) for n in range(40)]
    limits = (None, 6, 9, 12)
    want = {limit: align(lines, teacher, student, method, limit).teacher.input_ids for limit in limits}
    assert want[None].shape[1] > 16

    def run(limit: int | None) -> bool:
        return all(
            torch.equal(align(lines, teacher, student, method, limit).teacher.input_ids, want[limit])
            for _ in range(10)
        )

    with ThreadPoolExecutor(len(limits)) as pool:
        assert all(pool.map(run, limits))
    assert (teacher.truncation, teacher.padding) == before


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_cut_as_the_tokenizer_cuts(name: str) -> None:
    tokenizer = family(name)
    lines = [*SCRIPTS, "", "a"]
    for limit in (2, 3, 7):
        tokenizer.enable_truncation(limit)
        want = [encoding.ids for encoding in tokenizer.encode_batch(lines)]
        tokenizer.no_truncation()
        assert encode(tokenizer, lines, "teacher", limit) == want


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_cut_at_the_beginning_as_the_tokenizer_cuts(name: str) -> None:
    raw = Tokenizer.from_str(family(name).to_str())
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=family(name), truncation_side="left")
    lines = [*SCRIPTS, "", "a"]
    for limit in (2, 3, 7):
        raw.enable_truncation(limit, direction="left")
        want = [encoding.ids for encoding in raw.encode_batch(lines)]
        assert encode(raw, lines, "teacher", limit) == encode(fast, lines, "teacher", limit) == want
        for side in (raw, fast):
            for method in ("boundary", "word", "match"):
                batch = align(lines, side, family("wordpiece"), method, (limit, None))
                kept = batch.teacher.attention_mask.bool()
                assert [ids[mask].tolist() for ids, mask in zip(batch.teacher.input_ids, kept, strict=True)] == want
    assert raw.truncation["direction"] == "left"


@pytest.mark.parametrize("teacher", ["wordpiece", "byte-level", "llama", "unigram NFKC"])
@pytest.mark.parametrize("method", ["boundary", "word"])
def test_pairs_of_what_is_left_are_those_of_the_whole_text(teacher: str, method: str) -> None:
    """Cut at the beginning: of the pairs of the whole text those whose tokens are all there."""
    sides = [
        transformers.PreTrainedTokenizerFast(tokenizer_object=family(name), truncation_side="left")
        for name in (teacher, "byte-level small")
    ]
    for line in [*SCRIPTS, "Walking home, it's 12 walks", "語" * 9, "walk " * 9]:
        whole = align([line], *sides, method)
        lengths = whole.teacher.input_ids.shape[1], whole.student.input_ids.shape[1]
        for limits in ((7, 9), (9, 5), (12, 12), (None, 8)):
            cut = align([line], *sides, method, limits)
            fields = ("teacher_start", "teacher_end", "student_start", "student_end")
            rows = [list(zip(*(getattr(p, f).tolist() for f in fields), strict=True)) for p in (whole.pairs, cut.pairs)]
            gone = lengths[0] - cut.teacher.input_ids.shape[1], lengths[1] - cut.student.input_ids.shape[1]
            leads = [template_ends(side.backend_tokenizer, [])[0] for side in sides]
            want = []
            for a, b, c, d in rows[0]:
                if b <= leads[0] and d <= leads[1]:
                    want.append((a, b, c, d))
                elif a - gone[0] >= leads[0] and c - gone[1] >= leads[1]:
                    want.append((a - gone[0], b - gone[0], c - gone[1], d - gone[1]))
            assert rows[1] == want, (line, limits)


@pytest.mark.parametrize("teacher", ["wordpiece", "llama", "byte-level"])
def test_reduce_loses_the_beginning_where_the_student_says_so(teacher: str) -> None:
    student = transformers.PreTrainedTokenizerFast(tokenizer_object=family("wordpiece"), truncation_side="left")
    teacher_side = family(teacher)
    lead, _ = template_ends(teacher_side, [])
    for line in [*SCRIPTS, "walk " * 9]:
        whole = align([line], teacher_side, student, "reduce")
        spans = list(zip(whole.pairs.student_start.tolist(), whole.pairs.student_end.tolist(), strict=True))
        ids, first = whole.student.input_ids[0].tolist(), spans[lead - 1][1] if lead else 0
        for limit in (2, 5, 9, len(ids), len(ids) + 3):
            cut = align([line], teacher_side, student, "reduce", (None, limit))
            # Whole teacher tokens, as many of the last as fit after what stands before the text.
            start = next(a for a, _ in [*spans[lead:], (len(ids), 0)] if first + len(ids) - a <= limit)
            assert cut.student.input_ids[0].tolist() == ids[:first] + ids[start:], (line, limit)
            assert torch.equal(cut.teacher.input_ids, whole.teacher.input_ids)
            kept = [i for i, (a, _) in enumerate(spans) if i < lead or a >= start]
            assert cut.pairs.teacher_start.tolist() == [whole.pairs.teacher_start[i] for i in kept]


def test_words_of_what_is_left() -> None:
    words = ["Olga", "walks", "home", "again", "and", "again"]
    student = transformers.PreTrainedTokenizerFast(tokenizer_object=family("wordpiece"), truncation_side="left")
    for method in ("reduce", "word", "boundary"):
        whole, cut = (
            AlignmentCollator(family("wordpiece"), student, method, (None, limit))([words]) for limit in (None, 7)
        )
        left = cut["student_words"][0].tolist()
        assert cut["student"]["input_ids"].shape[1] <= 7 and max(left) == len(words) - 1
        assert left[1:] == whole["student_words"][0].tolist()[-len(left) + 1 :]


def swap(tokenizer: Tokenizer) -> None:
    vocab = tokenizer.get_vocab(with_added_tokens=False)
    count = len(vocab)
    tokenizer.model = models.WordPiece(
        {token: i if i < 5 else count + 4 - i for token, i in vocab.items()}, unk_token="[UNK]"
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: tokenizer.add_special_tokens(["walk"]),
        lambda tokenizer: tokenizer.add_tokens(["walking"]),
        lambda tokenizer: setattr(tokenizer, "pre_tokenizer", pre_tokenizers.Whitespace()),
        lambda tokenizer: setattr(tokenizer, "pre_tokenizer", None),
        lambda tokenizer: setattr(tokenizer, "normalizer", normalizers.Lowercase()),
        lambda tokenizer: setattr(tokenizer.model, "unk_token", "[MASK]"),
        swap,
    ],
)
def test_a_changed_tokenizer_is_read_again(change: Callable[[Tokenizer], None]) -> None:
    tokenizer, other = train(small_text(60), 300), family("byte-level")
    lines = ["walk walking, talked", "Été ☃"]
    MatchedVocab.from_tokenizers(tokenizer, other)
    align(lines, tokenizer, other, "word")
    before = known(tokenizer, "teacher")
    assert known(tokenizer, "teacher") is before
    change(tokenizer)
    assert known(tokenizer, "teacher") is not before
    fresh = Tokenizer.from_str(tokenizer.to_str())
    for method in ("boundary", "word", "match", "reduce"):
        ours, theirs = (align(lines, side, other, method) for side in (tokenizer, fresh))
        assert ours.coverage == theirs.coverage
        assert torch.equal(ours.student.input_ids, theirs.student.input_ids)
        for field in ("teacher_start", "teacher_end", "student_start", "student_end"):
            assert torch.equal(getattr(ours.pairs, field), getattr(theirs.pairs, field))
    assert RemapTable.from_tokenizers(tokenizer, other) == RemapTable.from_tokenizers(fresh, other)


def test_align_with_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = small_text(8)
    raw, student = train(texts, 300), train(texts, 100)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    for method in ("match", "boundary", "word"):
        left, right = align(texts, fast, student, method), align(texts, raw, student, method)
        assert torch.equal(left.teacher.input_ids, right.teacher.input_ids)
        assert torch.equal(left.pairs.student_start, right.pairs.student_start)
        assert torch.equal(left.pairs.teacher_end, right.pairs.teacher_end)
    assert left.teacher.input_ids[0].tolist()[: len(raw.encode(texts[0]))] == fast(texts[0])["input_ids"]


@pytest.mark.parametrize("method", ["boundary", "word", "match", "reduce"])
@pytest.mark.parametrize("texts", [[], [""], ["", "walk"]])
def test_empty_texts(method: str, texts: list[str]) -> None:
    teacher, student = train(small_text(), 300), train(small_text(), 100)
    batch = align(texts, teacher, student, method)
    assert batch.teacher.input_ids.shape[0] == batch.student.input_ids.shape[0] == len(texts)
    # CLS and SEP.
    assert batch.coverage.pairs >= 2 * len(texts)


def test_coverage_counts() -> None:
    teacher, student = family("wordpiece"), family("byte-level")
    lines = ["a  walk\n", "walking 語 \U0001f9ff!", ""]
    batch = align(lines, teacher, student)
    coverage, pairs = batch.coverage, batch.pairs
    left, right = (
        [[side.id_to_token(i) for i in side.encode(line).ids] for line in lines]
        for side in (teacher, student)
    )
    assert coverage.teacher_tokens == sum(map(len, left)) and coverage.student_tokens == sum(map(len, right))
    sizes = [
        (t1 - t0, s1 - s0)
        for t0, t1, s0, s1 in zip(
            *(
                getattr(pairs, name).tolist()
                for name in ("teacher_start", "teacher_end", "student_start", "student_end")
            ),
            strict=True,
        )
    ]
    singles = sizes.count((1, 1))
    assert coverage.pairs == len(sizes) and 0 < singles < len(sizes)
    assert coverage.one_to_one == singles / len(sizes)
    assert coverage.teacher_one_to_one == singles / coverage.teacher_tokens
    assert coverage.student_span == sum(s for _, s in sizes) / len(sizes)
    assert coverage.teacher_span == sum(t for t, _ in sizes) / len(sizes)
    # The template's tokens have no partners here; nor has the white space that a WordPiece tokenizer drops.
    assert dict(coverage.teacher_examples) == {"[CLS]": 3, "[SEP]": 3} and coverage.teacher_unaligned == 6
    assert dict(coverage.student_examples).get("Ċ") == 1
    assert coverage.student_unaligned == coverage.student_tokens - sum(s for _, s in sizes)
    assert coverage.teacher_unknown == sum(row.count("[UNK]") for row in left) > 0
    assert coverage.student_unknown == 0
    assert coverage.matched_vocabulary == len(MatchedVocab.from_tokenizers(teacher, student))
    assert coverage.text_bytes == coverage.covered_bytes == len("".join("".join(lines).split()).encode())
    cut = align(lines, teacher, student, max_length=4).coverage
    assert 0 < cut.covered_bytes < cut.text_bytes == coverage.text_bytes
    assert align(lines, teacher, student, "match").coverage.text_bytes is None


ids = torch.zeros(2, 3, dtype=torch.int64)
jagged = torch.nested.nested_tensor([torch.tensor([1, 2]), torch.tensor([3])], layout=torch.jagged)
one = MatchedVocab(teacher_ids=[0], student_ids=[0])


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((ids.float(), ids, one), TypeError, "teacher_ids.*float32"),
        ((ids, ids.bool(), one), TypeError, "student_ids.*bool"),
        ((ids, ids[:1], one), ValueError, "student_ids.*2 sequences, got 1"),
        ((ids[0], ids, one), ValueError, "teacher_ids.*shape"),
        ((ids, ids.to("meta"), one), ValueError, "student_ids.*meta device"),
        ((ids.to_sparse(), ids, one), ValueError, "teacher_ids.*sparse_coo"),
        ((jagged, ids, one), ValueError, "teacher_ids.*jagged"),
        (([[None]], ids, one), TypeError, r"teacher_ids\[0\].*NoneType"),
        ((ids, [[0], [2**70]], one), ValueError, rf"student_ids\[1\].*{2**70}"),
        ((ids, ids, one, None, ids.to_sparse()), ValueError, "student_mask.*sparse_coo"),
        ((ids, ids, {}), TypeError, "matched.*dict"),
        ((ids, ids, one, ids[:, :1]), ValueError, "teacher_mask.*shape"),
        ((ids, ids, one, None, ids.float()), TypeError, "student_mask.*float32"),
    ],
)
def test_bad_ids(arguments: tuple, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        match_pairs(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (dict(method="nearest"), ValueError, "method.*'boundary', 'match', 'reduce', 'word'.*'nearest'"),
        (dict(texts="walk"), TypeError, "texts.*str"),
        (dict(texts=["walk", 3]), TypeError, r"texts\[1\].*int"),
        (dict(texts=None), TypeError, "texts.*None"),
        (dict(max_length=0), ValueError, "max_length.*got 0"),
        (dict(max_length=1), ValueError, "max_length.*2 special tokens of teacher, got 1"),
        (dict(max_length="5"), TypeError, "max_length.*str"),
        (dict(max_length=True), TypeError, "max_length.*bool"),
        (dict(max_length=(4, np.bool_(True))), TypeError, "max_length.*bool"),
        (dict(max_length=torch.ones(2)), TypeError, "max_length.*Tensor"),
        (dict(method=["boundary"]), ValueError, r"method.*\['boundary'\]"),
        (dict(method="reduce", table="x"), TypeError, "table: expected a RemapTable, got str"),
        (dict(matched=3), TypeError, "matched: expected a MatchedVocab, got int"),
        (dict(teacher=object()), TypeError, "teacher.*object"),
        (dict(student=object()), TypeError, "student.*object"),
    ],
)
def test_bad_arguments(arguments: dict, error: type[Exception], text: str) -> None:
    side = train(small_text(20), 100)
    with pytest.raises(error, match=text) as caught:
        align(**{"texts": ["walk"], "teacher": side, "student": side, **arguments})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["boundary", "word", "match", "reduce"])
def test_lengths_that_no_text_reaches_limit_nothing(method: str) -> None:
    side = train(small_text(20), 100)
    texts = small_text(4)
    free = align(texts, side, side, method)
    for length in (np.int64(1000), 2**31, 2**63, 2**70, (2**64, None)):
        batch = align(texts, side, side, method, length)
        assert torch.equal(batch.teacher.input_ids, free.teacher.input_ids)
        assert torch.equal(batch.student.input_ids, free.student.input_ids)
        assert torch.equal(batch.pairs.student_end, free.pairs.student_end)
    assert align(texts, side, side, method, np.int64(4)).teacher.input_ids.shape[1] == 4


def test_a_side_is_a_mapping() -> None:
    texts = small_text(4)
    teacher, student = train(texts, 300), train(texts, 100)
    batch = align(texts, teacher, student)
    for side in (batch.teacher, batch.student):
        assert dict(side) == {"input_ids": side.input_ids, "attention_mask": side.attention_mask}
        assert side["input_ids"] is side.input_ids and list(side) == ["input_ids", "attention_mask"]
        assert side.get("labels") is None and not hasattr(side, "labels")
    config = transformers.BertConfig(
        vocab_size=300, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    assert transformers.BertModel(config)(**batch.teacher).last_hidden_state.shape[:2] == batch.teacher.input_ids.shape
    assert type(batch.to("meta").teacher) is type(batch.teacher)


def test_a_template_of_ids_that_are_no_tokens_is_refused() -> None:
    good, bad = train(small_text(20), 100), train(small_text(20), 100)
    ids = [("[CLS]", 2), ("[X]", 777)]
    bad.post_processor = processors.TemplateProcessing(single="[CLS] $A [X]", special_tokens=ids)
    for method in ("boundary", "word", "match", "reduce"):
        for sides, name in (((bad, good), "teacher"), ((good, bad), "student")):
            with pytest.raises(ValueError, match=f"^{name}: expected a tokenizer whose template .* got id 777"):
                align(["walk"], *sides, method)
    bad.post_processor = good.post_processor
    assert align(["walk"], bad, good).coverage.pairs


def test_many_tokenizers_in_turn_are_read_once(monkeypatch) -> None:
    texts = small_text(20)
    raw = [train(texts, 60 + n) for n in range(12)]
    sides = [*raw, *(transformers.PreTrainedTokenizerFast(tokenizer_object=one) for one in raw)]
    before = [known(side, "teacher") for side in sides]
    for side in sides:
        align(texts[:2], side, raw[0])
    matched = [matched_ids(one, before[0]) for one in before]
    assert [known(side, "teacher") for side in sides] == before
    assert all(a is matched_ids(one, before[0]) for a, one in zip(matched, before, strict=True))


def test_what_is_known_of_a_tokenizer_of_transformers_goes_with_it() -> None:
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=train(small_text(20), 80))
    found = weakref.ref(known(fast, "teacher"))
    del fast
    gc.collect()
    assert found() is None


def test_names_of_folders(tmp_path) -> None:
    texts = small_text(20)
    sides = [
        transformers.PreTrainedTokenizerFast(tokenizer_object=train(texts, size), unk_token="[UNK]")
        for size in (300, 100)
    ]
    for name, side in zip(("teacher", "student"), sides, strict=True):
        side.save_pretrained(tmp_path / name)
    places = str(tmp_path / "teacher"), tmp_path / "student"
    want = align(texts, *sides)
    for method in ("boundary", "word", "match", "reduce"):
        ours, theirs = align(texts, *places, method), align(texts, *sides, method)
        assert torch.equal(ours.student.input_ids, theirs.student.input_ids)
        assert torch.equal(ours.pairs.student_end, theirs.pairs.student_end)
    assert RemapTable.from_tokenizers(*places) == RemapTable.from_tokenizers(*sides)
    pairs = [MatchedVocab.from_tokenizers(*both) for both in (places, sides)]
    assert torch.equal(pairs[0].teacher_ids, pairs[1].teacher_ids)
    assert vd.coverage(texts, *places).as_dict() == vd.coverage(texts, *sides).as_dict()
    collator = vd.AlignmentCollator(*places)
    assert torch.equal(collator(texts)["student"]["input_ids"], want.student.input_ids)
    assert known(places[0], "teacher") is known(places[0], "teacher")
    sides[1].save_pretrained(tmp_path / "teacher")  # another one in its place
    assert align(texts, *places).coverage == align(texts, sides[1], sides[1]).coverage
    for place, message in (
        (tmp_path / "nowhere", "teacher: no such folder"),
        (tmp_path, "teacher: no tokenizer in"),
        ("no-such-model-here", "teacher: cannot load (a tokenizer from )?no-such-model-here"),
    ):
        with pytest.raises(VocabdistilError, match=message):
            align(texts, place, sides[1])


def test_texts_in_words() -> None:
    teacher, student = family("byte-level"), family("wordpiece")
    words = [["It's", "quiet", "here", "."], [], ["walk"]]
    for method in ("boundary", "word", "match", "reduce"):
        ours, theirs = (align(texts, teacher, student, method) for texts in (words, [" ".join(w) for w in words]))
        assert torch.equal(ours.teacher.input_ids, theirs.teacher.input_ids)
        assert torch.equal(ours.pairs.student_start, theirs.pairs.student_start)
    with pytest.raises(TypeError, match=r"^texts\[1\]: expected a string, got list"):
        align(["a", ["b", 3]], teacher, student)
