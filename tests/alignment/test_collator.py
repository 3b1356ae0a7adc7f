"""Batches for training: of texts and of rows, on the fly and in workers, in a Trainer."""

from __future__ import annotations

import pickle
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import vocabdistil as vd
from tests._families import FAMILIES, SCRIPTS, family
from tests._wordpiece import small_text
from vocabdistil.alignment.collator import SPANS, AlignmentCollator, Rows

METHODS = ("boundary", "word", "match", "reduce")
TEXTS = [*SCRIPTS, "", " ", *small_text(8), " ".join(small_text(30))]
# A pair of each kind of tokenizer on either side.
PAIRS = [
    ("wordpiece", "wordpiece uncased"),
    ("byte-level", "wordpiece"),
    ("llama", "roberta"),
    ("unigram NFKC", "llama"),
    ("byte-level NFC", "unigram bytes"),
    ("sentencepiece BPE", "byte-level small"),
]


def same(a: object, b: object) -> bool:
    """Equal to the last position and dtype."""
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, vd.SpanPairs):
        fields = ("num_nonempty", "student_tokens", "teacher_tokens")
        return all(torch.equal(getattr(a, name), getattr(b, name)) for name in SPANS) and all(
            getattr(a, name) == getattr(b, name) for name in fields
        )
    return a.dtype == b.dtype and torch.equal(a, b)


def rows_of(batch: vd.AlignedBatch) -> list[dict[str, object]]:
    """Each text of a batch by itself, worked out from its definition."""
    widths = {"teacher": batch.teacher.input_ids.shape[1], "student": batch.student.input_ids.shape[1]}
    rows = []
    for b in range(len(batch.teacher.input_ids)):
        row: dict[str, object] = {}
        for side in ("teacher", "student"):
            tokens = getattr(batch, side)
            row[f"{side}_ids"] = [
                i for i, m in zip(tokens.input_ids[b].tolist(), tokens.attention_mask[b].tolist(), strict=True) if m
            ]
        mine = batch.pairs.teacher_start // max(widths["teacher"], 1) == b
        for name in SPANS:
            row[name] = (getattr(batch.pairs, name)[mine] - b * widths[name[:7]]).tolist()
        rows.append(row)
    return rows


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_batches_are_those_of_align(teacher: str, student: str, method: str) -> None:
    teacher, student = family(teacher), family(student)
    want = vd.align(TEXTS, teacher, student, method, max_length=(20, 14))
    for features in (TEXTS, [{"text": text, "id": 3} for text in TEXTS], rows_of(want)):
        batch = AlignmentCollator(teacher, student, method, (20, 14))(features)
        for side, tokens in (("teacher", want.teacher), ("student", want.student)):
            assert torch.equal(batch[side]["input_ids"], tokens.input_ids)
            assert torch.equal(batch[side]["attention_mask"], tokens.attention_mask)
        assert same(batch["pairs"], want.pairs)
    assert want.teacher.input_ids.shape[1] == 20 > 14 >= want.student.input_ids.shape[1] > 10


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("teacher", "student"), PAIRS[:3])
def test_padding_moves_positions_and_nothing_else(teacher: str, student: str, method: str) -> None:
    teacher, student = family(teacher), family(student)
    plain = vd.align(TEXTS, teacher, student, method, max_length=19)
    collator = AlignmentCollator(teacher, student, method, 19, pad_to_multiple_of=32)
    batch = collator(TEXTS)
    assert same(batch, collator(rows_of(plain)))
    assert batch["teacher"]["input_ids"].shape == batch["student"]["input_ids"].shape == (len(TEXTS), 32)
    vd.SpanPairs(*(getattr(batch["pairs"], name) for name in ("student_start", "student_end", *SPANS[:2])))
    for side in ("teacher", "student"):
        ids, mask = batch[side]["input_ids"], batch[side]["attention_mask"]
        old, width = getattr(plain, side), getattr(plain, side).input_ids.shape[1]
        assert torch.equal(ids[:, :width], old.input_ids) and torch.equal(mask[:, :width], old.attention_mask)
        assert not mask[:, width:].any()
        start, before = getattr(batch["pairs"], f"{side}_start"), getattr(plain.pairs, f"{side}_start")
        assert torch.equal(ids.flatten()[start.long()], old.input_ids.flatten()[before.long()])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(max_size=30), min_size=1, max_size=6),
    st.sampled_from(sorted(FAMILIES)),
    st.sampled_from(sorted(FAMILIES)),
    st.sampled_from(METHODS),
    st.sampled_from([None, 3, 8, 17]),
    st.sampled_from([None, 8]),
)
def test_rows_make_the_same_batch_as_texts(texts, teacher, student, method, max_length, multiple) -> None:
    texts = [text.encode(errors="ignore").decode() for text in texts]
    teacher, student = family(teacher), family(student)
    collator = AlignmentCollator(teacher, student, method, max_length, pad_to_multiple_of=multiple)
    batch = vd.align(texts, teacher, student, method, max_length)
    assert same(collator(texts), collator(rows_of(batch)))
    rows = Rows.of(batch.teacher, batch.student, batch.pairs)
    rows.check()
    assert rows.pair_counts.tolist() == [len(row["teacher_start"]) for row in rows_of(batch)]


def test_masks_words_of_the_student() -> None:
    teacher, student = family("byte-level"), family("wordpiece")
    plain = AlignmentCollator(teacher, student)(TEXTS)
    weights = torch.ones(student.get_vocab_size())
    weights[100:] = 0
    torch.manual_seed(3)
    batch = AlignmentCollator(teacher, student, mlm_probability=0.15)(TEXTS)
    ids, labels = batch["student"]["input_ids"], batch["student"]["labels"]
    chosen = labels != -100
    tokens = int(batch["student"]["attention_mask"].sum())
    assert int(chosen.sum()) == -(-tokens * 15 // 100)
    assert torch.equal(torch.where(chosen, labels, ids), plain["student"]["input_ids"])
    mask_id = student.token_to_id("[MASK]")
    assert 0.6 < (ids[chosen] == mask_id).float().mean() < 0.95
    specials = {student.token_to_id(token) for token in ("[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]")}
    assert not specials & set(labels[chosen].tolist())
    assert same(batch["teacher"], plain["teacher"]) and same(batch["pairs"], plain["pairs"])
    few = AlignmentCollator(teacher, student, mlm_probability=0.5, mask_weights=weights)(TEXTS)["student"]["labels"]
    assert 0 <= int(few[few != -100].min()) <= int(few.max()) < 100


# A process that is not forked takes seconds to start; reduce has the most to carry.
@pytest.mark.parametrize(("method", "context"), [*((method, "fork") for method in METHODS), ("reduce", "spawn")])
def test_workers_make_the_same_batches(method: str, context: str, monkeypatch) -> None:
    # The threads that this asks for do not run in a forked process: one that used them would wait for ever.
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    collator = AlignmentCollator(family("byte-level"), family("wordpiece"), method, 24, pad_to_multiple_of=8)
    want = list(DataLoader(TEXTS, batch_size=4, collate_fn=collator))
    loader = DataLoader(TEXTS, batch_size=4, collate_fn=collator, num_workers=1, multiprocessing_context=context)
    got = list(loader)
    assert len(got) == len(want) > 3
    assert all(isinstance(batch, vd.AlignedBatch) for batch in got)
    assert all(map(same, got, want))


def test_travels_and_moves() -> None:
    collator = AlignmentCollator(family("llama"), family("wordpiece"), "reduce", mlm_probability=0.1)
    batch = pickle.loads(pickle.dumps(collator))(TEXTS[:3])
    assert same(pickle.loads(pickle.dumps(batch)), batch)
    moved = batch.to("meta")
    assert moved["pairs"].device.type == moved["student"]["labels"].device.type == "meta"
    assert batch["pairs"].device.type == "cpu"


def test_align_and_the_collator_return_the_same_mapping() -> None:
    teacher, student = family("byte-level"), family("wordpiece")
    batch = AlignmentCollator(teacher, student, max_length=20)(TEXTS)
    aligned = vd.align(TEXTS, teacher, student, max_length=20)
    assert type(batch) is type(aligned) is vd.AlignedBatch
    assert batch.keys() == aligned.keys() - {"coverage"} == {"teacher", "student", "pairs"}
    assert all(same(batch[name], aligned[name]) for name in batch)
    moved = aligned.to("meta")
    assert moved.coverage is aligned.coverage is aligned["coverage"]
    inside = moved.pairs, moved.teacher.input_ids, moved.student.attention_mask
    assert {part.device.type for part in inside} == {"meta"}
    with pytest.raises(AttributeError, match="no attribute or item 'nothing'"):
        batch.nothing  # noqa: B018


def test_labels_of_masked_words_are_where_a_trainer_looks() -> None:
    collator = AlignmentCollator(family("byte-level"), family("wordpiece"), mlm_probability=0.3)
    batch = collator(TEXTS)
    assert batch["labels"] is batch["student"]["labels"] and "labels" not in batch["teacher"]
    plain = AlignmentCollator(family("byte-level"), family("wordpiece"))(TEXTS)
    assert "labels" not in plain and plain.get("labels") is plain.student.input_ids


class Student(torch.nn.Module):
    """A little of a model, to be trained."""

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab, width)

    def forward(self, input_ids, attention_mask, labels=None):
        return self.embedding(input_ids) * attention_mask.unsqueeze(-1)


@pytest.mark.parametrize("kind", ["list", "streaming", "cache"])
def test_trains_in_a_trainer(tmp_path, kind: str) -> None:
    from transformers import Trainer, TrainingArguments

    teacher, student = family("byte-level"), family("wordpiece")
    torch.manual_seed(0)
    taught = torch.nn.Embedding(teacher.get_vocab_size(), 6)
    model = Student(student.get_vocab_size(), 6)
    seen = []

    class Distiller(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            assert isinstance(inputs["pairs"], vd.SpanPairs) and inputs["pairs"].device == model.embedding.weight.device
            hidden = model(**inputs["student"])
            with torch.no_grad():
                target = taught(inputs["teacher"]["input_ids"])
            loss = vd.span_loss(hidden, target, inputs["pairs"], divergence="mse")
            seen.append(float(loss.detach()))
            return (loss, hidden) if return_outputs else loss

    rows = [{"text": text, "unused": 1} for text in TEXTS * 3]
    dataset = rows
    if kind == "streaming":
        datasets = pytest.importorskip("datasets")
        dataset = datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=2).shuffle(seed=0)
    elif kind == "cache":
        pytest.importorskip("pyarrow")
        dataset = vd.cache_aligned(rows, teacher, student, tmp_path / "rows", max_length=32, quiet=True)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=12,
        per_device_train_batch_size=8,
        learning_rate=0.1,
        remove_unused_columns=False,
        accelerator_config={"dispatch_batches": False},
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        dataloader_num_workers=1 if kind == "list" else 0,
    )
    collator = AlignmentCollator(teacher, student, max_length=32, mlm_probability=0.15)
    trainer = Distiller(model=model, args=arguments, train_dataset=dataset, data_collator=collator)
    trainer.train()
    assert len(seen) == 12 and sum(seen[-3:]) < 0.7 * sum(seen[:3])
    if kind != "streaming":
        before = len(seen)
        # Whatever the student's class and the collator: neither labels nor a loss are there but that of compute_loss.
        for masked in (0.0, 0.15):
            trainer.data_collator = AlignmentCollator(teacher, student, max_length=32, mlm_probability=masked)
            for names in (["labels"], []):
                trainer.label_names = names
                metrics = trainer.evaluate(eval_dataset=dataset)
                assert 0 < metrics["eval_loss"] < sum(seen[:3]) / 3
        assert len(seen) > before + 8


def features_with(**columns: list) -> list[dict[str, object]]:
    count = len(next(iter(columns.values())))
    return [{"text": TEXTS[i], **{name: values[i] for name, values in columns.items()}} for i in range(count)]


@pytest.mark.parametrize("of_rows", [False, True])
def test_other_columns_pass_through(of_rows: bool) -> None:
    teacher, student = family("byte-level"), family("wordpiece")
    collator = AlignmentCollator(teacher, student, mlm_probability=0.1)
    columns = {
        "label": [2, 0, 1], "score": [0.5, 1, 2], "flag": [True, False, True], "id": ["a", "b", "c"],
        "vector": [np.ones(2, np.float32)] * 3, "tensor": [torch.eye(2)] * 3, "ragged": [[1], [1, 2], []],
        "none": [None] * 3,
    }  # fmt: skip
    features = features_with(**columns)
    if of_rows:
        rows = rows_of(vd.align(TEXTS[:3], teacher, student))
        features = [{**row, **{name: values[i] for name, values in columns.items()}} for i, row in enumerate(rows)]
    batch = collator(features)
    for name, value in (
        ("labels", torch.tensor([2, 0, 1])), ("score", torch.tensor([0.5, 1.0, 2.0])),
        ("flag", torch.tensor([1, 0, 1])), ("vector", torch.ones(3, 2)), ("tensor", torch.eye(2).expand(3, 2, 2)),
    ):  # fmt: skip
        assert same(batch[name], value), name
    assert batch["id"] == ["a", "b", "c"] and batch["ragged"] == [[1], [1, 2], []] and batch["none"] == [None] * 3
    assert not same(batch["student"]["labels"], batch["labels"]) and batch.get("labels") is batch["labels"]
    moved = batch.to("meta")
    assert moved["labels"].device.type == "meta" and moved["id"] == batch["id"]
    assert batch.keys() == {"teacher", "student", "pairs", "labels", *columns} - {"label"}


@pytest.mark.parametrize("name", ["label", "labels", "label_ids"])
def test_labels_of_words_are_padded(name: str) -> None:
    collator = AlignmentCollator(family("byte-level"), family("wordpiece"))
    batch = collator(features_with(**{name: [[3, 4], [5], []]}))
    assert batch["labels"].tolist() == [[3, 4], [5, -100], [-100, -100]]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_texts_in_words_tell_the_words_of_tokens(teacher: str, student: str, method: str) -> None:
    teacher, student = family(teacher), family(student)
    texts = [["walk", "home", ",", "déjà"], ["東京", "a", "b"], [], ["walk"]]
    whole = [" ".join(words) for words in texts]
    collator = AlignmentCollator(teacher, student, method, (14, 12), pad_to_multiple_of=4)
    batch = collator([{"text": words, "labels": list(range(len(words)))} for words in texts])
    plain = collator(whole)
    assert all(same(batch[name], plain[name]) for name in plain) and "teacher_words" not in plain
    assert same(batch["teacher_words"], collator(texts)["teacher_words"])
    for name, side in (("teacher", teacher), ("student", student)):
        ids, of = batch[name]["input_ids"], batch[f"{name}_words"]
        assert of.shape == ids.shape and of.dtype == torch.int64
        for b, words in enumerate(texts):
            told = of[b][of[b] >= 0].tolist()
            assert told == sorted(told)
            if name == "student" and method == "reduce":
                continue
            left_out = set(range(len(words))) - set(told)
            assert not left_out or min(left_out) > max(told, default=-1)  # cut off
            alone = side.encode(whole[b]).special_tokens_mask
            assert all(w < 0 for w, special in zip(of[b].tolist(), alone, strict=False) if special)
    if method == "reduce":
        of, by = batch["teacher_words"].flatten(), batch["student_words"].flatten()
        fields = (getattr(batch["pairs"], name).tolist() for name in (*SPANS[2:], SPANS[0]))
        for start, end, at in zip(*fields, strict=True):
            assert set(by[start:end].tolist()) <= {int(of[at])}


def test_what_cannot_be_passed_through_is_refused() -> None:
    collator = AlignmentCollator(family("byte-level"), family("wordpiece"))
    for features, message in (
        ([{"text": "a", "text_pair": "b"}], r"features\[0\]: expected one text, got a 'text_pair' too"),
        ([{"text": "a", "label": 1}, {"text": "b"}], r"features\[1\]: .* of features\[0\] \('labels'\), got none"),
        ([{"text": "a", "label": 1}, "b"], r"features\[1\]: .*, got none"),
        (["b", {"text": "a", "x": 1}], r"features\[1\]: .* \(none\), got 'x'"),
        ([{"text": "a", "pairs": 1}], r"features\[0\]: expected columns that a batch does not have, got 'pairs'"),
        ([{"text": "a", "label": 1, "labels": 2}], r"features\[0\]: expected columns that a batch does not have"),
    ):
        with pytest.raises(ValueError, match=message):
            collator(features)


def test_features_need_not_be_a_list() -> None:
    class Texts:
        """As data sets are: no list, no Collection even."""

        def __len__(self) -> int:
            return 2

        def __getitem__(self, i: int) -> dict[str, str]:
            return [{"text": "a b"}, {"text": "c"}][i]

    collator = AlignmentCollator(family("byte-level"), family("wordpiece"))
    assert same(collator(Texts()), collator(["a b", "c"]))


def test_bad_features() -> None:
    collator = AlignmentCollator(family("byte-level"), family("wordpiece"))
    row = rows_of(vd.align(["a b"], family("byte-level"), family("wordpiece")))[0]
    for features, kind, message in (
        ([], ValueError, "features: expected at least one"),
        (["a", 3], TypeError, r"features\[1\]: expected a string or a mapping with 'text', got int"),
        ([{}], TypeError, "remove_unused_columns=False"),
        ([{"content": "a"}], TypeError, "got a mapping with the keys 'content'"),
        ([{"text": 4}], TypeError, r"texts\[0\]: expected a string, got int"),
        ([row, "a"], TypeError, "expected a string or a mapping with 'text'"),
        ([{"teacher_ids": [1]}], TypeError, r"features\[0\]: expected a row of a cache, got one without 'student_ids'"),
        ([{**row, "teacher_ids": [10**6]}], ValueError, "features"),
        ([{**row, "student_ids": [[1]]}], TypeError, r"features\[0\]\['student_ids'\]: expected a vector"),
        ([row, {**row, "teacher_end": row["teacher_end"][:-1]}], ValueError, r"features\[1\]\['teacher_end'\]"),
        ([{**row, "teacher_end": [9] * len(row["teacher_end"])}], ValueError, r"features\[0\]: expected ascending"),
        ([{**row, "student_start": [-1] * len(row["teacher_end"])}], ValueError, "of the student, got"),
        (None, TypeError, "features: expected a list of texts or of rows, got NoneType"),
        ("ab", TypeError, "features: expected .* got str"),
        (row, TypeError, "features: expected .* got dict"),
        ((text for text in "ab"), TypeError, "features: expected .* got generator"),
    ):
        with pytest.raises(kind, match=message):
            collator(features)
    with pytest.raises(ValueError, match="other tokenizers"):
        collator([{**row, "student_ids": [10**6] * len(row["student_ids"])}])


def test_bad_settings() -> None:
    a, b = family("byte-level"), family("wordpiece")
    for options, kind, message in (
        ({"method": "words"}, ValueError, "method: expected one of"),
        ({"max_length": 0}, ValueError, "max_length: expected at least 1"),
        ({"max_length": (5, 6, 7)}, ValueError, "those of teacher and student, got 3"),
        ({"max_length": "5"}, TypeError, "max_length: expected an integer, got str"),
        ({"pad_to_multiple_of": 0}, ValueError, "pad_to_multiple_of: expected"),
        ({"mlm_probability": 1.5}, ValueError, "mlm_probability: expected"),
        ({"pad_to_multiple_of": 2**62}, ValueError, f"pad_to_multiple_of: expected .* got {2**62}"),
        ({"pad_to_multiple_of": True}, TypeError, "pad_to_multiple_of: expected an integer, got bool"),
        ({"mlm_probability": "x"}, TypeError, "mlm_probability: expected a number, got str"),
        ({"mlm_probability": float("nan")}, ValueError, "mlm_probability: expected .* got nan"),
        ({"text_column": None}, TypeError, "text_column: expected a string, got NoneType"),
        ({"table": 3}, TypeError, "table: expected a RemapTable, got int"),
        ({"method": "reduce", "table": "x"}, TypeError, "table: expected a RemapTable, got str"),
        ({"matched": 3}, TypeError, "matched: expected a MatchedVocab, got int"),
    ):
        with pytest.raises(kind, match=message):
            AlignmentCollator(a, b, **options)
    ones = torch.ones(b.get_vocab_size())
    for weights, kind, message in (
        ([1.0], TypeError, "expected a tensor, got list"),
        (ones.long(), TypeError, "expected floating numbers, got torch.int64"),
        (torch.ones(3), ValueError, r"expected one weight for each .* got shape \(3,\)"),
        (ones.to("meta"), ValueError, "on the CPU, got torch.strided on meta"),
        (ones.to_sparse(), ValueError, "dense tensor on the CPU, got torch.sparse_coo"),
        (-ones, ValueError, r"expected finite numbers of at least 0.* got -1.0 to -1.0"),
        (ones * 0, ValueError, r"one of them above 0, got 0.0 to 0.0"),
        (torch.where(ones.cumsum(0) == 5, torch.nan, ones), ValueError, "expected finite numbers.* got nan"),
        (torch.where(ones.cumsum(0) == 5, torch.inf, ones), ValueError, "expected finite numbers.* to inf"),
    ):
        for mlm_probability in (0.0, 0.1):
            with pytest.raises(kind, match=f"^mask_weights: .*{message}"):
                AlignmentCollator(a, b, mlm_probability=mlm_probability, mask_weights=weights)
    with pytest.raises(ValueError, match="student: expected a tokenizer with a mask token"):
        AlignmentCollator(b, family("llama"), mlm_probability=0.1)
    with pytest.raises(TypeError, match="teacher: expected a fast tokenizer"):
        AlignmentCollator(3, b)
