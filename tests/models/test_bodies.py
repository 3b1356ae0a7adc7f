"""Teachers of every architecture, and students of their own class with fewer layers and another vocabulary."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForMaskedLM, T5EncoderModel

from tests.models.tiny_teachers import KINDS, LAYERS, POSITIONS, WITH_HEAD, texts, tiny_teacher
from vocabdistil.core.errors import VocabdistilError
from vocabdistil.models.architectures import layer_kinds
from vocabdistil.models.bodies import build_body, check_body
from vocabdistil.models.shapes import attention_period, choose_layers, keep_layers, parse_keep_layers
from vocabdistil.models.teachers import Teacher, load_teacher

# So many of 22 layers cannot end with the 22nd if the first and then every n-th attend to all tokens.
LACKING = [17, 18, 20, 21]
BOTH = [(name, head) for name in KINDS for head in (True, False) if head is False or name in WITH_HEAD]


def batch_of(teacher: Teacher) -> dict[str, torch.Tensor]:
    batch = teacher.tokenizer(texts(), padding=True, truncation=True, max_length=POSITIONS, return_tensors="pt")
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def computed(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """All hidden states, and the logits if there are any, of the tokens that are not padding."""
    with torch.no_grad():
        out = model(**batch, output_hidden_states=True)
    made = [*out.hidden_states, out.logits if "logits" in out else out.last_hidden_state]
    return [x[batch["attention_mask"] == 1] for x in made]


def all_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


class Renamed:
    """The teacher's tokens under other ids: what a body asks of a tokenizer."""

    def __init__(self, teacher: Teacher, order: torch.Tensor) -> None:
        self.order, self.place = order, torch.argsort(order)
        for role in ("pad", "bos", "eos", "unk", "cls", "sep", "mask"):
            old = getattr(teacher.tokenizer, f"{role}_token_id")
            setattr(self, f"{role}_token_id", None if old is None else int(self.place[old]))

    def rows(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix[self.order]


def shuffled(teacher: Teacher, pad: int | None = None) -> Renamed:
    order = torch.randperm(teacher.model.config.vocab_size, generator=torch.Generator().manual_seed(3))
    if pad is not None:
        old = int((order == teacher.tokenizer.pad_token_id).nonzero())
        order[[old, pad]] = order[[pad, old]]
    return Renamed(teacher, order)


@pytest.mark.parametrize(("name", "head"), BOTH)
def test_all_layers_and_the_same_vocabulary_are_the_teacher(name, head, tmp_path):
    teacher = load_teacher(tiny_teacher(name, head))
    assert (teacher.masked_lm is not None) == head
    body = build_body(teacher, torch.clone, teacher.tokenizer, range(teacher.num_layers))
    batch = batch_of(teacher)
    want = computed(teacher.whole, batch)
    assert type(body) is type(teacher.whole) and all_equal(computed(body, batch), want)
    body.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(body).__name__]
    auto = AutoModelForMaskedLM if head else T5EncoderModel if name.startswith("t5") else AutoModel
    assert all_equal(computed(auto.from_pretrained(tmp_path).eval(), batch), want)
    if head:
        assert all_equal(computed(AutoModel.from_pretrained(tmp_path).eval(), batch)[:-1], want[:-1])
        tied = teacher.output_layer[0] is teacher.model.get_input_embeddings().weight
        assert (body.get_output_embeddings().weight is body.get_input_embeddings().weight) == tied


@pytest.mark.parametrize(("name", "head"), BOTH)
def test_other_ids_for_the_same_tokens_change_nothing(name, head, tmp_path):
    teacher = load_teacher(tiny_teacher(name, head))
    own = shuffled(teacher, pad=1 if name == "mpnet" else None)
    body = build_body(teacher, own.rows, own, range(teacher.num_layers))
    body.save_pretrained(tmp_path)
    batch = batch_of(teacher)
    renamed = {**batch, "input_ids": own.place[batch["input_ids"]]}
    again = load_teacher_like(teacher, tmp_path)
    for model in (body, again):
        ours, want = computed(model, renamed), computed(teacher.whole, batch)
        if head:
            ours[-1] = ours[-1][:, own.place]
        for mine, theirs in zip(ours, want, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    config = json.loads((tmp_path / "config.json").read_text())
    ids = {key: value for key, value in config.items() if key.endswith("_token_id") and value is not None}
    roles = {getattr(own, f"{role}_token_id") for role in ("pad", "bos", "eos", "unk", "cls", "sep", "mask")}
    assert ids and set(ids.values()) <= roles and ids["pad_token_id"] == own.pad_token_id


def load_teacher_like(teacher: Teacher, folder) -> torch.nn.Module:
    return type(teacher.whole).from_pretrained(folder).eval()


def layers_of(model: torch.nn.Module, teacher: Teacher) -> torch.nn.ModuleList:
    return model.base_model.get_submodule(teacher.architecture.layers)


@pytest.mark.parametrize("name", KINDS)
def test_the_layers_kept_are_the_teacher_s(name, tmp_path):
    teacher = load_teacher(tiny_teacher(name))
    keep = keep_layers(teacher.model.config, 3)
    body = build_body(teacher, torch.clone, teacher.tokenizer, keep)
    assert keep[-1] == teacher.num_layers - 1 and body.config.num_hidden_layers == 3
    ours, theirs = layers_of(body, teacher), layers_of(teacher.whole, teacher)
    if not teacher.architecture.shared:
        for layer, index in zip(ours, keep, strict=True):
            state = theirs[index].state_dict()
            assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())
    body.save_pretrained(tmp_path)
    batch = batch_of(teacher)
    assert all_equal(computed(load_teacher_like(teacher, tmp_path), batch), computed(body, batch))
    # The first layers are the teacher's own: what they compute is what it computes.
    assert torch.equal(computed(body, batch)[0], computed(teacher.whole, batch)[0])


def test_t5_without_its_first_layer_keeps_the_relative_bias():
    teacher = load_teacher(tiny_teacher("t5"))
    body = build_body(teacher, torch.clone, teacher.tokenizer, [1, 3])
    bias = [layer.layer[0].SelfAttention.relative_attention_bias for layer in (
        body.encoder.block[0], teacher.model.encoder.block[0]
    )]  # fmt: skip
    assert torch.equal(bias[0].weight, bias[1].weight)


def test_modernbert_without_its_first_layer_keeps_the_scale_of_the_norm():
    teacher = load_teacher(tiny_teacher("modernbert"))
    body = build_body(teacher, torch.clone, teacher.tokenizer, [3, 4])
    layer, want = body.model.layers[0], teacher.model.layers[3]
    x = torch.randn(2, 5, 16)
    x = torch.nn.functional.layer_norm(x, (16,))
    with torch.no_grad():
        ours, theirs = layer.attn.Wqkv(layer.attn_norm(x)), want.attn.Wqkv(want.attn_norm(x))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["modernbert", "mmbert"])
def test_what_a_layer_attends_to_stays(name, tmp_path):
    teacher = load_teacher(tiny_teacher(name))
    kinds = layer_kinds(teacher.model.config)
    assert kinds == ["full_attention" if i % 3 == 0 else "sliding_attention" for i in range(7)]
    for layers in (1, 3, 4, 7):
        keep = keep_layers(teacher.model.config, layers)
        body = build_body(teacher, torch.clone, teacher.tokenizer, keep)
        assert layer_kinds(body.config) == [kinds[i] for i in keep] and keep[-1] == 6
        body.save_pretrained(tmp_path / str(layers))
        config = json.loads((tmp_path / str(layers) / "config.json").read_text())
        # What transformers 4 goes by.
        period = config["global_attn_every_n_layers"]
        assert [bool(i % period) for i in range(layers)] == [kinds[i] == "sliding_attention" for i in keep]
        assert config["local_rope_theta"] == (160000.0 if name == "mmbert" else 10000.0)
        assert config["global_rope_theta"] == 160000.0
    check_body(teacher, [0, 1, 2, 4])
    for keep in ([0, 3, 4], [1, 3]):
        with pytest.raises(VocabdistilError, match=r"keep_layers: expected layers of which .* \(0, 3, 6 do\), got"):
            check_body(teacher, keep)


def test_positions_move_with_the_id_of_the_padding():
    teacher = load_teacher(tiny_teacher("xlm-roberta"))
    table = teacher.model.embeddings.position_embeddings.weight
    for pad in (0, 7):
        own = shuffled(teacher, pad)
        body = build_body(teacher, own.rows, own, range(LAYERS))
        ours = body.roberta.embeddings.position_embeddings
        assert ours.padding_idx == pad and body.config.max_position_embeddings == pad + 1 + POSITIONS
        assert torch.equal(ours.weight[pad + 1 :], table[2:])
        assert int(ours.weight[:pad].count_nonzero()) == 0


def test_untied_output_layers_stay_untied(tmp_path):
    teacher = load_teacher(tiny_teacher("bert"))
    config = teacher.whole.config
    config.tie_word_embeddings = False
    model = type(teacher.whole)(config).eval()
    model.cls.predictions.bias.data.normal_()
    other = Teacher("untied", model.base_model, teacher.tokenizer, model)
    own = shuffled(other)
    body = build_body(other, own.rows, own, range(LAYERS))
    output = body.get_output_embeddings()
    assert output.weight is not body.get_input_embeddings().weight
    assert torch.equal(output.weight, model.cls.predictions.decoder.weight[own.order])
    assert torch.equal(output.bias, model.cls.predictions.decoder.bias[own.order])


@pytest.mark.parametrize("name", ["bert", "xlm-roberta", "mpnet", "albert"])
def test_a_pooler_is_copied_where_there_is_one_and_never_made_up(name, tmp_path):
    teacher = load_teacher(tiny_teacher(name, head=False))
    body = build_body(teacher, torch.clone, teacher.tokenizer, range(LAYERS))
    theirs = teacher.model.pooler.state_dict()
    assert theirs and all(torch.equal(value, theirs[key]) for key, value in body.pooler.state_dict().items())
    state = {key: value for key, value in teacher.model.state_dict().items() if not key.startswith("pooler.")}
    teacher.model.save_pretrained(tmp_path / "teacher", state_dict=state)
    teacher.tokenizer.save_pretrained(tmp_path / "teacher")
    without = load_teacher(tmp_path / "teacher")
    assert without.model.pooler is None
    build_body(without, torch.clone, without.tokenizer, range(LAYERS)).save_pretrained(tmp_path / "body")
    assert not [key for key in load_file(tmp_path / "body" / "model.safetensors") if "pooler" in key]
    batch, again = batch_of(teacher), AutoModel.from_pretrained(tmp_path / "body").eval()
    assert all_equal(computed(again, batch), computed(teacher.model, batch))


def test_half_precision_teachers_make_float32_students(tmp_path):
    teacher = load_teacher(tiny_teacher("bert"))
    teacher.whole.to(torch.bfloat16).save_pretrained(tmp_path)
    teacher.tokenizer.save_pretrained(tmp_path)
    again = load_teacher(tmp_path)
    assert again.model.dtype == torch.float32
    body = build_body(again, torch.clone, again.tokenizer, range(LAYERS))
    body.save_pretrained(tmp_path / "body")
    config = json.loads((tmp_path / "body" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "float32"
    assert all_equal(computed(AutoModelForMaskedLM.from_pretrained(tmp_path / "body").eval(), batch_of(again)),
                     computed(again.whole, batch_of(again)))  # fmt: skip


def test_choice_of_layers():
    assert choose_layers(6, 3) == [0, 2, 5] and choose_layers(12, 6) == [0, 2, 4, 7, 9, 11]
    assert choose_layers(12, 1) == [11] and choose_layers(3, 3) == [0, 1, 2]
    kinds = ["full_attention" if i % 3 == 0 else "sliding_attention" for i in range(22)]
    for layers in range(1, 23):
        chosen = choose_layers(22, layers, kinds)
        assert len(set(chosen)) == layers and chosen == sorted(chosen) and (chosen[-1] == 21) == (layers not in LACKING)
        assert attention_period([kinds[i] for i in chosen])
    assert choose_layers(22, 11, kinds) == [0, 2, 3, 7, 9, 10, 12, 14, 18, 19, 21]
    for layers in (0, 7, -1):
        with pytest.raises(VocabdistilError, match=f"layers: expected a number from 1 to 6.*, got {layers}"):
            choose_layers(6, layers)
    assert parse_keep_layers("0, 2,5", 6) == [0, 2, 5]
    for text in ("", "0,2,2", "2,0", "0,6", "a", "0,,2", "-1,2", "0;2"):
        with pytest.raises(VocabdistilError, match="keep_layers: expected ascending layers from 0 to 5"):
            parse_keep_layers(text, 6)


def test_a_body_that_cannot_be_is_one_line():
    mpnet = load_teacher(tiny_teacher("mpnet"))
    with pytest.raises(VocabdistilError, match="vocabulary: expected padding at id 1, .*, got 5"):
        check_body(mpnet, [0], shuffled(mpnet, pad=5))
    roberta = load_teacher(tiny_teacher("roberta"))
    own = shuffled(roberta)
    own.pad_token_id = None
    with pytest.raises(VocabdistilError, match="vocabulary: expected a padding token.*got none"):
        check_body(roberta, [0], own)
    for keep in ([], [1, 1], [2, 1], [0, 4], [-1, 2]):
        with pytest.raises(VocabdistilError, match="keep_layers: expected ascending layers from 0 to 3, got"):
            check_body(roberta, keep)
    with pytest.raises(VocabdistilError, match="keep_layers: expected no layers besides it"):
        keep_layers(roberta.model.config, 2, "0,3")
    assert keep_layers(roberta.model.config) == [0, 1, 2, 3]
