"""Teachers of every architecture: loaded, read, and refused in one line where they are none."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModel, GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from tests.models.test_bodies import batch_of
from tests.models.tiny_teachers import KINDS, LAYERS, POSITIONS, WITH_HEAD, tiny_teacher, with_code_of_its_own
from vocabdistil.core.errors import VocabdistilError
from vocabdistil.models.teachers import load_teacher, load_tokenizer


@pytest.mark.parametrize("name", KINDS)
def test_what_a_teacher_computes(name):
    teacher = load_teacher(tiny_teacher(name), prompt="query: ")
    assert teacher.prompt == "query: " and teacher.architecture is not None
    batch, head = batch_of(teacher), name in WITH_HEAD
    reading = teacher.read(**batch, all_layers=True, head=head)
    with torch.no_grad():
        want = teacher.whole(**batch, output_hidden_states=True)
        last = teacher.model(**batch).last_hidden_state
    real = batch["attention_mask"] == 1
    assert len(reading.layers) == teacher.num_layers + 1 == len(want.hidden_states)
    for ours, theirs in zip(reading.layers, [*want.hidden_states[:-1], last], strict=True):
        assert torch.equal(ours[real], theirs[real]) and ours.shape[-1] == teacher.width == 16
    assert torch.equal(teacher.read(**batch).layers[0][real], reading.layers[-1][real])
    if head:
        logits = torch.nn.functional.linear(reading.head, *teacher.output_layer)
        torch.testing.assert_close(logits[real], want.logits[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_as_many_tokens_as_there_are_positions(name):
    teacher = load_teacher(tiny_teacher(name, head=False))
    assert teacher.max_positions == POSITIONS
    ids = torch.full((1, POSITIONS), teacher.tokenizer.convert_tokens_to_ids(teacher.tokenizer.tokenize("walk"))[0])
    assert teacher.read(ids, torch.ones_like(ids)).layers[0].shape == (1, POSITIONS, 16)


def test_a_whole_t5_is_read_as_its_encoder(tmp_path):
    teacher = load_teacher(tiny_teacher("t5"))
    config = T5Config(vocab_size=teacher.model.config.vocab_size, decoder_start_token_id=0, **KINDS["t5"].shape)
    whole = T5ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path)
    teacher.tokenizer.save_pretrained(tmp_path)
    read = load_teacher(tmp_path)
    assert type(read.model).__name__ == "T5EncoderModel" and read.headless == "its architecture has none"
    batch = batch_of(read)
    with torch.no_grad():
        want = whole.encoder(**batch).last_hidden_state
    assert torch.equal(read.read(**batch).layers[0], want)


def test_a_decoder_is_no_teacher(tmp_path):
    teacher = load_teacher(tiny_teacher("roberta"))
    GPT2LMHeadModel(GPT2Config(vocab_size=500, n_embd=8, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    teacher.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(VocabdistilError, match="teacher: .* has model_type 'gpt2'; expected an encoder: bert, "):
        load_teacher(tmp_path)


def with_config(tmp_path, **changes):
    folder = tmp_path / "model"
    shutil.copytree(tiny_teacher("bert"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_code_of_its_own_runs_only_if_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question at the terminal"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = with_code_of_its_own(tiny_teacher("bert"), tmp_path / "model")
    with pytest.raises(VocabdistilError, match="teacher: .* needs code of its own .*trust_remote_code=True") as e:
        load_teacher(folder)
    assert "\n" not in str(e.value)
    teacher = load_teacher(folder, trust_remote_code=True)
    assert type(teacher.whole).__name__ == "OwnForMaskedLM" and teacher.architecture is None
    known = load_teacher(tiny_teacher("bert"))
    batch = batch_of(known)
    assert torch.equal(teacher.read(**batch).layers[0], known.read(**batch).layers[0])


def test_a_tokenizer_with_code_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question at the terminal"))
    folder = with_config(tmp_path, model_type="own")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(VocabdistilError, match="student: .* needs code of its own to load a tokenizer"):
        load_tokenizer(folder, "--student")


def test_an_architecture_that_transformers_does_not_know(tmp_path):
    with pytest.raises(VocabdistilError, match="teacher: cannot load a .*nonsense") as e:
        load_teacher(with_config(tmp_path, model_type="nonsense"))
    assert "\n" not in str(e.value)


def test_ids_beyond_the_embeddings(tmp_path):
    teacher = load_teacher(tiny_teacher("xlm-roberta"))
    teacher.tokenizer.add_tokens(["one", "more"])
    teacher.model.save_pretrained(tmp_path)
    teacher.tokenizer.save_pretrained(tmp_path)
    rows = teacher.model.config.vocab_size
    with pytest.raises(VocabdistilError, match=f"teacher: .* has ids up to {rows + 1}, its model {rows} embeddings"):
        load_teacher(tmp_path)


def test_weights_that_are_not_there(tmp_path):
    teacher = load_teacher(tiny_teacher("bert", head=False))
    gone = f"encoder.layer.{LAYERS - 1}.output"
    state = {key: value for key, value in teacher.model.state_dict().items() if not key.startswith(gone)}
    teacher.model.save_pretrained(tmp_path, state_dict=state)
    teacher.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(VocabdistilError, match=f"teacher: .*has no {gone}"):
        load_teacher(tmp_path)
    assert AutoModel.from_pretrained(tmp_path) is not None  # with weights drawn at random
