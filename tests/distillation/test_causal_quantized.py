"""Teachers in 8 bits or 4, as transformers quantizes them."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import vocabdistil as vd
from tests.chats import chat_tokenizer, small_gpt2, small_llama
from tests.distillation.test_causal_job import options
from tests.distillation.test_causal_trainer import ROWS, direct, trainer_of
from tests.models.tiny_decoders import tiny_decoder
from vocabdistil.core.errors import VocabdistilError


def bitsandbytes(bits=8, **others):
    pytest.importorskip("bitsandbytes", minversion="0.48", reason="no bitsandbytes that works on a CPU")
    return BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, **{f"llm_int8_skip_{k}": v for k, v in others.items()})


def four_bits(**others):
    return bitsandbytes(4, **others)


def torchao(**others):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    from transformers import TorchAoConfig

    named = {f"{k}_to_not_convert": v for k, v in others.items()}
    return TorchAoConfig(quantization.Int8WeightOnlyConfig(), **named)


ways = pytest.mark.parametrize("way", [bitsandbytes, four_bits, torchao])


@pytest.fixture(scope="module")
def tokenizers():
    return chat_tokenizer("byte-level split"), chat_tokenizer("llama")


def learns(trainer):
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs[-1]["loss"] < logs[0]["loss"] and all(log["grad_norm"] > 0 for log in logs)


def quantized(tokenizer, config, folder):
    small_llama(len(tokenizer), hidden_size=64).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


@ways
def test_it_teaches_what_its_logits_say(way, tokenizers, tmp_path):
    teacher, student = quantized(tokenizers[0], way(), tmp_path / "teacher"), small_gpt2(len(tokenizers[1]))
    trainer = trainer_of((*tokenizers, teacher, student), tmp_path, weights="lm=1,likelihood=100,matched=1")
    batch, model = trainer.data_collator(ROWS), trainer.model.eval()
    found = trainer.compute_loss(model, batch, return_outputs=True)[1]["terms"]
    for name, value in direct(batch, model, teacher, trainer.objective.matched).items():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-3, atol=1e-5)
    learns(trainer)


@ways
def test_an_output_layer_that_is_quantized_is_refused(way, tokenizers, tmp_path):
    teacher = quantized(tokenizers[0], way(modules=["q_proj"]), tmp_path / "teacher")
    sides = (*tokenizers, teacher, small_gpt2(len(tokenizers[1])))
    with pytest.raises(VocabdistilError, match="^teacher: expected an output layer that is not quantized"):
        trainer_of(sides, tmp_path)


@pytest.mark.parametrize("way", [bitsandbytes, torchao])
def test_a_folder_of_one(way, tmp_path):
    plain = tiny_decoder("llama-3")
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=way())
    for part in (model, AutoTokenizer.from_pretrained(plain)):
        part.save_pretrained(tmp_path / "teacher")
    made, same = (
        vd.distill(**options(tmp_path / name, teacher=teacher)).metrics["bits_per_byte"]
        for name, teacher in (("out", tmp_path / "teacher"), ("plain", plain))
    )
    assert made == pytest.approx(same, rel=0.03) and made["teacher"] != same["teacher"]
    with pytest.raises(VocabdistilError, match="^student: expected weights in floating point, got quantized ones"):
        vd.distill(**options(tmp_path / "no", teacher=plain, student=tmp_path / "teacher"))


@pytest.mark.parametrize("way", [bitsandbytes, four_bits])
def test_adapters_on_a_quantized_student(way, tokenizers, tmp_path):
    peft = pytest.importorskip("peft")
    model = quantized(tokenizers[1], way(), tmp_path / "student")
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    sides = (*tokenizers, small_llama(len(tokenizers[0])), model)
    learns(trainer_of(sides, tmp_path, model=model, max_steps=6, learning_rate=1e-2))
