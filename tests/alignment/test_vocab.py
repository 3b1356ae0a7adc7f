from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders
from transformers import PreTrainedTokenizerFast

from tests._families import family
from tests._wordpiece import SPECIALS, small_text, train, wordpiece
from vocabdistil.alignment.remap import RemapTable
from vocabdistil.alignment.vocab import MatchedVocab


def test_same_strings_on_both_sides() -> None:
    teacher, student = train(small_text(), 600), train(small_text(), 120)
    matched = MatchedVocab.from_tokenizers(teacher, student)
    common = set(teacher.get_vocab()) & set(student.get_vocab())
    strings = [teacher.id_to_token(i) for i in matched.teacher_ids.tolist()]
    assert strings == [student.id_to_token(i) for i in matched.student_ids.tolist()]
    assert set(strings) == common and set(SPECIALS) <= common and len(matched) == len(common)
    assert matched.teacher_ids.dtype == matched.student_ids.dtype == torch.int64
    assert (matched.teacher_ids.diff() > 0).all()
    assert matched.to("cpu").teacher_ids.tolist() == matched.teacher_ids.tolist()
    assert str(len(matched)) in repr(matched)


def test_nothing_in_common() -> None:
    matched = MatchedVocab.from_tokenizers(wordpiece(["[UNK]", "a"]), wordpiece(["b"]))
    assert len(matched) == 0 and matched.slots()[0].numel() == 0


def test_slots() -> None:
    teacher, student = MatchedVocab(teacher_ids=[5, 1], student_ids=[0, 2]).slots()
    assert teacher.tolist() == [-1, 1, -1, -1, -1, 0] and student.tolist() == [0, -1, 1]


@pytest.mark.parametrize(
    ("teacher", "student", "error", "text"),
    [
        ([1, 2], [1], ValueError, "student_ids"),
        ([1, 1], [1, 2], ValueError, "teacher_ids.*1 repeatedly"),
        ([1, 2], [3, 3], ValueError, "student_ids.*3 repeatedly"),
        ([-1], [0], ValueError, "teacher_ids.*-1"),
        ([0.5], [0], TypeError, "teacher_ids.*float"),
        ([[0]], [[0]], ValueError, "teacher_ids.*shape"),
        ([0], torch.zeros(1, dtype=torch.bool), TypeError, "student_ids.*bool"),
        (None, [1], TypeError, "teacher_ids.*NoneType"),
        ({1}, [1], TypeError, "teacher_ids.*set"),
        ([0], ["a"], TypeError, "student_ids"),
        ([0, None], [0, 1], TypeError, "teacher_ids.*NoneType"),
        ([2**70], [0], ValueError, f"teacher_ids.*{2**70}"),
        ([0], [2**62], ValueError, f"student_ids.*from 0 to {2**31 - 1}, got {2**62}"),
        ([[1], [2, 3]], [1], ValueError, "teacher_ids: expected a list of integers"),
        (torch.zeros(1, dtype=torch.int64, device="meta"), [1], ValueError, "teacher_ids.*meta"),
        ([0, 1], torch.tensor([0, 1]).to_sparse(), ValueError, "student_ids.*sparse_coo"),
    ],
)
def test_bad_ids(teacher, student, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        MatchedVocab(teacher_ids=teacher, student_ids=student)


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        ("wordpiece", "byte-level"),
        ("byte-level", "wordpiece"),
        ("llama", "byte-level"),
        ("wordpiece", "unigram"),
    ],
)
def test_families_match_by_text(teacher: str, student: str) -> None:
    source, target = family(teacher), family(student)
    matched = MatchedVocab.from_tokenizers(source, target)
    pairs = [
        (source.id_to_token(i), target.id_to_token(j))
        for i, j in zip(matched.teacher_ids.tolist(), matched.student_ids.tolist(), strict=True)
    ]
    assert (matched.teacher_ids.diff() > 0).all() and len(pairs) > 100
    seen = 0
    for t, s in pairs:
        plain = [
            decoders.ByteLevel().decode([token]) if name == "byte-level" and token[:1] != "<" else token
            for name, token in ((teacher, t), (student, s))
        ]
        plain = [text.replace("▁", " ") for text in plain]
        if any(text in SPECIALS or text[:1] == "<" for text in plain):
            continue
        for k, name in enumerate((teacher, student)):
            if name == "wordpiece":
                start = not plain[k].startswith("##") and plain[1 - k].startswith(" ")
                plain[k] = " " + plain[k] if start else plain[k].removeprefix("##")
        assert plain[0] == plain[1], (t, s)
        seen += 1
    assert seen > 100


def test_known_matches() -> None:
    def ids(teacher: str, student: str) -> dict[str, str]:
        source, target = family(teacher), family(student)
        matched = MatchedVocab.from_tokenizers(source, target)
        return {
            source.id_to_token(i): target.id_to_token(j)
            for i, j in zip(matched.teacher_ids.tolist(), matched.student_ids.tolist(), strict=True)
        }

    found = ids("wordpiece", "byte-level")
    assert found["[CLS]"] == "<s>" and found["[SEP]"] == "</s>" and found["[PAD]"] == "<pad>"
    assert found["##s"] == "s" and found["walk"] == "Ġwalk" and found["."] == "."
    assert "s" not in found or found["s"] == "Ġs"
    found = ids("byte-level", "llama")
    assert found["ð"] == "<0xF0>" and found["a"] == "a" and found["Ġ"] == "▁"


def test_a_token_of_several_roles_is_its_end_of_text_first() -> None:
    """GPT-2's <|endoftext|> is eos, bos and unk."""
    backend = Tokenizer.from_str(family("byte-level").to_str())
    backend.add_special_tokens(["<|endoftext|>"])
    gpt2 = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    )  # fmt: skip
    bert = family("wordpiece")
    end = gpt2.convert_tokens_to_ids("<|endoftext|>")
    ids = {token: bert.token_to_id(token) for token in ("[SEP]", "[CLS]", "[UNK]")}
    there = MatchedVocab.from_tokenizers(gpt2, bert)
    assert dict(zip(there.teacher_ids.tolist(), there.student_ids.tolist(), strict=True))[end] == ids["[SEP]"]
    back = MatchedVocab.from_tokenizers(bert, gpt2)
    back = dict(zip(back.teacher_ids.tolist(), back.student_ids.tolist(), strict=True))
    assert back[ids["[SEP]"]] == end and ids["[UNK]"] not in back and ids["[CLS]"] not in back
    table = RemapTable.from_tokenizers(gpt2, bert)
    assert table.ids[table.indptr[end] : table.indptr[end + 1]].tolist() == [ids["[SEP]"]]
