"""Trimmed vocabularies: what is kept, and that kept tokens are read as before."""

from __future__ import annotations

import random
import re

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from tests._families import FAMILIES, SCRIPTS, byte_level, family, many_scripts, plain_text
from vocabdistil.core.errors import VocabdistilError
from vocabdistil.models.counting import count_tokens, frequent_characters
from vocabdistil.models.rebuilding import Vocabulary
from vocabdistil.models.trimming_vocabulary import trim_vocabulary


def merged_words(**options: object) -> Tokenizer:
    """BPE with marks inside or at the end of words, as CLIP and older models have them."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", **options))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "<pad>"], show_progress=False, **options)
    tokenizer.train_from_iterator(many_scripts(), trainer)
    return tokenizer


def whole_words() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(many_scripts(), trainers.WordLevelTrainer(vocab_size=150, special_tokens=["<unk>"]))
    return tokenizer


def ignores_merges() -> Tokenizer:
    """As Llama 3: a word that the vocabulary has is that token, whatever the merges make of it."""
    tokenizer = byte_level(480)
    model = tokenizer.model
    model.ignore_merges = True
    tokenizer.model = model
    return tokenizer


def many_added() -> Tokenizer:
    tokenizer = byte_level(450, prefix=True, roberta=True)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken("stone ", lstrip=True), AddedToken("Été", normalized=True), "quietly"])
    tokenizer.add_special_tokens([AddedToken("<|x|>", rstrip=True, special=True)])
    return tokenizer


MORE = {
    "BPE suffix": lambda: merged_words(end_of_word_suffix="</w>"),
    "BPE prefix": lambda: merged_words(continuing_subword_prefix="##"),
    "BPE whole words": ignores_merges,
    "words": whole_words,
    "added": many_added,
}


def made(name: str) -> Tokenizer:
    return MORE[name]() if name in MORE else family(name)


def samples(count: int) -> list[str]:
    """Texts of a few words each, so that many are made of kept tokens alone; some words nobody has seen."""
    rng = random.Random(3)
    words = " ".join(many_scripts()).split(" ")
    words += ["<mask>", "walking home", "été", "<|x|>", "Été", "quietly", "stone ", "ξ"]
    return [" ".join(rng.choices(words, k=rng.randint(1, 6))) for _ in range(count)]


def assert_reads_as_before(teacher: Tokenizer, trimmed: Vocabulary, texts: list[str], readable_only: bool) -> None:
    """``readable_only``: texts in which the teacher reads UNK are left out."""
    student, kept = trimmed.tokenizer.backend_tokenizer, trimmed.kept
    available, tried = set(kept.tolist()), 0
    for text in texts:
        before, after = teacher.encode(text), student.encode(text)
        if available.issuperset(before.ids) and not (readable_only and "[UNK]" in before.tokens):
            tried += 1
            assert before.tokens == after.tokens and before.ids == kept[after.ids].tolist()
    assert tried > 20


@pytest.mark.parametrize("name", [*FAMILIES, *MORE])
@pytest.mark.parametrize("share", [0.45, 0.8])
def test_texts_of_kept_tokens_read_as_before(name, share):
    teacher = made(name)
    size = teacher.get_vocab_size()
    # All bytes are kept where there are any.
    wanted = max(round(size * share), 280 if size > 280 else 0)
    trimmed = trim_vocabulary(teacher, plain_text(), wanted)
    student, kept = trimmed.tokenizer.backend_tokenizer, trimmed.kept
    assert len(kept) == len(set(kept.tolist())) == len(trimmed) == student.get_vocab_size() == wanted
    assert [student.id_to_token(i) for i in range(len(kept))] == [teacher.id_to_token(i) for i in kept.tolist()]
    added = [sorted(map(repr, side.get_added_tokens_decoder().values())) for side in (teacher, student)]
    assert added[0] == added[1]
    assert_reads_as_before(teacher, trimmed, samples(1500), readable_only="wordpiece" in name)


@pytest.mark.parametrize("name", [*FAMILIES, *MORE])
def test_the_text_stays_free_of_unk(name):
    # Often enough that no character is rare.
    teacher, texts = made(name), many_scripts() + SCRIPTS * 40
    unk = {"<unk>", "[UNK]"}
    counts = count_tokens(teacher, texts)
    with pytest.raises(VocabdistilError, match="vocab_size: expected at least the") as caught:
        trim_vocabulary(teacher, counts, 0)
    least = int(re.search(r"least the (\d+)", str(caught.value))[1])
    with pytest.raises(VocabdistilError):
        trim_vocabulary(teacher, counts, least - 1)
    trimmed = trim_vocabulary(teacher, counts, least)
    assert len(trimmed) == least and trimmed.notes == ()
    if name == "words":  # there is nothing smaller than a word to read it with
        return
    for text in texts:
        before, after = teacher.encode(text).tokens, trimmed.tokenizer.backend_tokenizer.encode(text).tokens
        assert unk.isdisjoint(after) or not unk.isdisjoint(before), text


@pytest.mark.parametrize("name", ["wordpiece", "byte-level", "unigram bytes", "added"])
def test_a_vocabulary_as_large_as_the_teacher_s_is_the_teacher_s(name):
    teacher = made(name)
    trimmed = trim_vocabulary(teacher, plain_text(), 100_000)
    assert "only" in trimmed.notes[0]
    assert trimmed.kept.tolist() == list(range(teacher.get_vocab_size()))
    for text in samples(200):
        assert trimmed.tokenizer.backend_tokenizer.encode(text).ids == teacher.encode(text).ids


def test_the_most_frequent_tokens_are_kept_and_ties_go_by_id():
    teacher = family("wordpiece")
    counts = torch.zeros(teacher.get_vocab_size(), dtype=torch.int64)
    long = [i for token, i in sorted(teacher.get_vocab().items(), key=lambda item: item[1]) if len(token) > 4]
    tokens = [i for i in long if teacher.id_to_token(i).isalpha()]
    counts[tokens] = 5
    counts[tokens[-3:]] = 7
    least = len(trim_vocabulary(teacher, torch.zeros_like(counts), 5).kept)
    letters = {c for i in tokens for c in teacher.id_to_token(i)[1:]} | {teacher.id_to_token(i)[0] for i in tokens}
    for extra in (3, 6):
        kept = set(trim_vocabulary(teacher, counts, least + 2 * len(letters) + extra).kept.tolist())
        assert kept.issuperset(tokens[-3:])
        chosen = [i for i in tokens[:-3] if i in kept]
        assert chosen and chosen == tokens[: len(chosen)]


def test_ids_with_holes_and_tokens_beyond_the_model():
    vocab = {"[PAD]": 0, "[UNK]": 7, "a": 9, "##b": 12, "ab": 20, "abc": 31, "c": 33}
    teacher = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    teacher.pre_tokenizer = pre_tokenizers.Whitespace()
    teacher.add_special_tokens(["[PAD]", "[UNK]"])
    teacher.add_tokens(["<new>"])
    counts = torch.zeros(34, dtype=torch.int64)
    counts[torch.tensor([20, 33])] = torch.tensor([5, 1])
    trimmed = trim_vocabulary(teacher, counts, 7)
    new = teacher.token_to_id("<new>")
    assert trimmed.kept.tolist() == [0, 7, 9, 12, 20, 33, new]
    assert trimmed.tokenizer.backend_tokenizer.encode("ab c <new> abc").tokens == ["ab", "c", "<new>", "[UNK]"]


def test_a_path_across_an_unknown_character_stays_as_dear_as_it_was():
    pieces = [("<unk>", 0.0), ("qw", -20.0), ("e", -20.0), ("we", -1.0), ("q", -40.0), ("low", -45.0)]
    teacher = Tokenizer(models.Unigram(pieces, unk_id=0))
    assert teacher.encode("qwe").tokens == ["qw", "e"]  # -40; "q", "we" have -41
    trimmed = trim_vocabulary(teacher, torch.tensor([0, 0, 5, 5, 0, 0]), 5)
    assert trimmed.kept.tolist() == [0, 1, 2, 3, 5]
    # Without "low", UNK would cost 30, and UNK and "we" 31.
    assert trimmed.tokenizer.backend_tokenizer.encode("qwe").tokens == ["qw", "e"]


def test_rare_characters_give_way_where_they_would_fill_the_vocabulary():
    common = [chr(0x4E00 + i) for i in range(100)]
    rare = [chr(0x6000 + i) for i in range(300)]
    counts = dict.fromkeys(common, 10_000) | dict.fromkeys(rare, 1)
    assert set(frequent_characters(counts, 2000)) == {*common, *rare}
    assert frequent_characters(counts, 600)[:100] == common and len(frequent_characters(counts, 600)) == 150
    assert len(frequent_characters(dict.fromkeys(rare, 1), 600)) == 300
    assert frequent_characters({}, 600) == []


def test_a_note_says_when_the_text_uses_few_of_the_tokens():
    teacher = family("wordpiece")
    few = trim_vocabulary(teacher, ["the cat"] * 3, 300)
    assert len(few) == 300 and few.notes[0].startswith("The text uses only ")
    assert not any("uses only" in note for note in trim_vocabulary(teacher, many_scripts(), 250).notes)


def test_a_token_that_its_pieces_stand_in_for_makes_room():
    """``inks`` is more frequent than ``oak``, but its row is that of ``ink`` and ``##s``."""
    words = ["[UNK]", *"oi", *(f"##{letter}" for letter in "aksn"), "ink", "inks", "oak"]
    teacher = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    teacher.pre_tokenizer = pre_tokenizers.Whitespace()
    teacher.add_special_tokens(["[UNK]"])
    text = ["ink"] * 9 + ["inks"] * 5 + ["oak"] * 3
    rows = torch.randn(len(words), 16, generator=torch.Generator().manual_seed(0))
    ids = {word: i for i, word in enumerate(words)}
    size = len(words) - 1
    by_count = set(trim_vocabulary(teacher, text, size).tokenizer.get_vocab())
    assert by_count == set(words) - {"oak"}
    rows -= rows.mean(0)
    rows[ids["inks"]] = 0.75 * rows[ids["ink"]] + 0.25 * rows[ids["##s"]]
    needed = set(trim_vocabulary(teacher, text, size, embedding=rows).tokenizer.get_vocab())
    assert needed == set(words) - {"inks"}
    # The rows of tokens decide, not that there are any.
    rows[ids["inks"]] = -rows[ids["ink"]]
    assert set(trim_vocabulary(teacher, text, size, embedding=rows).tokenizer.get_vocab()) == by_count
    with pytest.raises(VocabdistilError, match="^embedding: expected a row for each of 10 ids, got 3$"):
        trim_vocabulary(teacher, text, size, embedding=rows[:3])


@pytest.mark.parametrize("name", FAMILIES)
def test_what_rows_decide_keeps_what_must_stay(name):
    teacher = family(name)
    counts = count_tokens(teacher, many_scripts())
    rows = torch.randn(len(counts), 8, generator=torch.Generator().manual_seed(1))
    chosen, plain = (trim_vocabulary(teacher, counts, 320, embedding=given) for given in (rows, None))
    assert len(chosen) == len(plain)
    for text in many_scripts():
        ids = chosen.tokenizer.backend_tokenizer.encode(text).ids
        if all(token in chosen.tokenizer.get_vocab() for token in teacher.encode(text).tokens):
            assert [int(chosen.kept[i]) for i in ids] == teacher.encode(text).ids
