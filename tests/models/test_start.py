"""The student's start: which of the teacher's rows each token begins as, across families."""

from __future__ import annotations

import pytest
import tokenizers
import torch
from tokenizers import AddedToken

from tests._families import family
from tests._wordpiece import wordpiece
from vocabdistil.core.errors import VocabdistilError
from vocabdistil.models.start import COMPOSED, KINDS, NONE, ROLE, SHARED, Start, plan_start

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEACHER = [*SPECIAL, "walk", "##ing", "##ed", "t", "##a", "##l", "##k", "talk"]


def teacher_ids(start: Start, i: int) -> list[int]:
    return start.ids[start.indptr[i] : start.indptr[i + 1]].tolist()


def started(teacher: tokenizers.Tokenizer, student: tokenizers.Tokenizer, token: str) -> tuple[str, list[str]]:
    """The kind of a student token and the strings of the teacher's tokens that it starts from."""
    start, i = plan_start(teacher, student), student.token_to_id(token)
    return KINDS[start.kind[i]], [teacher.id_to_token(j) for j in teacher_ids(start, i)]


def test_shared_tokens_take_the_row_and_others_the_mean_of_their_pieces() -> None:
    teacher = wordpiece(TEACHER)
    student = wordpiece([*reversed(SPECIAL), "walk", "##ing", "##alk", "walking", "ш", "ing"])
    start = plan_start(teacher, student)
    assert [KINDS[k] for k in start.kind] == ["role"] * 5 + ["shared"] * 2 + ["composed"] * 2 + ["none"] * 2
    rows = start.rows(matrix := torch.randn(len(TEACHER), 6))
    assert torch.equal(rows[:5], matrix[:5].flip(0))
    assert torch.equal(rows[5:7], matrix[5:7])
    torch.testing.assert_close(rows[7], matrix[9:12].mean(0))  # ##a ##l ##k
    torch.testing.assert_close(rows[8], (4 * matrix[5] + 3 * matrix[6]) / 7)  # walk ##ing
    assert teacher_ids(start, 9) == []
    counts = torch.tensor([0] * 5 + [6, 1, 1, 1, 1, 0])
    assert start.summary(counts) == {
        "tokens": {"shared": 2, "role": 5, "composed": 2, "none": 2},
        "text": {"shared": 0.7, "role": 0.0, "composed": 0.2, "none": 0.1},
    }


def test_what_the_teacher_cannot_spell_is_the_mean_with_noise_from_the_seed() -> None:
    teacher = wordpiece(TEACHER)
    student = wordpiece([*SPECIAL, *(chr(0x430 + k) for k in range(32)), "walk"])
    matrix = torch.randn(len(TEACHER), 64, generator=torch.Generator().manual_seed(1)) + 5
    padded = torch.cat([matrix, torch.full((40, 64), 1e6)])  # rows beyond the tokenizer stand for nothing
    start = plan_start(teacher, student)
    rows = start.rows(padded)
    bare = rows[start.kind == NONE]
    assert len(bare) == 32
    deviation = (bare - matrix.mean(0)) / matrix.std(0)
    assert 0.09 < deviation.std() < 0.11
    assert torch.equal(rows, start.rows(padded))
    assert not torch.equal(rows, plan_start(teacher, student, seed=1).rows(padded))
    bias = torch.randn(len(TEACHER) + 3)
    torch.testing.assert_close(start.rows(bias)[start.kind == NONE], bias[: len(TEACHER)].mean().expand(32))


def test_rows_are_float32_whatever_comes_and_need_a_row_for_every_id() -> None:
    teacher = wordpiece(TEACHER)
    start = plan_start(teacher, wordpiece([*SPECIAL, "talking", "walk"]))
    matrix = torch.randn(len(TEACHER), 4).bfloat16()
    rows = start.rows(matrix)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows[5], (4 * matrix[12].float() + 3 * matrix[6].float()) / 7)
    expected = torch.tensor([0, 1, 2, 3, 4, (4 * 12 + 3 * 6) / 7, 5])
    torch.testing.assert_close(start.rows(torch.arange(13.0)), expected)
    with pytest.raises(VocabdistilError, match="teacher: expected a row for each of its tokenizer's 13 ids, got 12"):
        start.rows(matrix[:12])


NAMES = ["wordpiece", "roberta", "unigram", "sentencepiece BPE", "llama"]


@pytest.mark.parametrize("source", NAMES)
@pytest.mark.parametrize("target", NAMES)
def test_every_pair_of_families(source: str, target: str) -> None:
    teacher, student = family(source), family(target)
    start = plan_start(teacher, student)
    lengths, alone = start.indptr.diff(), (start.kind == SHARED) | (start.kind == ROLE)
    assert len(start) == max(student.get_vocab().values()) + 1
    assert (lengths[alone] == 1).all() and (lengths[start.kind == NONE] == 0).all()
    assert (lengths[start.kind == COMPOSED] > 0).all()
    assert sum(start.summary()["tokens"].values()) == student.get_vocab_size()
    if source == target:
        assert start.ids.tolist() == list(range(len(start)))
    else:
        # The stems of the text that all were trained on.
        assert started(teacher, student, {"wordpiece": "stone", "roberta": "Ġstone"}.get(target, "▁stone")) == (
            "shared",
            [{"wordpiece": "stone", "roberta": "Ġstone"}.get(source, "▁stone")],
        )


def test_the_mark_of_a_word_adds_nothing_to_a_pieces_weight() -> None:
    teacher, student = family("unigram"), wordpiece([*SPECIAL, "stones", "снега"])
    start, matrix = plan_start(teacher, student), torch.randn(500, 4)
    for i, token in ((5, "stones"), (6, "снега")):
        ids = teacher_ids(start, i)
        lengths = [len(teacher.id_to_token(j).replace("▁", "").encode()) for j in ids]
        assert sum(lengths) == len(token.encode())
        expected = sum(length * matrix[j] for length, j in zip(lengths, ids, strict=True)) / sum(lengths)
        torch.testing.assert_close(start.rows(matrix)[i], expected)


def test_a_surface_inside_a_word_is_spelled_inside_a_word() -> None:
    teacher = wordpiece([*SPECIAL, "k", "i", "##k", "##i"])
    student = wordpiece([*SPECIAL, "ki", "##ki"])
    assert started(teacher, student, "ki") == ("composed", ["k", "##i"])
    assert started(teacher, student, "##ki") == ("composed", ["##k", "##i"])


def test_a_cased_token_starts_as_the_uncased_teachers() -> None:
    teacher, student = wordpiece(TEACHER), wordpiece([*SPECIAL, "Talk", "WALKED", "##Ing", "Ш"])
    assert started(teacher, student, "Talk") == ("none", [])
    teacher.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    assert started(teacher, student, "Talk") == ("composed", ["talk"])
    assert started(teacher, student, "WALKED") == ("composed", ["walk", "##ed"])
    assert started(teacher, student, "##Ing") == ("composed", ["##ing"])
    assert started(teacher, student, "Ш") == ("none", [])


def test_special_tokens_by_role_and_added_ones_by_string() -> None:
    teacher = wordpiece([*TEACHER, "<url>"])
    teacher.add_special_tokens(["[CLS]", "[SEP]", "[Q]", "[R]"])
    teacher.add_tokens([AddedToken("<url>")])
    tokens = ["<unk>", "<s>", "</s>", "<pad>", "<mask>", "walk", "<url>", "##k"]
    model = tokenizers.models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="<unk>")
    student = tokenizers.Tokenizer(model)
    student.add_special_tokens(["<s>", "</s>", "<pad>", "<mask>", "[Q]", "[S]"])
    student.add_tokens([AddedToken("<url>"), AddedToken("walk talk"), AddedToken("ш ш")])
    pairs = {"<unk>": "[UNK]", "<s>": "[CLS]", "</s>": "[SEP]", "<pad>": "[PAD]", "<mask>": "[MASK]", "[Q]": "[Q]"}
    for token, expected in [*pairs.items(), ("<url>", "<url>")]:
        assert started(teacher, student, token) == ("role", [expected])
    assert started(teacher, student, "[S]") == ("none", [])
    assert started(teacher, student, "ш ш") == ("none", [])
    teacher.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    assert started(teacher, student, "walk talk") == ("composed", ["walk", "talk"])


def test_kept_tokens_take_their_own_rows() -> None:
    teacher, student = wordpiece(TEACHER), wordpiece([*SPECIAL, "walk", "##ed", "talk"])
    kept = torch.tensor([0, 1, 2, 3, 4, 5, 7, 12])
    start = plan_start(teacher, student, kept)
    matrix = torch.randn(20, 3)
    assert torch.equal(start.rows(matrix), matrix[kept])
    assert start.summary()["tokens"] == {"shared": 8, "role": 0, "composed": 0, "none": 0}
    kept[6] = -1
    assert plan_start(teacher, student, kept).kind.tolist() == [SHARED] * 6 + [NONE, SHARED]
    for bad in (kept[:5], kept + 3):
        with pytest.raises(VocabdistilError, match="vocabulary: expected one id of the teacher's 13"):
            plan_start(teacher, student, bad)


def test_ids_without_a_token_have_no_start() -> None:
    student = wordpiece(SPECIAL)
    state = student.get_vocab() | {"walk": 9}
    holes = tokenizers.Tokenizer(tokenizers.models.WordPiece(state, unk_token="[UNK]"))
    start = plan_start(wordpiece(TEACHER), holes)
    assert start.kind.tolist() == [ROLE] * 5 + [NONE] * 4 + [SHARED]
    assert start.summary()["tokens"] == {"shared": 1, "role": 5, "composed": 0, "none": 0}
    assert start.rows(torch.randn(13, 2)).shape == (10, 2)
