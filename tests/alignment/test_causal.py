"""Batches for causal models."""

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import vocabdistil as vd
from tests._families import FAMILIES
from tests.chats import BRACKETS, TURNS, chat_tokenizer
from tests.models.tiny_decoders import gpt2_bytes, llama2_bpe, mistral_unigram
from vocabdistil.alignment.conversations import rendered

ROWS = [
    {"text": "I walk home. "},
    {"prompt": "Who walks? ", "completion": "they walked home."},
    {
        "messages": [
            {"role": "user", "content": "who "},
            {"role": "assistant", "content": " he walked home\n"},
            {"role": "user", "content": "who "},
            {"role": "assistant", "content": "I?"},
        ]
    },
]


def spelled(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(ids.tolist())


def pairs_of(batch, teacher, student):
    """The tokens of each pair."""
    flat, pairs = (batch["teacher"]["input_ids"].flatten(), batch["input_ids"].flatten()), batch["pairs"]
    fields = ("teacher_start", "teacher_end", "student_start", "student_end")
    return [
        (spelled(teacher, flat[0][a:b]), spelled(student, flat[1][c:d]))
        for a, b, c, d in zip(*(getattr(pairs, name).tolist() for name in fields), strict=True)
    ]


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_learned_is_aligned_and_where_it_ends(packed):
    teacher, student = chat_tokenizer("byte-level split", TURNS), chat_tokenizer("llama", BRACKETS)
    batch = vd.CausalCollator(teacher, student, 64, packed=packed)(ROWS)
    said = pairs_of(batch, teacher, student)
    letters = [([c], [c]) for c in "home"]
    space, end = (["Ġ"], ["▁"]), (["</s>"], ["</s>"])
    assert said == [
        # Before "I" the teacher has read nothing.
        (["Ġwalk"], ["▁walk"]), space, *letters, (["."], ["."]), space, end,
        *[([c], [c]) for c in "they"], (["Ġwalk", "ed"], ["▁walked"]), space, *letters, (["."], ["."]), end,
        *[([c], [c]) for c in "he"], (["Ġwalk", "ed"], ["▁walked"]), space, *letters, (["<|im_end|>"], ["</s>"]),
        (["I"], ["<0x49>"]), (["?"], ["?"]), (["<|im_end|>"], ["</s>"]),
    ]  # fmt: skip
    labels = batch["labels"]
    kept = ["".join(spelled(student, row[row != -100])).replace("<0x49>", "I") for row in labels]
    expected = ["▁I▁walk▁home.▁</s>", "they▁walked▁home.</s>", "he▁walked▁home▁</s>I?▁</s>"]
    assert kept == (["".join(expected)] if packed else expected)
    assert batch["counts"] == {"tokens": int((labels != -100).sum()), "pairs": len(said)}


def test_packed_is_padded_without_padding():
    teacher, student = chat_tokenizer("unigram", TURNS), chat_tokenizer("byte-level", BRACKETS)
    padded = vd.CausalCollator(teacher, student, 64)(ROWS)
    packed = vd.CausalCollator(teacher, student, 64, packed=True)(ROWS)
    assert pairs_of(padded, teacher, student) == pairs_of(packed, teacher, student)
    for one, other in ((padded, packed), (padded["teacher"], packed["teacher"])):
        kept = one["attention_mask"].bool()
        assert torch.equal(one["input_ids"][kept], other["input_ids"][0])
        assert torch.equal(kept.cumsum(1)[kept] - 1, other["position_ids"][0])
        assert "attention_mask" not in other
    assert torch.equal(padded["labels"][padded["attention_mask"].bool()], packed["labels"][0])


@pytest.mark.parametrize("cut", range(2, 12))
def test_what_is_cut_is_in_no_pair(cut):
    """A word that is cut on one side has no pair; those before it are as they are without a cut."""
    teacher, student = chat_tokenizer("byte-level split"), chat_tokenizer("llama")
    text = {"text": "they walked, they walked"}
    whole = pairs_of(vd.CausalCollator(teacher, student)([text]), teacher, student)
    for lengths in ((cut, 64), (64, cut)):
        batch = vd.CausalCollator(teacher, student, lengths)([text])
        found = pairs_of(batch, teacher, student)
        assert found == whole[: len(found)]
        side = batch["teacher"] if lengths[0] == cut else batch
        assert side["input_ids"].shape[1] == cut
        read = sum(len(tokens[lengths[1] == cut]) for tokens in found)
        following = whole[len(found)][lengths[1] == cut]
        # Before the first pair: the teacher has a letter that nothing predicts, the student its beginning and a space
        # too.
        begins = 1 if lengths[0] == cut else 3
        assert (not read or read + begins <= cut) and cut < read + begins + len(following)


def test_a_token_that_is_partly_of_the_prompt():
    """``walked`` of which ``wal`` was asked is not learned, and in no pair; nor are what the teacher has for it."""
    teacher, student = chat_tokenizer("byte-level split"), chat_tokenizer("llama")
    row = {"prompt": "they wal", "completion": "ked home"}
    batch = vd.CausalCollator(teacher, student)([row])
    assert [t for t, _ in pairs_of(batch, teacher, student)] == [["Ġ"], *([c] for c in "home"), ["</s>"]]
    labels = batch["labels"][0]
    assert spelled(student, labels[labels != -100]) == ["▁", *"home", "</s>"]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name):
    """All that the assistant says is in a pair, and each of its ends."""
    teacher, student = chat_tokenizer("byte-level", TURNS), chat_tokenizer(name, TURNS)
    batch = vd.CausalCollator(teacher, student, 128)(ROWS[2:])
    said = pairs_of(batch, teacher, student)
    assert said.count((["<|im_end|>"], ["<|im_end|>"])) == 2
    spelled_by_teacher = "".join(token for row, _ in said for token in row).replace("Ġ", "")
    assert spelled_by_teacher == "hewalkedhome<|im_end|>I?<|im_end|>"
    assert batch["counts"]["tokens"] >= sum(len(tokens) for _, tokens in said)


def test_white_space_before_the_end_may_be_unknown():
    """WordPiece has no line feed either, but drops it."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "home": 3, "who": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|\s|."), "isolated")
    student = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    student.chat_template = "{% for m in messages %}{{ m['content'] }}\n</s>{% endfor %}"
    said = {"messages": [{"role": "user", "content": "who"}, {"role": "assistant", "content": "home"}]}
    batch = vd.CausalCollator(chat_tokenizer("byte-level", TURNS), student)([said])
    assert batch["labels"].tolist() == [[-100, -100, -100, 3, 0, 2]]
    assert batch["pairs"].student_start.tolist() == [3, 5]


def test_nothing_to_learn():
    tokenizer = chat_tokenizer("byte-level split")
    batch = vd.CausalCollator(tokenizer, tokenizer, 4)([{"prompt": "they walked home", "completion": "x"}])
    assert batch["counts"] == {"tokens": 0, "pairs": 0}
    assert np.all(batch["labels"].numpy() == -100)


@pytest.mark.parametrize(
    ("options", "rows", "kind", "said"),
    [
        ({}, [], ValueError, "features: expected at least one"),
        ({}, "text", TypeError, "features: expected a list of rows"),
        ({}, [3], TypeError, r"features\[0\]: expected a string"),
        ({"max_length": 1}, ["x"], ValueError, "max_length: expected at least 2"),
        ({"max_length": (8, 8, 8)}, ["x"], ValueError, "max_length: expected one length"),
        ({"max_length": "8"}, ["x"], TypeError, "max_length: expected an integer"),
    ],
)
def test_bad_input(options, rows, kind, said):
    tokenizer = chat_tokenizer("llama")
    with pytest.raises(kind, match=said):
        vd.CausalCollator(tokenizer, tokenizer, **options)(rows)


def learned(tokenizer, row):
    """The tokens that have labels."""
    labels = vd.CausalCollator(tokenizer, tokenizer, 64)([row])["labels"][0]
    return spelled(tokenizer, labels[labels != -100])


def test_the_end_is_learned_where_it_is_the_unknown_token_too():
    tokenizer = gpt2_bytes()
    assert tokenizer.unk_token_id == tokenizer.eos_token_id
    batch = vd.CausalCollator(tokenizer, tokenizer)([{"text": "I walk home."}])
    assert batch["labels"][0, -1] == tokenizer.eos_token_id
    assert batch["pairs"].student_end.max() == batch["input_ids"].numel()


def test_an_end_that_a_text_has_is_not_doubled():
    tokenizer = gpt2_bytes()
    ids = vd.CausalCollator(tokenizer, tokenizer)([{"text": f"I walk{tokenizer.eos_token}"}])["input_ids"][0]
    assert (ids == tokenizer.eos_token_id).sum() == 1 + (ids[0] == tokenizer.bos_token_id)


@pytest.mark.parametrize("make", [llama2_bpe, mistral_unigram])
def test_the_first_word_of_an_answer_is_learned_with_the_space_of_the_template(make):
    tokenizer = make()
    row = {"messages": [{"role": "user", "content": "who"}, {"role": "assistant", "content": "lightness lightness"}]}
    said = tokenizer.convert_tokens_to_string(learned(tokenizer, row))
    assert said.replace("</s>", "").split() == ["lightness", "lightness"]


def test_templates_get_the_tools_and_may_strip_line_breaks():
    turns = "{% for m in messages %}<|im_start|>{{ m['content'].lstrip('\n') }}{% endfor %}"
    template = "{{ tools[0]['function']['name'] if tools else '' }}" + turns
    tokenizer = chat_tokenizer("byte-level", template)
    row = {"messages": [{"role": "assistant", "content": "\n  walk"}]}
    row["tools"] = [{"type": "function", "function": {"name": "home"}}]
    text = rendered(row, tokenizer, "student", "row")
    assert text.text == "home<|im_start|>  walk"
    assert [text.text[a:b] for a, b in text.learned] == ["walk"]
