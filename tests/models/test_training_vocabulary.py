"""Trained vocabularies: the teacher's rules, the same tokens on every run, and what a text supports."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from tests._families import BYTES, FAMILIES, SCRIPTS, byte_level, family, many_scripts
from vocabdistil.core.errors import VocabdistilError
from vocabdistil.models import training_vocabulary
from vocabdistil.models.training_vocabulary import train_vocabulary, train_wordpiece

KINDS = {"wordpiece": "wordpiece", "byte-bpe": "byte-level", "bpe": "llama", "unigram": "unigram NFKC"}


def text() -> list[str]:
    """Often enough that no character is rare, with words that a trainer can learn."""
    return many_scripts() * 2 + SCRIPTS * 30


def backend(vocabulary: training_vocabulary.Vocabulary) -> Tokenizer:
    return vocabulary.tokenizer.backend_tokenizer


@pytest.mark.parametrize("name", FAMILIES)
def test_text_is_treated_as_the_teacher_treats_it(name):
    teacher = family(name)
    made = train_vocabulary(teacher, text(), 560)
    assert len(made) <= 560 and made.kind == "train" and made.kept is None
    ours, theirs = (json.loads(side.to_str()) for side in (backend(made), teacher))
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        assert ours[part] == theirs[part]
    same = ours["model"].keys() - {"vocab", "merges", "unk_id"}
    assert {key: ours["model"][key] for key in same} == {key: theirs["model"][key] for key in same}
    # Added tokens come first, in the teacher's order, with their flags.
    flags = [{key: token[key] for key in token if key != "id"} for token in theirs["added_tokens"]]
    assert [{key: token[key] for key in token if key != "id"} for token in ours["added_tokens"]] == flags
    assert [token["id"] for token in ours["added_tokens"]][:4] == list(range(min(4, len(flags))))
    for line in text()[:30] + SCRIPTS:
        tokens, expected = backend(made).encode(line), teacher.encode(line)
        assert not {"<unk>", "[UNK]"} & set(tokens.tokens)
        ends = [(row[0], row[-1]) for row in (tokens.tokens, expected.tokens)]
        assert all(a == b for a, b in zip(*ends, strict=True) if b.startswith(("<s", "</", "[")))
        if not any(part in name for part in ("lower", "NFKC", "wordpiece", "roberta")):
            assert backend(made).decode(tokens.ids).strip() == line


def test_bytes_stay_where_the_teacher_falls_back_to_them():
    for name in ("llama", "unigram bytes"):
        made = train_vocabulary(family(name), many_scripts(), 500)
        assert set(BYTES) <= made.tokenizer.get_vocab().keys()
        assert "<0xCE>" in backend(made).encode("ξ").tokens
    made = train_vocabulary(family("byte-level"), ["ab ab"] * 9, 280)
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= made.tokenizer.get_vocab().keys()
    assert backend(made).decode(backend(made).encode("ξ 字").ids) == "ξ 字"


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", KINDS)
def test_another_family(source, target):
    teacher = family(KINDS[source])
    made = train_vocabulary(teacher, text(), 700, target)
    state = json.loads(backend(made).to_str())
    assert training_vocabulary.family_of(state) == target
    for line in many_scripts()[:20]:
        tokens = backend(made).encode(line).tokens
        assert not {"<unk>", "[UNK]"} & set(tokens)
        # No piece holds letters and punctuation both.
        words = [token.strip("▁#") for token in tokens if not token.startswith(("<", "["))]
        assert not any(word[:1].isalpha() and word.endswith((".", "!", "?")) for word in words)
    specials = [token for token in teacher.get_added_tokens_decoder().values() if token.special]
    assert {str(token) for token in specials} <= made.tokenizer.get_vocab().keys()


def test_wordpiece_for_a_pre_tokenizer_that_leaves_punctuation():
    teacher = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    teacher.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = train_vocabulary(teacher, many_scripts(), 400)
    assert any(token.endswith("ing") for token in made.tokenizer.get_vocab())
    assert not any(len(token) > 3 and token.endswith(".") for token in made.tokenizer.get_vocab())
    assert backend(made).encode("walking.").tokens[-1] == "."


def test_marks_at_the_ends_of_words():
    teacher = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    teacher.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False)
    teacher.train_from_iterator(many_scripts(), trainer)
    made = train_vocabulary(teacher, text(), 600)
    assert all(token.endswith("</w>") for token in [backend(made).encode(word).tokens[-1] for word in ("walking", "x")])
    assert any(len(token) > 8 and token.endswith("</w>") for token in made.tokenizer.get_vocab())


def test_the_same_vocabulary_for_any_hash_seed_and_number_of_threads(tmp_path):
    code = (
        "from tests._families import family, many_scripts\n"
        "from tests.models.test_training_vocabulary import KINDS, text\n"
        "from vocabdistil.models.training_vocabulary import train_vocabulary\n"
        "for name in KINDS:\n"
        "    made = train_vocabulary(family('roberta'), text(), 600, name)\n"
        "    print(made.tokenizer.backend_tokenizer.to_str())\n"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": str(threads), "RAYON_NUM_THREADS": str(threads)},
            capture_output=True,
            check=True,
        ).stdout
        for threads in (1, 2, 5)
    ]
    assert outputs[0] == outputs[1] == outputs[2] and outputs[0].count(b"\n") == len(KINDS)


@pytest.mark.parametrize("name", ["wordpiece", "byte-level", "llama", "unigram"])
def test_sizes(name):
    teacher = family(name)
    made = train_vocabulary(teacher, many_scripts(), 50_000)
    assert len(made) < 5000 and f"supports only {len(made):,} tokens" in made.notes[0]
    with pytest.raises(VocabdistilError, match="vocab_size: expected at least the") as caught:
        train_vocabulary(teacher, many_scripts(), 20)
    least = int(str(caught.value).split("least the ")[1].split()[0])
    assert len(train_vocabulary(teacher, many_scripts(), least)) == least
    with pytest.raises(VocabdistilError):
        train_vocabulary(teacher, many_scripts(), least - 1)
    exact = train_vocabulary(teacher, text(), least + 20)
    assert len(exact) == least + 20 and exact.notes == ()


def test_no_text_gives_the_special_tokens_and_what_spells_anything():
    assert len(train_vocabulary(family("unigram"), [], 100)) == 4
    assert len(train_vocabulary(family("byte-level"), iter(["", " "]), 300)) == 260


def test_rare_characters_go_without_a_token_where_they_would_fill_the_vocabulary():
    rare = [chr(0x4E00 + i) for i in range(400)]
    lines = many_scripts() * 100 + rare
    made = train_vocabulary(family("wordpiece"), lines, 440)
    assert len(made) == 440 and "rare characters" in made.notes[0]
    assert sum(character in made.tokenizer.get_vocab() for character in rare) < 200
    whole = train_vocabulary(family("wordpiece"), lines, 3000)
    assert whole.tokenizer.get_vocab().keys() >= set(rare) and "rare" not in " ".join(whole.notes)


def test_tokens_that_the_teacher_added_keep_their_flags_and_stay_whole():
    teacher = byte_level(450, prefix=True, roberta=True)
    teacher.normalizer = normalizers.NFC()
    teacher.add_special_tokens([AddedToken("<|x|>", rstrip=True, special=True)])
    made = train_vocabulary(teacher, many_scripts(), 450)
    names = {i: str(token) for i, token in teacher.get_added_tokens_decoder().items()}
    ours = {i: str(token) for i, token in backend(made).get_added_tokens_decoder().items()}
    for line in ("see <mask> now", "he was walking home", "été <|x|>  walks"):
        sides = (teacher.encode(line), names), (backend(made).encode(line), ours)
        found = [
            [(names[i], offsets) for i, offsets in zip(side.ids, side.offsets, strict=True) if i in names]
            for side, names in sides
        ]
        assert found[0] == found[1] and len(found[0]) > 2


def test_bad_families():
    with pytest.raises(VocabdistilError, match="family: expected wordpiece, byte-bpe, bpe or unigram, got 'x'"):
        train_vocabulary(family("wordpiece"), [], 100, "x")
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(VocabdistilError, match="family: .* another kind, got WordLevel"):
        train_vocabulary(words, [], 100)
    assert len(train_vocabulary(words, ["b c"] * 5, 100, "unigram")) > 2


def test_memory_of_very_many_words_is_bounded(monkeypatch):
    monkeypatch.setattr(training_vocabulary, "_MOST_DISTINCT", 500)
    lines = [f"common words {i} {i * 7919}" for i in range(3000)]
    state = json.loads(family("wordpiece").to_str())
    counts = training_vocabulary._count_words(state, "wordpiece", lines)
    assert len(counts) <= 500 and counts["common"] == counts["words"] == 3000
    monkeypatch.setattr(training_vocabulary, "_MOST_WORDS", 2000)
    assert {"common", "words"} <= train_vocabulary(family("wordpiece"), lines, 300).tokenizer.get_vocab().keys()


def test_a_wordpiece_vocabulary_for_a_new_model():
    base = family("wordpiece")
    vocab = train_wordpiece(text(), 420, base, ["[PAD]", "[UNK]"], "[UNK]")
    assert list(vocab.values()) == list(range(420)) and list(vocab)[:2] == ["[PAD]", "[UNK]"]
    with pytest.raises(VocabdistilError, match="vocab_size: expected at most the .* that this text supports"):
        train_wordpiece(many_scripts(), 50_000, base, ["[PAD]", "[UNK]"], "[UNK]")
