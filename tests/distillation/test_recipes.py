"""Every recipe by name: what it computes, term by term, against the formulas written out."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

import vocabdistil as vd
from tests.runs import PRESET, options
from vocabdistil.alignment.masking import masking_probabilities
from vocabdistil.cli import build_parser
from vocabdistil.core.errors import VocabdistilError
from vocabdistil.distillation.batches import DistillCollator
from vocabdistil.distillation.calibration import calibrate
from vocabdistil.distillation.model import DistillModel
from vocabdistil.distillation.objective import Objective
from vocabdistil.distillation.recipes import RECIPES, LossWeights
from vocabdistil.models.bodies import build_body
from vocabdistil.models.start import plan_start
from vocabdistil.models.teachers import give_attention_maps, load_teacher
from vocabdistil.models.vocabularies import count_tokens, train_vocabulary
from vocabdistil.reference.layers import layer_map
from vocabdistil.reference.mlm import mlm_loss

SIZE = 6
EVERYTHING = LossWeights(**dict.fromkeys(asdict(LossWeights()), 1.0))


@pytest.fixture(scope="module")
def scene(teacher_folder, demo_lines):
    """A teacher with an MLM head, a student of its kind with other tokens, a batch of its own tokenization."""
    teacher = load_teacher(teacher_folder)
    tokenizer = train_vocabulary(teacher.tokenizer, demo_lines, 200).tokenizer
    start = plan_start(teacher.tokenizer, tokenizer)
    student = build_body(teacher, start.rows, tokenizer, [1])
    for body in (student.base_model, teacher.model):
        give_attention_maps(body)
    model = DistillModel(student, [teacher.width], [layer_map("last", 1, teacher.num_layers)]).eval()
    matched = [vd.MatchedVocab.from_tokenizers(teacher.tokenizer, tokenizer)]
    collator = DistillCollator([teacher.tokenizer], tokenizer, [], [], 32, 32)
    objective = Objective([teacher], EVERYTHING, [1.0], [[0.7]], 2.0, mode="match", matched=matched)
    counts = count_tokens(tokenizer, demo_lines)
    objective.mask_probabilities = masking_probabilities(counts, tokenizer.all_special_ids)
    objective.mask_id = tokenizer.mask_token_id
    return objective, model, collator(demo_lines[:SIZE])


def means(hidden, start, end):
    flat = hidden.flatten(0, 1)
    return torch.stack([flat[a:b].mean(0) for a, b in zip(start, end, strict=True)])


def test_probabilities_without_a_mask_are_refused(scene):
    objective, _, batch = scene
    with pytest.raises(VocabdistilError, match="mask_id: expected the student's MASK .* got None"):
        replace(objective, mask_id=None).mask(batch, 0)


def test_what_is_hidden_stays_hidden(scene):
    objective, _, batch = scene
    hidden = objective.mask(batch, 0)
    assert objective.mask(hidden, 1) is hidden and objective.mask(batch, 1)["labels"] is not hidden["labels"]


def test_weights_are_a_part_of_their_losses(scene):
    """Where a loss has formed its gradient in forward, backward meets an upstream gradient of 1 and forms none."""
    objective, model, batch = scene
    names = asdict(EVERYTHING)
    weighted = replace(objective, weights=LossWeights(**{name: 0.25 * (i + 1) for i, name in enumerate(names)}))
    loss, terms = weighted.loss(model, batch, 3)
    weights = {name: getattr(weighted.weights, name) for name in names if name in terms}
    weights |= {f"{name}_own": getattr(weighted.weights, name) for name in ("kl", "cosine", "mse")}
    weights["logits_kl"] = weighted.weights.logits
    torch.testing.assert_close(loss.detach(), sum(weights[name] * value for name, value in terms.items()))
    _, plain = objective.loss(model, batch, 3)
    torch.testing.assert_close(terms, plain)

    met, nodes, seen = {}, [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [parent for parent, _ in node.next_functions]
        if type(node).__name__ in ("_SpanLossBackward", "LinearLossBackward", "RowLossBackward"):
            node.register_prehook(lambda grads, node=node: met.__setitem__(node, grads[0]))
    loss.backward()
    model.zero_grad(set_to_none=True)
    assert {type(node).__name__ for node in met} == {"_SpanLossBackward", "LinearLossBackward", "RowLossBackward"}
    assert all(grad == 1 for grad in met.values())


def test_each_term_is_its_formula(scene):
    """Of one masked batch: span KL, MSE and cosine, KL over the matched vocabulary at hidden words, MLM, pooled,
    similarity and relations, and the attention loss of distilrubert-small."""
    objective, model, batch = scene
    with torch.no_grad():
        loss, terms = objective.loss(model, batch, 3)
    assert set(terms) == {
        "kl_own", "cosine_own", "mse_own", "pooled", "similarity", "relations", "attention", "logits_kl", "mlm",
    }  # fmt: skip
    torch.testing.assert_close(loss, sum(terms.values()))

    masked = objective.mask(batch, 3)
    teacher, student = objective.teachers[0], model.student
    read = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        theirs = teacher.masked_lm(
            input_ids=masked["teacher_ids"][0], attention_mask=masked["teacher_mask"][0], **read
        )
        ours = student(input_ids=masked["student_ids"], attention_mask=masked["student_mask"], **read)
    t, s, pairs = theirs.hidden_states[-1], ours.hidden_states[-1], batch["own_pairs"][0]
    a = means(s, pairs.student_start, pairs.student_end)
    b = means(t, pairs.teacher_start, pairs.teacher_end)

    heat = 2.0 * 0.7
    kl = F.kl_div((a / heat).log_softmax(-1), (b / heat).log_softmax(-1), log_target=True, reduction="batchmean")
    torch.testing.assert_close(terms["kl_own"], 4.0 * kl, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms["cosine_own"], (1 - F.cosine_similarity(a, b)).mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms["mse_own"], (a - b).square().sum(-1).mean() / 0.49, rtol=1e-4, atol=1e-5)

    mask_s, mask_t = batch["student_mask"][..., None], batch["teacher_mask"][0][..., None]
    p_s, p_t = ((x * m).sum(1) / m.sum(1) for x, m in ((s, mask_s), (t, mask_t)))
    torch.testing.assert_close(terms["pooled"], (1 - F.cosine_similarity(p_s, p_t)).mean(), rtol=1e-4, atol=1e-5)
    n_s, n_t = F.normalize(p_s, dim=-1), F.normalize(p_t, dim=-1)
    torch.testing.assert_close(
        terms["similarity"], (n_s @ n_s.T - n_t @ n_t.T).square().mean(), rtol=1e-4, atol=1e-6
    )
    attention = vd.reference.attention_loss(ours.attentions[0], theirs.attentions[-1], pairs)
    torch.testing.assert_close(terms["attention"], attention, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(
        terms["mlm"], mlm_loss(ours.logits, masked["labels"], lambda logits: logits), rtol=1e-4, atol=1e-5
    )

    hidden, matched = masked["hidden_pairs"][0], objective.matched[0]
    assert 0 < len(hidden) <= int((masked["labels"] != -100).sum())
    z_s = ours.logits.flatten(0, 1)[hidden.student_start.long()]
    z_t = theirs.logits.flatten(0, 1)[hidden.teacher_start.long()]
    total = vd.reference.matched_kl(z_s, z_t, matched, temperature=2.0, reduction="sum")
    count = int((masked["labels"] != -100).sum())
    torch.testing.assert_close(terms["logits_kl"], total / count, rtol=1e-4, atol=1e-5)

    block_s, block_t = student.base_model.encoder.layer[0], teacher.model.encoder.layer[-1]
    kinds = []
    for name in ("query", "key", "value"):
        x = getattr(block_s.attention.self, name)(ours.hidden_states[0]).detach()
        y = getattr(block_t.attention.self, name)(theirs.hidden_states[-2]).detach()
        kinds.append((x, y))
    heads = 48
    assert teacher.width == 48
    relations = vd.reference.relation_loss([k[0] for k in kinds], [k[1] for k in kinds], pairs, heads=heads)
    torch.testing.assert_close(terms["relations"], relations, rtol=1e-4, atol=1e-6)


def test_hidden_words_are_the_same_word_on_both_sides(scene):
    objective, _, batch = scene
    masked = objective.mask(batch, 11)
    pairs, matched = masked["hidden_pairs"][0], objective.matched[0]
    assert len(pairs)
    seen_t = masked["teacher_ids"][0].flatten()[pairs.teacher_start.long()]
    seen_s = masked["student_ids"].flatten()[pairs.student_start.long()]
    assert bool((seen_t == objective.teachers[0].tokenizer.mask_token_id).all())
    assert bool((seen_s == objective.mask_id).all())
    was_t = batch["teacher_ids"][0].flatten()[pairs.teacher_start.long()].tolist()
    was_s = batch["student_ids"].flatten()[pairs.student_start.long()].tolist()
    same = dict(zip(matched.teacher_ids.tolist(), matched.student_ids.tolist(), strict=True))
    assert [same[i] for i in was_t] == was_s


def test_similarities_of_several_teachers_are_averaged(scene):
    objective, model, batch = scene
    both = Objective([*objective.teachers] * 2, LossWeights(similarity=1.0), [0.25, 0.75], [[1.0]] * 2, 2.0)
    two = DistillModel(model.student, [model.student.config.hidden_size] * 2, model.assignments * 2).eval()
    twice = {key: value * 2 if isinstance(value, list) and value else value for key, value in batch.items()}
    twice["teacher_ids"] = [batch["teacher_ids"][0], batch["teacher_ids"][0].flip(0)]
    twice["teacher_mask"] = [batch["teacher_mask"][0], batch["teacher_mask"][0].flip(0)]
    with torch.no_grad():
        _, terms = both.loss(two, twice, 0)
        sides = zip(twice["teacher_ids"], twice["teacher_mask"], strict=True)
        read = [both.teachers[0].read(ids, mask).last for ids, mask in sides]
        ours = model(batch["student_ids"], batch["student_mask"])[0].last

    def cosines(hidden, mask):
        v = F.normalize((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)
        return v @ v.T

    wanted = 0.25 * cosines(read[0], twice["teacher_mask"][0]) + 0.75 * cosines(read[1], twice["teacher_mask"][1])
    difference = cosines(ours, batch["student_mask"]) - wanted
    torch.testing.assert_close(terms["similarity"], difference.square().mean(), rtol=1e-4, atol=1e-6)


def log_of(result):
    return json.loads((result.path / "training_log.jsonl").read_text().splitlines()[0])


@pytest.mark.parametrize(
    ("recipe", "terms"),
    [
        ("embedding", {"kl_own"}),
        ("masked", {"kl_own", "logits_kl", "mlm"}),
        ("paper", {"kl_own", "kl_reduce", "logits_kl", "mlm"}),
        ("tiny-5k", {"kl_own", "kl_reduce", "mlm"}),
        ("distilbert", {"cosine_own", "logits_kl", "mlm"}),
        ("base", {"cosine_own", "logits_kl", "mlm"}),
        ("small", {"cosine_own", "attention", "logits_kl", "mlm"}),
    ],
)
def test_a_recipe_learns_its_terms(recipe, terms, teacher_folder, text_file, tmp_path):
    """The terms of a run are those of the recipe's weights, and the student is one of transformers."""
    weights = {name: value for name, value in asdict(RECIPES[recipe].weights).items() if value}
    changes = {"recipe": recipe, "steps": 4, "log_every": 2, "save_every": 2}
    result = vd.distill(**options(teacher_folder, text_file, tmp_path / "student", **changes))
    log = log_of(result)
    found = {name for name in log if name.split("_")[0] in {*weights, "logits"} and name != "loss"}
    assert found == terms
    assert result.metrics["recipe"] == recipe
    body = AutoModel.from_pretrained(result.path)
    batch = AutoTokenizer.from_pretrained(result.path)(["The sailor mends the net."], return_tensors="pt")
    assert bool(body(**batch).last_hidden_state.isfinite().all())
    if RECIPES[recipe].weights.needs_head:
        model = AutoModelForMaskedLM.from_pretrained(result.path)
        assert model.get_output_embeddings().weight.shape[0] == PRESET.vocab_size


@pytest.mark.parametrize(
    ("recipe", "weights", "layers", "reads_the_teachers_ids"),
    [
        ("embedding", {"kl": 1}, "last", False),
        ("masked", {"kl": 2, "logits": 0.5, "mlm": 0.5}, "last", False),
        ("paper", {"kl": 2, "logits": 0.5, "mlm": 0.5}, "last", True),
        ("tiny-5k", {"kl": 2, "mlm": 0.5}, "last", True),
        ("distilbert", {"logits": 5, "mlm": 2, "cosine": 1}, "last", False),
        ("base", {"logits": 2, "mlm": 0.5, "cosine": 1}, "average", False),
        ("small", {"logits": 2, "mlm": 0.5, "cosine": 1, "attention": 1}, "average", False),
    ],
)
def test_a_recipe_weighs_its_formulas(recipe, weights, layers, reads_the_teachers_ids):
    """The weights of the sums that papers and model cards print; each term is held to its formula above."""
    found = RECIPES[recipe]
    assert {name: value for name, value in asdict(found.weights).items() if value} == weights
    assert (found.layer_map, found.reduce) == (layers, reads_the_teachers_ids)


@pytest.mark.parametrize("recipe", ["tiny-5k", "base", "small"])
def test_a_recipe_brings_its_body(recipe):
    config = vd.DistillConfig(teacher="t", text=["x.txt"], out="o", recipe=recipe).resolved(head=True)
    assert config.preset == recipe and config.shape.layers == {"tiny-5k": 3, "base": 6, "small": 2}[recipe]
    assert config.vocabulary == "train"
    own = vd.DistillConfig(teacher="t", text=["x.txt"], out="o", recipe=recipe, layers=2).resolved(head=True)
    assert own.preset is None


def test_what_the_user_says_wins_over_the_recipe():
    config = vd.DistillConfig(
        teacher="t", text=["x.txt"], out="o", recipe="paper", weights="mse=0.1,mlm=0", batch_size=5, warmup=0.5
    ).resolved(head=True)
    assert config.weights == LossWeights(kl=2.0, logits=0.5, mlm=0.0, mse=0.1)
    assert (config.batch_size, config.warmup, config.schedule) == (5, 0.5, RECIPES["paper"].schedule)


@pytest.mark.parametrize(("head", "name"), [(True, "masked"), (False, "embedding")])
def test_the_teacher_decides(head, name):
    config = vd.DistillConfig(teacher="t", text=["x.txt"], out="o").resolved(head=head)
    assert config.recipe == name and config.weights == RECIPES[name].weights


def test_the_command_line_names_them_all():
    commands = build_parser()._subparsers._group_actions[0].choices
    told = next(action.help for action in commands["distill"]._actions if "--recipe" in action.option_strings)
    assert [name for name in RECIPES if name not in told] == []


def test_each_layer_learns_from_its_own(teacher_folder, text_file, tmp_path):
    """``kept``: as many terms as layers, each against the layer that it was copied from, so that a student which is its
    teacher has nothing to learn."""
    body = {"preset": None, "keep_layers": "0,1", "vocabulary": teacher_folder, "recipe": "embedding"}
    changes = {**body, "layer_map": "kept", "weights": "kl=1,pooled=0,similarity=0", "steps": 2, "lr": 1e-6}
    result = vd.distill(**options(teacher_folder, text_file, tmp_path / "student", **changes, log_every=1))
    assert len(result.metrics["teacher_scales"][0]) == 2
    assert result.metrics["before"]["kl_own"] < 1e-9
    with pytest.raises(VocabdistilError, match="layer_map: kept needs a student with layers of its teacher"):
        vd.distill(**options(teacher_folder, text_file, tmp_path / "other", layer_map="kept"))


def test_attention_maps_that_nobody_gives_are_one_line(scene):
    objective, model, batch = scene
    model.student.base_model.set_attn_implementation("sdpa")
    try:
        with pytest.raises(VocabdistilError, match="weights: attention needs models that give their maps"):
            objective.loss(model, batch, 0)
    finally:
        give_attention_maps(model.student.base_model)


def test_calibration_measures_own_pairs(scene):
    objective, model, batch = scene
    scales = calibrate(model, objective, batch)
    hidden = objective.teachers[0].read(batch["teacher_ids"][0], batch["teacher_mask"][0]).last
    pairs = batch["own_pairs"][0]
    rows = means(hidden, pairs.teacher_start, pairs.teacher_end).double()
    assert scales[0][0] == pytest.approx(float(rows.var(1, correction=0).mean().sqrt()), rel=1e-5)
