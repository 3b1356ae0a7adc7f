"""Rows of data sets as each tokenizer reads them."""

import pytest

from tests.chats import BRACKETS, TURNS, chat_tokenizer
from vocabdistil.alignment.conversations import rendered

CHAT = [
    {"role": "system", "content": "user"},
    {"role": "user", "content": " who? "},
    {"role": "assistant", "content": "assistant\n"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": ""},
]


def learned(row, tokenizer):
    found = rendered(row, tokenizer, "teacher", "features[0]")
    return [found.text[start:end] for start, end in found.learned], found


@pytest.mark.parametrize("row", ["I walk", {"text": "I walk", "messages": None}])
def test_text(row):
    parts, found = learned(row, chat_tokenizer("llama"))
    assert parts == ["I walk"] and not found.chat


def test_prompt_and_completion():
    parts, found = learned({"prompt": "who? ", "completion": "I walk"}, chat_tokenizer("llama"))
    assert parts == ["I walk"] and found.text == "who? I walk" and not found.chat


@pytest.mark.parametrize("template", [TURNS, BRACKETS])
def test_of_messages_what_the_assistant_says(template):
    """Its words stand elsewhere in the rendering too: as a role, and in other messages."""
    tokenizer = chat_tokenizer("llama", template)
    parts, found = learned({"messages": CHAT}, tokenizer)
    assert parts == ["assistant", ""] and found.chat
    assert found.text == tokenizer.apply_chat_template(CHAT, tokenize=False)
    start = found.learned[0][0]
    assert found.text[:start].count("assistant") == 1  # its role


def test_of_a_completion_in_messages_all_of_it():
    row = {"prompt": CHAT[:2], "completion": CHAT[2:]}
    assert learned(row, chat_tokenizer("llama", TURNS))[0] == ["assistant", "and?", ""]


def test_a_template_that_moves_messages():
    """Some put what the system says into the last turn of the user."""
    template = (
        "{% for m in messages[1:] %}[{{ m['role'] }}]{% if m['role'] == 'user' and loop.last == false and "
        "loop.index0 == 2 %}{{ messages[0]['content'] }} {% endif %}{{ m['content'] }}</s>{% endfor %}"
    )
    parts, found = learned({"messages": CHAT}, chat_tokenizer("llama", template))
    assert parts == ["assistant", ""] and "user and?" in found.text


@pytest.mark.parametrize(
    ("row", "kind", "said"),
    [
        (3, TypeError, r"features\[0\]: expected a string"),
        ({"words": "x"}, TypeError, "got a mapping with the keys 'words'"),
        ({"prompt": 3, "completion": "x"}, TypeError, r"features\[0\]\['prompt'\]: expected a string"),
        ({"prompt": "x", "completion": CHAT}, TypeError, r"features\[0\]\['prompt'\]: expected a list of messages"),
        ({"messages": CHAT[:2]}, ValueError, "expected one of the assistant's"),
        ({"messages": [{"role": "assistant", "content": None}]}, ValueError, "a text as 'content'"),
    ],
)
def test_bad_rows(row, kind, said):
    with pytest.raises(kind, match=said):
        rendered(row, chat_tokenizer("llama", TURNS), "teacher", "features[0]")


def test_bad_templates():
    with pytest.raises(ValueError, match="^teacher: expected a tokenizer with a chat template"):
        rendered({"messages": CHAT}, chat_tokenizer("llama"), "teacher", "features[0]")
    for template in ("{{ messages[2]['content'] | upper }}", "{{ messages[2]['content'] }}", "as it was"):
        with pytest.raises(ValueError, match="the teacher's chat template shows as they are"):
            rendered({"messages": CHAT}, chat_tokenizer("llama", template), "teacher", "features[0]")
    with pytest.raises(ValueError, match="the teacher's chat template refuses the messages: no"):
        rendered({"messages": CHAT}, chat_tokenizer("llama", "{{ raise_exception('no') }}"), "teacher", "features[0]")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"tools": "no JSON"}, r"features\[0\]\['tools'\]: expected a list or JSON, got 'no JSON'"),
        (
            {"chat_template_kwargs": {"tokenize": True, "x": 1}},
            r"features\[0\]\['chat_template_kwargs'\]: expected none of tokenize, got it",
        ),
    ],
)
def test_bad_settings_of_the_template(more, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        rendered({"messages": CHAT, **more}, chat_tokenizer("llama", TURNS), "teacher", "features[0]")
