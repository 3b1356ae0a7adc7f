"""Trimmed vocabularies: what is kept, and that kept tokens are read as before."""

from __future__ import annotations

import random

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from tests._families import FAMILIES, byte_level, family, many_scripts, plain_text
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
    """Texts of a few words each, so that many are made of kept tokens alone."""
    rng = random.Random(3)
    words = " ".join(many_scripts()).split(" ") + ["<mask>", "walking home", "été", "<|x|>", "Été", "quietly", "stone "]
    return [" ".join(rng.choices(words, k=rng.randint(1, 6))) for _ in range(count)]


@pytest.mark.parametrize("name", [*FAMILIES, *MORE])
@pytest.mark.parametrize("share", [0.45, 0.8])
def test_texts_of_kept_tokens_read_as_before(name, share):
    teacher = made(name)
    size = teacher.get_vocab_size()
    # All bytes are kept where there are any.
    trimmed = trim_vocabulary(teacher, plain_text(), max(round(size * share), 280 if size > 280 else 0))
    student, kept = trimmed.tokenizer.backend_tokenizer, trimmed.kept
    assert len(kept) == len(set(kept.tolist())) == len(trimmed) == student.get_vocab_size()
    assert [student.id_to_token(i) for i in range(len(kept))] == [teacher.id_to_token(i) for i in kept.tolist()]
    unk = getattr(teacher.model, "unk_token", None) or "<unk>"
    available, tried, equal = set(kept.tolist()), 0, 0
    for text in samples(1500):
        before, after = teacher.encode(text), student.encode(text)
        if available.issuperset(before.ids) and unk not in before.tokens:
            tried += 1
            equal += before.tokens == after.tokens and before.ids == kept[after.ids].tolist()
    assert equal == tried > 20
