"""What the output layer of a causal model reads."""

import pytest
import torch
from torch.nn.functional import linear
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.chats import small_gpt2, small_llama
from vocabdistil.core.errors import VocabdistilError
from vocabdistil.models.causal import check_causal, read_causal

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
WIDE = {"vocab_size": 40, **SHAPE}


def small_opt():
    """Its output layer reads a projection of the hidden states."""
    torch.manual_seed(2)
    shape = {"hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 1}
    return OPTForCausalLM(OPTConfig(vocab_size=40, num_attention_heads=2, **shape))


@pytest.mark.parametrize("make", [lambda: small_llama(40), lambda: small_gpt2(40), small_opt])
def test_the_logits_without_the_logits(make):
    model = make().eval()
    ids = torch.randint(40, (2, 7))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    made = []
    handle = model.get_output_embeddings().register_forward_hook(lambda layer, args, out: made.append(out.shape))
    check_causal(model, "model", 40)
    made.clear()
    found = read_causal(model, inputs)
    handle.remove()
    assert made == [(2, 1, 40)]
    torch.testing.assert_close(linear(found.hidden, found.weight, found.bias), model(**inputs).logits)


def test_the_mode_stays_and_no_hook_does():
    model = small_llama(40).train()
    check_causal(model, "model", 40, packed=True)
    assert model.training
    layer = model.get_output_embeddings()
    assert not layer._forward_hooks and not layer._forward_pre_hooks


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: BertForMaskedLM(BertConfig(**WIDE)), "whose hidden states depend on what comes after them"),
        (lambda: BertModel(BertConfig(**WIDE)), "which has no output layer"),
        (lambda: torch.nn.Linear(2, 2), "which has no output layer"),
        (
            lambda: T5ForConditionalGeneration(T5Config(vocab_size=40, d_model=32, d_ff=32, num_layers=1, num_heads=2)),
            "an encoder with a decoder",
        ),
        (
            lambda: Gemma2ForCausalLM(Gemma2Config(num_key_value_heads=2, head_dim=8, **WIDE)),
            "Gemma2ForCausalLM, which scales or caps them",
        ),
        (lambda: CohereForCausalLM(CohereConfig(pad_token_id=0, **WIDE)), "which scales or caps them"),
        (lambda: small_llama(39), "expected an output layer for the 40 tokens of its tokenizer, got one for 39"),
    ],
)
def test_other_models(make, said):
    with pytest.raises(VocabdistilError, match=said) as caught:
        check_causal(make(), "teacher", 40)
    assert str(caught.value).startswith("teacher: expected ")


def test_what_reads_on_cannot_be_packed():
    model = MambaForCausalLM(MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1))
    check_causal(model, "model", 40)
    with pytest.raises(VocabdistilError, match="^packed: expected a model that keeps texts of one row apart"):
        check_causal(model, "model", 40, packed=True)


def test_adapters_of_the_output_layer():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(small_llama(40), peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(VocabdistilError, match="an output layer without adapters"):
        check_causal(model, "model", 40)
