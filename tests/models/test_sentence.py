"""sentence-transformers folders: a teacher's settings read and written, with and without that package."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from tests._wordpiece import small_text, train
from vocabdistil.core.errors import VocabdistilError
from vocabdistil.models.sentence import (
    POOLINGS,
    SentenceSettings,
    pool,
    read_sentence_settings,
    write_sentence_settings,
)
from vocabdistil.models.start import plan_start

TEXTS = [*small_text(12), "walk", "Quiet rivers!"]
ROLES = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def save_model(folder: Path, width: int = 32, size: int = 400, max_length: int = 64) -> Path:
    """A tiny BERT and its tokenizer in plain transformers layout."""
    backend = train(small_text(), size)
    with torch.random.fork_rng():
        torch.manual_seed(width)
        config = BertConfig(
            vocab_size=len(backend.get_vocab()),
            hidden_size=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=2 * width,
            max_position_embeddings=64,
        )
        BertModel(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=max_length, **ROLES).save_pretrained(folder)
    return folder


def modules(*names: str, first: str = "", root: str = "sentence_transformers.models") -> list[dict[str, Any]]:
    paths = [first, *(f"{k}_{name}" for k, name in enumerate(names[1:], start=1))]
    return [
        {"idx": k, "name": str(k), "path": path, "type": f"{root}.{name}"}
        for k, (path, name) in enumerate(zip(paths, names, strict=True))
    ]


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """With a Dense module of its own, a prompt, CLS and mean pooling, as version 2 wrote such folders."""
    folder = save_model(tmp_path / "teacher")
    write(folder, "modules.json", modules("Transformer", "Pooling", "Dense", "Normalize"))
    flags = {key: mode in ("cls", "mean") for mode, key in POOLINGS.items()}
    write(folder, "1_Pooling/config.json", {"word_embedding_dimension": 32, **flags})
    dense = {"in_features": 64, "out_features": 20, "bias": True}
    write(folder, "2_Dense/config.json", dense | {"activation_function": "torch.nn.modules.activation.Tanh"})
    generator = torch.Generator().manual_seed(0)
    weights = {"linear.weight": torch.randn(20, 64, generator=generator), "linear.bias": torch.zeros(20)}
    torch.save(weights, folder / "2_Dense" / "pytorch_model.bin")
    (folder / "3_Normalize").mkdir()
    write(folder, "sentence_bert_config.json", {"max_seq_length": 24, "do_lower_case": False})
    prompts = {"prompts": {"query": "walk ", "passage": ""}, "default_prompt_name": "query"}
    write(folder, "config_sentence_transformers.json", prompts | {"similarity_fn_name": "dot"})
    return folder


def test_the_older_layout(teacher: Path) -> None:
    settings = read_sentence_settings(teacher)
    assert settings is not None
    assert (settings.pooling, settings.include_prompt, settings.width) == (("cls", "mean"), True, 32)
    assert [module.name for module in settings.modules] == ["Dense", "Normalize"]
    assert settings.modules[0].config["out_features"] == 20
    assert settings.modules[0].weights["linear.weight"].shape == (20, 64)
    assert settings.prompts == {"query": "walk ", "passage": ""} and settings.prompt == "walk "
    assert (settings.similarity, settings.max_seq_length, settings.do_lower_case) == ("dot", 24, False)
    assert settings.transformer_folder == str(teacher)


def test_the_newer_layout_with_the_transformer_in_its_own_folder(tmp_path: Path) -> None:
    entries = modules("Transformer", "Pooling", "Normalize", first="0_Transformer")
    entries[0]["type"] = "sentence_transformers.base.modules.transformer.Transformer"
    entries[1]["type"] = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
    write(tmp_path, "modules.json", entries)
    pooling = {"embedding_dimension": 8, "pooling_mode": "lasttoken", "include_prompt": False}
    write(tmp_path, "1_Pooling/config.json", pooling)
    write(tmp_path, "0_Transformer/sentence_roberta_config.json", {"max_seq_length": 10, "do_lower_case": True})
    settings = read_sentence_settings(tmp_path)
    assert settings is not None
    assert settings.transformer_folder == str(tmp_path / "0_Transformer")
    assert (settings.pooling, settings.include_prompt, settings.width) == (("lasttoken",), False, 8)
    assert (settings.max_seq_length, settings.do_lower_case, settings.similarity) == (10, True, None)
    assert settings.prompt == ""


def test_a_plain_folder_has_none_and_nothing_is_written(tmp_path: Path) -> None:
    assert read_sentence_settings(tmp_path) is None
    write_sentence_settings(None, tmp_path, torch.zeros(3, 2))
    assert list(tmp_path.iterdir()) == []
    write(tmp_path, "modules.json", modules("Transformer", "SpladePooling"))
    write(tmp_path, "config_sentence_transformers.json", {"model_type": "SparseEncoder"})
    assert read_sentence_settings(tmp_path) is None


def test_settings_that_cannot_be_followed(tmp_path: Path) -> None:
    write(tmp_path, "modules.json", modules("Transformer", "LSTM", "Pooling"))
    with pytest.raises(VocabdistilError, match="teacher: expected .* got Transformer, LSTM, Pooling"):
        read_sentence_settings(tmp_path)
    write(tmp_path, "modules.json", modules("Transformer", "Pooling"))
    with pytest.raises(VocabdistilError, match="teacher: expected the width"):
        read_sentence_settings(tmp_path)
    write(tmp_path, "1_Pooling/config.json", {"embedding_dimension": 8, "pooling_mode": "median"})
    with pytest.raises(VocabdistilError, match="teacher: expected a pooling of cls, .*median"):
        read_sentence_settings(tmp_path)
    (tmp_path / "modules.json").write_text("[{")
    with pytest.raises(VocabdistilError, match="teacher: cannot read .*modules.json"):
        read_sentence_settings(tmp_path)


def test_what_a_narrower_student_gets(teacher: Path, tmp_path: Path) -> None:
    settings = read_sentence_settings(teacher)
    student = save_model(tmp_path / "student", width=16, max_length=20)
    projection, bias = torch.randn(32, 16), torch.randn(32)
    write_sentence_settings(settings, student, projection, bias)
    assert [entry["path"] for entry in read(student, "modules.json")] == [
        "",
        "1_Pooling",
        "2_Dense",
        "3_Dense",
        "4_Normalize",
    ]
    assert read(student, "1_Pooling/config.json")["word_embedding_dimension"] == 16
    assert read(student, "sentence_bert_config.json") == {"do_lower_case": False, "max_seq_length": 20}
    config = read(student, "2_Dense/config.json")
    assert (config["in_features"], config["out_features"], config["bias"]) == (32, 64, True)
    dense = load_file(student / "2_Dense" / "model.safetensors")
    vectors = torch.randn(5, 16), torch.randn(5, 16)
    torch.testing.assert_close(
        torch.cat(vectors, 1) @ dense["linear.weight"].T + dense["linear.bias"],
        torch.cat([vector @ projection.T + bias for vector in vectors], 1),
    )
    own = load_file(student / "3_Dense" / "model.safetensors")
    assert torch.equal(own["linear.weight"], settings.modules[0].weights["linear.weight"])
    # What was written reads as the same settings, with the projection first.
    again = read_sentence_settings(student)
    assert [module.name for module in again.modules] == ["Dense", "Dense", "Normalize"]
    same = {"transformer_folder": "", "modules": (), "width": 0, "max_seq_length": 0}
    assert dataclasses.replace(again, **same) == dataclasses.replace(settings, **same)


def test_widths_that_do_not_fit(teacher: Path, tmp_path: Path) -> None:
    settings = read_sentence_settings(teacher)
    student = save_model(tmp_path / "student", width=16)
    with pytest.raises(ValueError, match=r"projection: expected \(32, 16\), got \(16, 32\)"):
        write_sentence_settings(settings, student, torch.zeros(16, 32))
    with pytest.raises(ValueError, match="projection: expected one from the student's 16 to the 32"):
        write_sentence_settings(settings, student)


def settings_of(*pooling: str, include_prompt: bool = True) -> SentenceSettings:
    return SentenceSettings("", pooling, include_prompt, 3, (), {}, None, None, None, False)


def test_pooling_by_hand() -> None:
    hidden = torch.tensor([[[1.0, -4], [2, -2], [9, 9]], [[7, 7], [3, -1], [5, -5]]])
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])  # padded on the right, and on the left
    expected = {
        "cls": [[1, -4], [3, -1]],
        "lasttoken": [[2, -2], [5, -5]],
        "max": [[2, -2], [5, -1]],
        "mean": [[1.5, -3], [4, -3]],
        "mean_sqrt_len_tokens": [[3 / 2**0.5, -6 / 2**0.5], [8 / 2**0.5, -6 / 2**0.5]],
        "weightedmean": [[5 / 3, -8 / 3], [13 / 3, -11 / 3]],
    }
    assert expected.keys() == POOLINGS.keys()
    for mode, rows in expected.items():
        torch.testing.assert_close(pool(hidden, mask, settings_of(mode)), torch.tensor(rows, dtype=torch.float32))
    both = pool(hidden, mask.bool(), settings_of("cls", "max"))
    torch.testing.assert_close(both, torch.tensor([[1.0, -4, 2, -2], [3, -1, 5, -1]]))
    assert torch.equal(pool(hidden, mask), pool(hidden, mask, settings_of("mean")))
    assert pool(hidden.half(), mask).dtype == torch.float32
    without = pool(hidden, mask, settings_of("mean", include_prompt=False), prompt_length=1)
    torch.testing.assert_close(without, torch.tensor([[2.0, -2], [5, -5]]))


def test_sentence_transformers_loads_a_narrower_student_in_the_teachers_space(teacher: Path, tmp_path: Path) -> None:
    package = pytest.importorskip("sentence_transformers")
    student = save_model(tmp_path / "student", width=16)
    projection = torch.randn(32, 16)
    write_sentence_settings(read_sentence_settings(teacher), student, projection)
    large, small = (package.SentenceTransformer(str(folder), device="cpu") for folder in (teacher, student))
    assert (small.prompts["query"], small.default_prompt_name, small.similarity_fn_name) == ("walk ", "query", "dot")
    assert small.max_seq_length == 24
    a, b = large.encode(TEXTS, convert_to_tensor=True), small.encode(TEXTS, convert_to_tensor=True)
    assert a.shape == b.shape == (len(TEXTS), 20)
    assert large.similarity(a, b).shape == (len(TEXTS), len(TEXTS))
    # By hand: prompt, pooling, projection, the teacher's own Dense, length 1.
    settings = read_sentence_settings(student)
    tokenizer, model = PreTrainedTokenizerFast.from_pretrained(student), BertModel.from_pretrained(student).eval()
    texts = ["walk " + text for text in TEXTS]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=24, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    pooled = pool(hidden, batch["attention_mask"], settings).view(len(TEXTS), 2, 16) @ projection.T
    first, own = (module.weights["linear.weight"] for module in settings.modules[:2])
    assert first.shape == (64, 32)
    expected = torch.nn.functional.normalize(torch.tanh(pooled.flatten(1) @ own.T), dim=1)
    torch.testing.assert_close(b, expected, rtol=1e-4, atol=1e-5)


def test_a_trimmed_teacher_gives_the_same_vectors(teacher: Path, tmp_path: Path) -> None:
    package = pytest.importorskip("sentence_transformers")
    tokenizer, model = PreTrainedTokenizerFast.from_pretrained(teacher), BertModel.from_pretrained(teacher)
    texts = small_text(5)
    used = {i for text in texts for i in tokenizer("walk " + text)["input_ids"]}
    kept = sorted(used | set(tokenizer.all_special_ids))
    assert len(kept) < len(tokenizer)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = tokenizer.convert_ids_to_tokens(kept)
    state["model"]["vocab"] = {token: i for i, token in enumerate(tokens)}
    folder = tmp_path / "trimmed"
    backend = type(tokenizer.backend_tokenizer).from_str(json.dumps(state))
    start = plan_start(tokenizer, backend, torch.tensor(kept))
    rows = start.rows(model.get_input_embeddings().weight)
    model.set_input_embeddings(torch.nn.Embedding.from_pretrained(rows))
    model.config.vocab_size = len(rows)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **ROLES).save_pretrained(folder)
    write_sentence_settings(read_sentence_settings(teacher), folder)
    before, after = (package.SentenceTransformer(str(path), device="cpu").encode(texts) for path in (teacher, folder))
    torch.testing.assert_close(torch.tensor(after), torch.tensor(before))


@pytest.mark.parametrize("mode", POOLINGS)
def test_what_the_installed_version_saves_is_read_and_written_alike(mode: str, tmp_path: Path) -> None:
    package = pytest.importorskip("sentence_transformers")
    source = save_model(tmp_path / "source")
    layers = package.models
    parts = [
        layers.Transformer(str(source), max_seq_length=30),
        layers.Pooling(32, pooling_mode=mode),
        layers.Dense(32, 12, activation_function=torch.nn.Identity()),
        layers.Normalize(),
    ]
    teacher = package.SentenceTransformer(modules=parts, device="cpu", prompts={"query": "stone: "})
    teacher.save(str(tmp_path / "teacher"))
    settings = read_sentence_settings(tmp_path / "teacher")
    assert settings is not None and settings.pooling == (mode,) and settings.prompts["query"] == "stone: "
    write_sentence_settings(settings, source)
    student = package.SentenceTransformer(str(source), device="cpu")
    torch.testing.assert_close(torch.tensor(student.encode(TEXTS)), torch.tensor(teacher.encode(TEXTS)))
    module = student[0]
    batch = module.tokenizer(TEXTS, padding=True, truncation=True, max_length=30, return_tensors="pt")
    with torch.no_grad():
        hidden = module.auto_model(**batch).last_hidden_state
        theirs = student[1]({"token_embeddings": hidden, "attention_mask": batch["attention_mask"]})
    torch.testing.assert_close(pool(hidden, batch["attention_mask"], settings), theirs["sentence_embedding"])
