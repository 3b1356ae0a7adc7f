"""Rows as TRL's SFT reads them: the same ids, and the same of them learned."""

from __future__ import annotations

import json

import pytest

import vocabdistil as vd
from tests.chats import BRACKETS, TURNS, chat_tokenizer, small_llama

# What the assistant says, with what ends it, as TRL wants it marked.
MARKED_TURNS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED_BRACKETS = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] | trim }} {{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
TEXTS = ["I walk home.", "they walked home and I too", "東 he walks", "walking"]
CHATS = [
    [{"role": "user", "content": "who?"}, {"role": "assistant", "content": text},
     {"role": "user", "content": f"why {text}"}, {"role": "assistant", "content": "I walked"}]
    for text in TEXTS
]  # fmt: skip


def of_trl(tokenizer, rows, folder, **options):
    """Ids and labels of each row."""
    trl = pytest.importorskip("trl", minversion="1.16", reason="no trl that gives labels")
    import datasets

    tokenizer.pad_token = "<unk>"
    settings = {"max_length": None, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    config = trl.SFTConfig(str(folder), **settings | options)
    made = trl.SFTTrainer(
        small_llama(len(tokenizer)), config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    ).train_dataset
    return made["input_ids"], made["labels"]


def of_ours(tokenizer, rows):
    batch = vd.CausalCollator(tokenizer, tokenizer)(rows)
    lengths = batch["attention_mask"].sum(1).tolist()
    return [[x[:n].tolist() for x, n in zip(batch[name], lengths, strict=True)] for name in ("input_ids", "labels")]


def learned(labels):
    """Trainers never read the first label, as nothing predicts it."""
    return [[-100, *row[1:]] for row in labels]


FAMILIES = {"byte-level split": MARKED_TURNS, "llama": MARKED_BRACKETS}
families = pytest.mark.parametrize("family", FAMILIES)


@families
def test_texts(family, tmp_path):
    tokenizer = chat_tokenizer(family)
    rows = [{"text": text} for text in TEXTS]
    ids, labels = of_trl(tokenizer, rows, tmp_path)
    assert of_ours(tokenizer, rows) == [list(ids), learned(labels)]


@families
def test_completions(family, tmp_path):
    tokenizer = chat_tokenizer(family)
    rows = [{"prompt": "who walks?", "completion": f" {text}"} for text in TEXTS]
    ids, labels = of_trl(tokenizer, rows, tmp_path)
    assert of_ours(tokenizer, rows) == [list(ids), learned(labels)]


@families
def test_conversations_of_which_the_assistant_is_learned(family, tmp_path):
    tokenizer = chat_tokenizer(family, FAMILIES[family])
    rows = [{"messages": chat} for chat in CHATS]
    ids, labels = of_trl(tokenizer, rows, tmp_path, assistant_only_loss=True)
    assert of_ours(tokenizer, rows) == [list(ids), learned(labels)]


def test_completions_of_conversations(tmp_path):
    """TRL also learns what a template writes behind the end of the last message, which nobody generates."""
    tokenizer = chat_tokenizer("byte-level split", MARKED_TURNS)
    rows = [{"prompt": chat[:3], "completion": chat[3:]} for chat in CHATS]
    ids, labels = of_trl(tokenizer, rows, tmp_path)
    ours = of_ours(tokenizer, rows)
    assert ours[0] == list(ids)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for row, one in zip(ours[1], learned(labels), strict=True):
        last = len(row) - 1 - row[::-1].index(end)
        assert row[: last + 1] == one[: last + 1] and set(row[last + 1 :]) == {-100}


def test_tools_and_settings_of_the_template(tmp_path):
    tokenizer = chat_tokenizer("byte-level split", "{{ name ~ (tools | length) }}" + MARKED_TURNS)
    tool = {"type": "function", "function": {"name": "walk", "parameters": {}}}
    others = {"tools": json.dumps([tool]), "chat_template_kwargs": {"name": "he"}}
    rows = [{"messages": chat, **others} for chat in CHATS]
    ids, labels = of_trl(tokenizer, rows, tmp_path, assistant_only_loss=True)
    assert of_ours(tokenizer, rows) == [list(ids), learned(labels)]
    assert of_ours(tokenizer, [row | {"tools": [tool]} for row in rows])[0] == list(ids)


def test_marks_change_nothing(tmp_path):
    for family, plain in (("byte-level split", TURNS), ("llama", BRACKETS)):
        rows = [{"messages": chat} for chat in CHATS]
        tokenizer = chat_tokenizer(family, FAMILIES[family])
        found = of_ours(tokenizer, rows)
        tokenizer.chat_template = plain
        assert of_ours(tokenizer, rows) == found
