"""Decoders with fewer tokens: what stays is computed, cut, written and ended as before."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import vocabdistil as vd
from tests._families import plain_text
from tests.models.tiny_decoders import (
    DECODERS,
    WITH_CHAT,
    lines,
    llama3_bytes,
    qwen_bytes,
    rare_token,
    tiny_decoder,
)
from vocabdistil.cli import main
from vocabdistil.core.errors import VocabdistilError
from vocabdistil.evaluation import metrics as schema
from vocabdistil.models.named_tokens import named_ids
from vocabdistil.models.teachers import load_teacher
from vocabdistil.models.vocabularies import trim_vocabulary

SMALL = {"time_batch": 2, "time_length": 12, "max_length": 48, "quiet": True, "vocab_size": 400}
LOST = 40
# Their chat templates put special tokens or ends of lines around each turn, so that its tokens are as they are alone.
APART = (llama3_bytes, qwen_bytes)
CHATS = [
    [{"role": "user", "content": line}, {"role": "assistant", "content": other}, {"role": "user", "content": line}]
    for line, other in zip(lines(), lines()[1:], strict=False)
]


@functools.cache
def _root() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="trimmed-decoders-")


@functools.cache
def trimmed(name: str, dtype: torch.dtype = torch.float32) -> vd.DistillResult:
    teacher, out = tiny_decoder(name, dtype), Path(_root().name) / f"{name}-{dtype}"
    size = len(AutoTokenizer.from_pretrained(teacher)) - LOST
    return vd.trim(teacher=teacher, text=lines() * 3, out=out, **SMALL | {"vocab_size": size})


class Pair:
    """A teacher and its student as anyone loads them, and the teacher's id of each of the student's tokens."""

    def __init__(self, name: str) -> None:
        folders = tiny_decoder(name), trimmed(name).path
        self.tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in folders]
        self.models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders]
        (theirs, ours), size = self.tokenizers, self.models[0].config.vocab_size
        names = sorted(ours.get_vocab(), key=ours.get_vocab().__getitem__)
        self.kept = torch.tensor([theirs.get_vocab()[token] for token in names])
        self.lost = sorted({*range(size)} - {*self.kept.tolist()})

    def read(self) -> list[str]:
        """Lines all of whose tokens stayed."""
        theirs, ours = self.tokenizers
        return [line for line in lines() if set(theirs.tokenize(line)) <= ours.get_vocab().keys()]


@pytest.fixture(scope="module", params=DECODERS)
def pair(request) -> Pair:
    return Pair(request.param)


def test_fewer_rows_and_no_other_tokens(pair):
    (theirs, ours), (teacher, student) = pair.tokenizers, pair.models
    assert len(ours) == len(pair.kept) == len(theirs) - LOST <= len(teacher.get_input_embeddings().weight) - LOST
    rows = student.get_input_embeddings().weight, student.get_output_embeddings().weight
    assert [len(row) for row in rows] == [len(ours)] * 2 and student.config.vocab_size == len(ours)
    assert torch.equal(rows[0], teacher.get_input_embeddings().weight[pair.kept])
    assert torch.equal(rows[1], teacher.get_output_embeddings().weight[pair.kept])
    biases = [getattr(model.get_output_embeddings(), "bias", None) for model in (teacher, student)]
    assert (biases[0] is None) == (biases[1] is None)
    assert biases[0] is None or torch.equal(biases[1], biases[0][pair.kept])
    tied = teacher.get_input_embeddings().weight is teacher.get_output_embeddings().weight
    assert (rows[0] is rows[1]) == tied == student.config.tie_word_embeddings


@torch.no_grad()
def test_a_text_whose_tokens_stayed_is_read_the_same(pair):
    (theirs, ours), (teacher, student) = pair.tokenizers, pair.models
    texts = pair.read()
    assert len(texts) >= 4
    for text in texts:
        before, after = (tokenizer(text, return_tensors="pt")["input_ids"] for tokenizer in (theirs, ours))
        assert torch.equal(pair.kept[after], before)
        assert ours.decode(after[0]) == theirs.decode(before[0])
        wanted = teacher(before, output_hidden_states=True)
        got = student(after, output_hidden_states=True)
        assert all(map(torch.equal, got.hidden_states, wanted.hidden_states))
        torch.testing.assert_close(got.logits, wanted.logits[..., pair.kept], rtol=1e-5, atol=1e-5)


def test_what_is_written_is_the_same_where_nothing_lost_was_likelier(pair):
    (theirs, ours), (teacher, student) = pair.tokenizers, pair.models
    how = {"max_new_tokens": 16, "do_sample": False}
    for text in pair.read()[:4]:
        before, after = (tokenizer(text, return_tensors="pt") for tokenizer in (theirs, ours))
        wanted = teacher.generate(**before, **how, suppress_tokens=pair.lost)
        assert torch.equal(pair.kept[student.generate(**after, **how)], wanted)


def test_ids_are_those_of_the_same_tokens(pair):
    (theirs, ours), (teacher, student) = pair.tokenizers, pair.models
    for before, after in (
        (teacher.config, student.config), (teacher.generation_config, student.generation_config)
    ):  # fmt: skip
        assert pair.kept[torch.tensor(after.eos_token_id)].tolist() == before.eos_token_id
        for name in ("bos_token_id", "pad_token_id"):
            old, new = getattr(before, name), getattr(after, name)
            assert (new is None) == (old is None) and (new is None or pair.kept[new] == old)
    assert ours.special_tokens_map == theirs.special_tokens_map
    added = {token.content: token.special for token in theirs.added_tokens_decoder.values()}
    assert {token.content: token.special for token in ours.added_tokens_decoder.values()} == added


@pytest.mark.parametrize("name", WITH_CHAT)
def test_a_chat_is_read_the_same(name):
    pair = Pair(name)
    theirs, ours = pair.tokenizers
    assert ours.chat_template == theirs.chat_template
    kept, read = set(pair.kept.tolist()), set(pair.read())
    seen = 0
    for options in ({}, {"add_generation_prompt": True}, {"tools": [{"name": "a"}], "enable_thinking": False}):
        for chat in CHATS:
            before, after = (
                tokenizer.apply_chat_template(chat, return_dict=True, **options)["input_ids"]
                for tokenizer in (theirs, ours)
            )
            stays = {turn["content"] for turn in chat} <= read
            if DECODERS[name].tokenizer in APART:
                assert set(before) <= kept or not stays
            if set(before) <= kept:
                assert pair.kept[torch.tensor(after)].tolist() == before
                seen += stays
    assert seen >= 3


def test_the_report(pair):
    name = Path(pair.models[0].name_or_path).name.removesuffix("-torch.float32")
    result = trimmed(name)
    found = result.metrics
    assert json.loads((result.path / "metrics.json").read_text()) == found
    assert "loyalty" not in found and found["next_tokens"].keys() == schema.NextTokenFigures.__annotations__.keys()
    figures = found["next_tokens"]
    assert figures["places"] > 0 and 0 < figures["kept_probability"] <= 1 and 0 <= figures["agreement"] <= 1
    for side, tokenizer, model in zip(("teacher_", ""), pair.tokenizers, pair.models, strict=True):
        held = sorted(set(lines()))
        expected = vd.bits_per_byte(model, tokenizer, held, 48)
        assert figures[f"{side}bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    card = (result.path / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card and "bits per byte" in card and "feature-extraction" not in card


def test_a_teacher_of_its_own_vocabulary_agrees_with_itself(tmp_path):
    teacher = tiny_decoder("llama-3-tied")
    made = vd.trim(teacher=teacher, text=lines(), out=tmp_path / "student", **SMALL | {"vocab_size": 9000})
    figures = made.metrics["next_tokens"]
    assert figures["agreement"] == 1 and figures["next_token_kl"] == pytest.approx(0, abs=1e-9)
    assert figures["bits_per_byte"] == pytest.approx(figures["teacher_bits_per_byte"], rel=1e-6)
    weights = load_file(made.path / "model.safetensors")
    assert all(value.dtype == torch.float32 for value in weights.values())


def test_tokens_are_chosen_by_count_alone(tmp_path):
    teacher, texts, size = load_teacher(tiny_decoder("qwen3"), decoders=True), plain_text()[:60], 340
    made = vd.trim(teacher=teacher.name, text=texts, out=tmp_path / "student", **SMALL | {"vocab_size": size})
    by_count, by_distance = (
        trim_vocabulary(teacher.tokenizer, texts, size, embedding=embedding, keep=named_ids(teacher)).tokenizer
        for embedding in (None, teacher.embedding)
    )
    assert AutoTokenizer.from_pretrained(made.path).get_vocab() == by_count.get_vocab() != by_distance.get_vocab()


def test_of_long_texts_the_beginning_is_compared(tmp_path):
    texts, options = [" ".join(lines()[i:] * 9) for i in range(3)], SMALL | {"vocab_size": 440, "max_length": 16}
    made = vd.trim(teacher=tiny_decoder("gpt2"), text=texts, out=tmp_path / "student", **options)
    model = AutoModelForCausalLM.from_pretrained(made.path)
    expected = vd.bits_per_byte(model, AutoTokenizer.from_pretrained(made.path), [text[:64] for text in texts], 16)
    assert made.metrics["next_tokens"]["bits_per_byte"] == pytest.approx(expected, rel=1e-6)


def test_the_dtype_stays():
    name = "gemma3"
    path = tiny_decoder(name, torch.bfloat16)
    before, after = (load_file(folder / "model.safetensors") for folder in (path, trimmed(name, torch.bfloat16).path))
    assert before.keys() == after.keys() and all(value.dtype == torch.bfloat16 for value in after.values())
    vocabulary = {key for key in before if before[key].shape != after[key].shape}
    assert all(torch.equal(before[key], after[key]) for key in before.keys() - vocabulary)
    assert vocabulary == {"model.embed_tokens.weight"}
    ids = torch.tensor([[3, 4, 5]])
    student = AutoModelForCausalLM.from_pretrained(trimmed(name, torch.bfloat16).path)
    assert bool(student(ids).logits.isfinite().all())


def test_other_ids_that_generation_names(tmp_path):
    folder = tmp_path / "teacher"
    source = tiny_decoder("qwen2")
    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModelForCausalLM.from_pretrained(source)
    rare, common = rare_token(tokenizer) - 1, tokenizer.encode(lines()[0], add_special_tokens=False)[0]
    settings = {
        "suppress_tokens": [common, rare - 1], "forced_eos_token_id": rare, "bad_words_ids": [[common], [rare - 1]],
        "sequence_bias": [[[common, common], -2.0], [[rare - 1, common], 1.0]], "top_p": 0.9, "length_penalty": 2.0,
    }  # fmt: skip
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    # As folders are published: what is there without effect nobody would be let to save.
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    made = vd.trim(teacher=folder, text=lines() * 3, out=tmp_path / "student", **SMALL)
    ours = AutoTokenizer.from_pretrained(made.path).get_vocab()
    names = {i: token for token, i in tokenizer.get_vocab().items()}
    assert names[rare - 1] not in ours
    found = GenerationConfig.from_pretrained(made.path)
    new = ours[names[common]]
    assert found.suppress_tokens == [new] and found.bad_words_ids == [[new]]
    assert found.forced_eos_token_id == ours[names[rare]] and list(found.sequence_bias) == [[[new, new], -2.0]]
    assert found.top_p == GenerationConfig().top_p and found.length_penalty == GenerationConfig().length_penalty
    assert found.eos_token_id[1] == ours[names[rare + 1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 2}, "layers: expected none for a decoder .gpt2., of which all layers stay, got 2"),
        ({"keep_layers": "0,1"}, "keep_layers: expected none for a decoder"),
        ({"dim": 8}, "dim: expected none for a decoder"),
        ({"whiten": 0.3}, "whiten: expected none for a decoder"),
        ({"vocabulary": "train"}, "vocabulary: expected trim for a decoder"),
        ({"vocab_size": 200}, "vocab_size: expected at least the "),
    ],
)
def test_what_a_decoder_cannot_have(options, message, tmp_path):
    with pytest.raises(VocabdistilError, match=message):
        vd.trim(teacher=tiny_decoder("gpt2"), text=lines(), out=tmp_path / "student", **SMALL | options)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_loaded_before_it_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("vocabdistil.distillation.student.load_teacher", None)
    with pytest.raises(VocabdistilError, match="layers: expected none"):
        vd.trim(teacher=tiny_decoder("gpt2"), text=lines(), out=tmp_path / "student", layers=2)


def test_quantized_weights_are_refused(tmp_path):
    folder = tmp_path / "teacher"
    shutil.copytree(tiny_decoder("llama-2"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(VocabdistilError, match="teacher: expected weights in floating point, got quantized ones"):
        vd.trim(teacher=folder, text=lines(), out=tmp_path / "student", **SMALL)


def test_a_tokenizer_without_ends_of_texts_is_refused(tmp_path):
    folder = tmp_path / "teacher"
    shutil.copytree(tiny_decoder("gpt2"), folder)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)  # which transformers 4 writes
    for draft in (False, True):
        with pytest.raises(VocabdistilError, match="teacher: expected a decoder whose tokenizer has a bos_token"):
            vd.trim(teacher=folder, text=lines(), out=tmp_path / "student", draft=draft, **SMALL)


def test_a_decoder_that_makes_vectors_is_refused(tmp_path):
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer, models

    folder = str(tmp_path / "embedder")
    transformer = models.Transformer(str(tiny_decoder("qwen3")))
    pooling = models.Pooling(transformer.get_word_embedding_dimension(), pooling_mode="lasttoken")
    SentenceTransformer(modules=[transformer, pooling], device="cpu").save(folder)
    with pytest.raises(VocabdistilError, match="has model_type 'qwen3'; expected an encoder"):
        vd.trim(teacher=folder, text=lines(), out=tmp_path / "student", **SMALL)


def refused(capsys, *arguments: str, said: str = "has model_type 'llama'; expected an encoder") -> None:
    capsys.readouterr()
    assert main(list(arguments)) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and said in told


def test_the_other_commands_take_a_decoder_or_refuse_it_in_a_line(tmp_path, capsys):
    decoder, student = str(tiny_decoder("llama-2")), str(trimmed("llama-2").path)
    text, pairs = tmp_path / "text.txt", tmp_path / "pairs.csv"
    text.write_text("\n".join(lines()), encoding="utf-8")
    pairs.write_text("a,b,1\nc,d,2\ne,f,3\n")
    out = str(tmp_path / "out")
    cache = ["--cache-teacher", str(tmp_path / "cache"), "--student", student]
    for options, said in (([], "--student: expected the folder of a"), (cache, "--cache-teacher: expected none")):
        refused(capsys, "distill", "--teacher", decoder, "--text", str(text), "--out", out, *options, said=said)
    refused(capsys, "loyalty", "--teacher", decoder, "--student", student, "--text", str(text))
    refused(capsys, "evaluate", "--model", decoder, "--pairs", str(pairs))
    refused(capsys, "bench", decoder, "--text", str(text))
    assert main(["coverage", "--teacher", decoder, "--student", student, "--text", str(text)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.csv", "text.txt"]
    cached = vd.cache_aligned(lines(), decoder, student, tmp_path / "aligned")
    assert len(cached) == len(lines())


@pytest.mark.parametrize("draft", [False, True])
def test_conversations_count_as_the_template_shows_them(tmp_path, draft):
    """As the same written as text."""
    teacher = tiny_decoder("qwen3")
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    chats = [[*chat[:2], {"role": "assistant", "content": f"{n}"}] for n, chat in enumerate(CHATS * 8)]
    file = tmp_path / "chats.jsonl"
    rows = [{"messages": chat} for chat in chats[:-1]]
    rows += [{"prompt": chats[-1][:2], "completion": chats[-1][2:]}, {"prompt": "they ", "completion": "walk"}]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    shown = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats] + ["they walk"]
    made, same = (
        vd.trim(teacher=teacher, text=text, out=tmp_path / name, draft=draft, **SMALL)
        for name, text in (("chats", [file]), ("text", shown))
    )
    assert made.metrics["text"] == same.metrics["text"] and made.metrics["texts"] == len(shown)
    a, b = (load_file(folder / "model.safetensors") for folder in (made.path, same.path))
    assert all(torch.equal(value, b[name]) for name, value in a.items())


def test_conversations_without_a_template(tmp_path):
    text = [{"messages": chat} for chat in CHATS]
    with pytest.raises(VocabdistilError, match="^text: teacher: expected a tokenizer with a chat template"):
        vd.trim(teacher=tiny_decoder("gpt2"), text=text, out=tmp_path / "out", **SMALL)
    assert not list(tmp_path.iterdir())
