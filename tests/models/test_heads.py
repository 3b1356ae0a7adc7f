"""MLM heads: found where a checkpoint has one, read as the architecture computes it, left alone where it cannot be."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from vocabdistil.models.teachers import load_teacher

VOCAB = 600
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "pad_token_id": 0,
}  # fmt: skip
MODERN = {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3, **SHAPE}
DISTIL = {"vocab_size": VOCAB, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "pad_token_id": 0}
BUILD = {
    "bert": lambda: BertForMaskedLM(BertConfig(**SHAPE)),
    "distilbert": lambda: DistilBertForMaskedLM(DistilBertConfig(**DISTIL)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SHAPE)),
    "electra": lambda: ElectraForMaskedLM(ElectraConfig(embedding_size=8, **SHAPE)),
    "albert": lambda: AlbertForMaskedLM(AlbertConfig(embedding_size=8, **SHAPE)),
    "modernbert": lambda: ModernBertForMaskedLM(ModernBertConfig(**MODERN)),
    # Its output layer is the table of embeddings itself; what stands in that place is another map.
    "deberta": lambda: DebertaV2ForMaskedLM(DebertaV2Config(legacy=False, **SHAPE)),
}


def save(model: PreTrainedModel, teacher_folder, folder):
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(folder)
    return folder


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = BUILD[name]().eval()
    # Fresh biases are 0, and a head that forgot them would not be found out.
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        torch.nn.init.normal_(bias)
    return model


@pytest.mark.parametrize("name", [name for name in BUILD if name != "deberta"])
def test_what_the_output_layer_reads(name, teacher_folder, tmp_path):
    folder = save(build(name), teacher_folder, tmp_path / "model")
    teacher, model = load_teacher(folder), AutoModelForMaskedLM.from_pretrained(folder).eval()
    assert teacher.headless == "" and not any(p.requires_grad for p in teacher.whole.parameters())
    generator = torch.Generator().manual_seed(1)
    ids, mask = torch.randint(5, VOCAB, (3, 9), generator=generator), torch.ones(3, 9, dtype=torch.int64)
    mask[1, 6:] = 0
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    reading = teacher.read(ids, mask, all_layers=True, head=True)
    logits = torch.nn.functional.linear(reading.head, *teacher.output_layer)
    torch.testing.assert_close(logits[mask == 1], want.logits[mask == 1], atol=1e-5, rtol=1e-5)
    assert len(reading.layers) == len(want.hidden_states) == 3
    for ours, theirs in zip(reading.layers, want.hidden_states, strict=True):
        torch.testing.assert_close(ours[mask == 1], theirs[mask == 1])
    alone = teacher.read(ids, mask)
    assert alone.head is None
    torch.testing.assert_close(alone.layers[0][mask == 1], teacher.read(ids, mask, head=True).layers[0][mask == 1])


def test_the_hooks_are_gone_afterwards_and_the_whole_vocabulary_is_never_computed(teacher_folder):
    teacher = load_teacher(teacher_folder)
    sizes = []
    hook = teacher.masked_lm.get_output_embeddings().register_forward_hook(
        lambda module, args, out: sizes.append(out.numel())
    )
    ids = torch.arange(24).view(2, 12)
    teacher.read(ids, torch.ones_like(ids), head=True)
    hook.remove()
    assert sizes == [VOCAB]
    assert not teacher.model._forward_hooks
    assert not teacher.masked_lm.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("body", "the checkpoint has no cls.predictions"),
        ("classifier", "the checkpoint has no cls.predictions"),
        ("without-transform", "the checkpoint has no cls.predictions.transform.dense"),
        ("deberta", "its output layer has 16 rows"),
        ("no-architecture", "its architecture has none"),
    ],
)
def test_a_model_without_a_usable_head_is_a_body(kind, reason, teacher_folder, tmp_path, monkeypatch):
    state = None
    if kind == "body":
        model = BertModel(BertConfig(**SHAPE))
    elif kind == "classifier":
        model = BertForSequenceClassification(BertConfig(**SHAPE))
    elif kind == "without-transform":
        model = build("bert")
        state = {k: v for k, v in model.state_dict().items() if "transform.dense" not in k}
    else:
        model = build("deberta" if kind == "deberta" else "bert")
    folder = save(model, teacher_folder, tmp_path / kind)
    if state is not None:
        model.save_pretrained(folder, state_dict=state)
    if kind == "no-architecture":
        monkeypatch.setattr("transformers.AutoModelForMaskedLM._model_mapping", {})
    teacher = load_teacher(folder)
    assert teacher.masked_lm is None and reason in teacher.headless
    assert teacher.whole is teacher.model
    ids = torch.arange(5, 13)[None]
    assert teacher.read(ids, torch.ones_like(ids)).layers[0].shape == (1, 8, teacher.width)


def test_loading_says_nothing_of_missing_weights(teacher_folder, tmp_path, caplog):
    load_teacher(save(BertModel(BertConfig(**SHAPE)), teacher_folder, tmp_path / "body"))
    assert "newly initialized" not in caplog.text and "MISSING" not in caplog.text
