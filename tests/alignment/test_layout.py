"""Where tokens lie in their texts: by what they spell, and by what tokenizers report, must be the same place."""

from __future__ import annotations

import functools
import importlib.util
import json
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

import vocabdistil as vd
from tests._families import FAMILIES, family
from tests.alignment.test_boundary import HARD
from tests.alignment.test_words import TOKENIZERS
from vocabdistil.alignment.surfaces import UNKNOWN, Known

module = import_module("vocabdistil.alignment.methods")
HOSTILE = [
    "\ufffd", "\u200b", "\u200f", "\u200d", "\u00ad", "\ufeff", "\x00", "\x01", "\x07", "\x7f", "\x85", "\u2581", "\n",
    "\r\n", "\t", " ", "  ", " \n", "\u00a0", "\u2028", "\u3000", "👩‍👩‍👧", "👍🏽", "🇩🇪", "e\u0301", "\u0301",
    "a\u0327\u0301", "ﬁ", "½", "İ", "ẞ", "´", "한", "\u1112\u1161\u11ab", "☃", "語", "<s>", "</s>", "[UNK]", "<mask>",
    "⭢", "𝔸", "\ue000",
]  # fmt: skip
WORDS = ["walking", "home", "There,", "To", "été", "Снег", "й", "a", "b", ".", ",", "it's", "東京"]
texts = st.lists(st.sampled_from([*HOSTILE, *WORDS, *(f" {word}" for word in WORDS)]), max_size=14).map("".join)

plain_texts = st.lists(st.sampled_from([*WORDS, "\n", *(f" {word}" for word in WORDS)]), max_size=14).map("".join)


def sentencepiece_style(base: str, *, first: bool = False) -> Tokenizer:
    """As XLM-R and Pegasus are converted: line breaks and runs of spaces become one, and one begins every word."""
    tokenizer = Tokenizer.from_str(family(base).to_str())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    if first:
        tokenizer.normalizer = normalizers.Sequence(
            [tokenizer.normalizer, normalizers.Strip(left=False, right=True)]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
        )
    return tokenizer


def no_unknown(level: str) -> Tokenizer:
    """Without an unknown token and without all characters or bytes, so that a text loses some."""
    state = json.loads(family("sentencepiece BPE" if level == "characters" else "byte-level").to_str())
    for token in ("a", "☃", "语", "Ã", "é", "©"):
        state["model"]["vocab"].pop(token, None)
    vocab = state["model"]["vocab"]
    state["model"]["vocab"] = {token: n for n, token in enumerate(vocab)}
    state["model"]["merges"] = [
        [a, b] for a, b in state["model"]["merges"] if a in vocab and b in vocab and a + b in vocab
    ]
    state["model"]["unk_token"] = None
    state["added_tokens"], state["post_processor"] = [], None
    return Tokenizer.from_str(json.dumps(state))


def charsmap(rule: str) -> Tokenizer:
    """With the normalizer of real SentencePiece models."""
    from tests.alignment.test_charsmap import charsmap_model

    return charsmap_model(rule)


RULES = ["nmt_nfkc", "nmt_nfkc_cf", "nfkc"] if importlib.util.find_spec("sentencepiece") else []
MORE = {
    "XLM-R": lambda: sentencepiece_style("unigram"),
    "Pegasus": lambda: sentencepiece_style("unigram", first=True),
    "XLM-R bytes": lambda: sentencepiece_style("unigram bytes"),
    "no unknown characters": lambda: no_unknown("characters"),
    "no unknown bytes": lambda: no_unknown("bytes"),
    **{f"charsmap {rule}": functools.partial(charsmap, rule) for rule in RULES},
    **{name: functools.partial(family, name) for name in FAMILIES},
    **{f"words: {name}": make for name, make in TOKENIZERS.items()},
}


@functools.cache
def tokenizer_of(name: str) -> Tokenizer:
    return MORE[name]()


def laid_out(source: Known, text: str, encoding: Any, spell: bool) -> list[tuple[int, int]] | None:
    """The spans of a text's tokens by one way alone, by what they spell or by the offsets that the tokenizer reports;
    None where it does not lead there."""
    side = module.new_side(source, 1, (0, 0))
    if side.read([text], [0], [encoding], False, spell, not spell, 1) and spell:
        return None
    starts, ends, _ = side.row(0)
    return [(start, end) if start < end else (0, 0) for start, end in zip(starts, ends, strict=True)]


def read(name: str, text: str) -> tuple[Known, Any]:
    source = module.known(tokenizer_of(name), "teacher")
    return source, source.info.backend.encode(text, add_special_tokens=False)


each = pytest.mark.parametrize("name", MORE)


@each
def test_both_ways_lead_to_the_same_places(name: str) -> None:
    spelled = 0
    for text in [*HARD, *(f"{a}{c}{b}" for c in HOSTILE for a in ("", "a", "a ") for b in ("", "b", " b"))]:
        source, encoding = read(name, text)
        want = laid_out(source, text, encoding, True)
        if want is not None:
            spelled += 1
            assert laid_out(source, text, encoding, False) == want, (text, encoding.tokens)
    assert spelled > 150


@settings(max_examples=1500, deadline=None)
@given(texts | st.text(max_size=30), st.sampled_from(sorted(MORE)))
def test_both_ways_lead_to_the_same_places_in_any_text(text: str, name: str) -> None:
    source, encoding = read(name, text)
    want = laid_out(source, text, encoding, True)
    if want is not None:
        assert laid_out(source, text, encoding, False) == want, encoding.tokens


@settings(max_examples=1500, deadline=None)
@given(texts, st.sampled_from(sorted(MORE)), st.integers(0, 8), st.sampled_from([-2, -1, 1, 3, 10**6]))
def test_wrong_offsets_move_nothing(text: str, name: str, first: int, shift: int) -> None:
    source, encoding = read(name, text)
    want = laid_out(source, text, encoding, True)
    if want is not None:
        shifts = [shift if k >= first else 0 for k in range(len(encoding))]
        offsets = [(max(a + by, 0), max(b + by, 0)) for (a, b), by in zip(encoding.offsets, shifts, strict=True)]
        wrong = SimpleNamespace(ids=encoding.ids, word_ids=encoding.word_ids, offsets=offsets)
        if all(source.surfaces.kinds[i] != UNKNOWN for i in encoding.ids):
            assert laid_out(source, text, wrong, False) == want, encoding.tokens


def is_reported(text: str, spans: list[tuple[int, int]], offsets: list[tuple[int, int]], k: int) -> bool:
    """Whether a token has characters to itself, not white space alone, and the tokenizer reports these."""
    start, end = spans[k]
    alone = all(b <= start or end <= a for j, (a, b) in enumerate(spans) if j != k)
    reported = text[slice(*offsets[k])].strip()
    return alone and bool(reported) and reported.encode() == text.encode()[start:end].strip()


@settings(max_examples=1500, deadline=None)
@given(plain_texts, st.sampled_from(sorted(MORE)), st.integers(0, 12))
def test_a_token_that_does_not_fit_moves_no_other(text: str, name: str, odd: int) -> None:
    source, encoding = read(name, text)
    want = laid_out(source, text, encoding, True)
    kinds = [source.surfaces.kinds[i] for i in encoding.ids]
    if want is not None and odd < len(encoding) and UNKNOWN not in kinds and all(
        is_reported(text, want, encoding.offsets, k) for k in range(odd, min(odd + 2, len(encoding)))
    ):
        spelled, data = source.surfaces.texts, text.encode()

        def misfits(i: int) -> tuple[bool, bool, int]:
            """It asks for as many spaces as the one in its place, and is not in the text."""
            spaces = [len(piece) - len(piece.lstrip(b" ")) for piece in (spelled[i], spelled[encoding.ids[odd]])]
            return spaces[0] == spaces[1], spelled[i].strip() not in data, len(spelled[i])

        misfit = max(range(len(spelled)), key=misfits)
        ids = [misfit if k == odd else i for k, i in enumerate(encoding.ids)]
        wrong = SimpleNamespace(ids=ids, word_ids=encoding.word_ids, offsets=encoding.offsets)
        got = laid_out(source, text, wrong, False)
        assert got[:odd] == want[:odd] and got[odd + 1 :] == want[odd + 1 :], encoding.tokens


def segments(text: str, name: str) -> list[str]:
    """What each token covers."""
    source, encoding = read(name, text)
    spans = laid_out(source, text, encoding, False)
    return [text.encode()[start:end].decode(errors="replace") for start, end in spans]


def pieces(text: str, teacher: str, student: str, method: str = "boundary") -> list[tuple[str, str]]:
    """What the tokens of each pair cover, white space around it aside."""
    batch = vd.align([text], tokenizer_of(teacher), tokenizer_of(student), method)
    sides = []
    for name, side in (("teacher", teacher), ("student", student)):
        located, _ = module.locate([text], module.known(tokenizer_of(side), name), name, None, method == "word")
        starts, ends, _ = located.row(0)
        first, last = (getattr(batch.pairs, f"{name}_{end}").tolist() for end in ("start", "end"))
        inner = [(a, b - 1) for a, b in zip(first, last, strict=True) if starts[a] >= 0]
        sides.append([text.encode()[starts[a] : ends[b]].decode().strip() for a, b in inner])
    return list(zip(*sides, strict=True))


@pytest.mark.parametrize(
    "student", ["XLM-R", "Pegasus", "XLM-R bytes", "wordpiece", "unigram NFKC", *(f"charsmap {rule}" for rule in RULES)]
)
@pytest.mark.parametrize("teacher", ["byte-level split", "words: GPT-4o", "words: Qwen 2", "words: Llama 3"])
@pytest.mark.parametrize("end", ["", " \ufffd", "\ufffd"])
def test_line_breaks_join_no_words(teacher: str, student: str, end: str) -> None:
    text = "there,\nTo home.\n\nA walk" + end
    found = pieces(text, teacher, student)
    plain = pieces(text.removesuffix(end), teacher, student)
    assert found[: len(plain) - 1] == plain[:-1]  # the last one may have what was put behind it
    for left, right in found:
        assert "\n" not in left and "\n" not in right, found
    assert [pair for pair in found if pair[0].startswith("To") or pair[0] == "T"], found


@pytest.mark.parametrize("mark", ["\u200f", "\u200b", "\u00ad", "\ufeff", "\x01", "\x7f", "\u200e", "\ufffd"])
@pytest.mark.parametrize("method", ["boundary", "word"])
@pytest.mark.parametrize("name", ["XLM-R", "wordpiece", "wordpiece uncased", "unigram NFKC"])
def test_what_is_dropped_joins_no_words(name: str, method: str, mark: str) -> None:
    for text in (f"walking {mark}home", f"walking {mark} home", f"walking{mark} home", f"{mark}walking home{mark}"):
        found = pieces(text, "byte-level", name, method)
        for pair in found:
            assert all(" " not in part.replace(f"{mark} ", "").replace(f" {mark}", "") for part in pair), (text, found)
        assert {left for left, _ in found if left.strip(mark) == left} or method == "word"


def test_a_character_in_bytes_is_a_part_of_one_word() -> None:
    assert pieces("i ⭢ j", "llama", "byte-level", "word") == [("i", "i"), ("⭢", "⭢"), ("j", "j")]
    assert pieces("a\u3000⭢\u3000語j b", "llama", "byte-level small", "word")[-1] == ("b", "b")
    split = pieces("walk\u3000home b", "llama", "llama", "word")
    assert [pair[0] for pair in split] == ["walk", "home", "b"]


@pytest.mark.parametrize("name", ["no unknown characters", "no unknown bytes"])
def test_what_a_model_has_no_token_for_is_passed_over(name: str) -> None:
    for text in ("walk ☃ home, éa walk", "éa walk", "éé home", "walké", "a", ""):
        source, encoding = read(name, text)
        assert laid_out(source, text, encoding, True) is not None, text
    parts = [part for part in segments("walk éa home", name) if part.strip()]
    assert [part.strip() for part in parts[-4:]] == ["h", "o", "m", "e"] or parts[-1].endswith("e")
    assert "".join(parts).split()[0] == "walk"


def test_a_mark_in_a_text_is_itself() -> None:
    for name in ("XLM-R", "llama", "unigram", "sentencepiece BPE"):
        assert "".join(segments("a▁b", name)).replace(" ", "") == "a▁b", name


@pytest.mark.parametrize("name", ["XLM-R", "wordpiece", "wordpiece uncased", "unigram NFKC", "byte-level lower"])
def test_what_becomes_of_a_character_is_what_the_tokenizer_says(name: str) -> None:
    source = module.known(tokenizer_of(name), "teacher")
    folds, mark = source.surfaces.folds, source.surfaces.mark or " "
    for page in (0, 1, 3, 4, 0x1E, 0x20, 0x21, 0x30, 0x33, 0xFB, 0xFE, 0xFF, 0x1D4, 0x1F1, 0x2F8, 0xE00):
        for code, (alternatives, _) in enumerate(folds.page(page), 256 * page):
            became = source.info.backend.normalizer.normalize_str(chr(code)).replace(mark, " ").strip(" ")
            assert (alternatives[0] if alternatives else chr(code)).strip(" ") == became, hex(code)


def test_the_worked_example_of_the_source() -> None:
    """What stands at the head of csrc/remap/locate.cpp."""
    words = ["[UNK]", "[CLS]", "[SEP]", "ada", "e", "honey", "##soup"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 1), ("[SEP]", 2)])
    tokenizer.add_special_tokens(words[:3])

    def places(max_length: int | None, by_word: bool) -> tuple[list[tuple[int, int]], int]:
        source = module.known(tokenizer, "teacher")
        side, _ = module.locate(["Ada  É honeysoup"], source, "teacher", max_length, by_word)
        start, end, limit = side.row(0)
        return list(zip(start, end, strict=True)), limit

    spelled = [(-1, 1), (0, 3), (5, 7), (8, 13), (13, 17), (-1, 2)]
    assert places(None, False)[0] == spelled
    assert places(None, True)[0] == [*spelled[:3], (8, 17), (8, 17), (-1, 2)]
    assert places(5, False) == ([*spelled[:4], (-1, 2)], 13)
