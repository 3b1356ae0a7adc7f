"""Tiny random teachers of every architecture, each with a tokenizer of the kind that it comes with."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests._families import BYTES, byte_level, many_scripts, plain_text
from tests._wordpiece import train

LAYERS = 4
SHAPE = {"hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 32}
POSITIONS = 64

BERT_ROLES = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
ROBERTA_ROLES = {"pad": "<pad>", "unk": "<unk>", "bos": "<s>", "eos": "</s>", "cls": "<s>", "sep": "</s>",
                 "mask": "<mask>"}  # fmt: skip


def _wrapped(tokenizer: Tokenizer, roles: dict[str, str], **options: Any) -> PreTrainedTokenizerFast:
    names = {f"{role}_token": token for role, token in roles.items()}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=POSITIONS, **names, **options)


def _template(tokenizer: Tokenizer, first: str | None, last: str) -> None:
    """``first``, a text and ``last``, and for pairs the second text and ``last`` again."""
    ids = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys((first, last)) if token]
    lead = f"{first} " if first else ""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{lead}$A {last}", pair=f"{lead}$A {last} $B {last}", special_tokens=ids
    )


def bert_wordpiece() -> PreTrainedTokenizerFast:
    return _wrapped(train(plain_text(), 300), BERT_ROLES)


def mpnet_wordpiece() -> PreTrainedTokenizerFast:
    """BERT's uncased vocabulary behind RoBERTa's special tokens, with ``[UNK]`` among the words."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "[UNK]"]
    tokenizer.train_from_iterator(
        plain_text(), trainers.WordPieceTrainer(vocab_size=300, special_tokens=specials, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    _template(tokenizer, "<s>", "</s>")
    return _wrapped(tokenizer, {**ROBERTA_ROLES, "unk": "[UNK]"})


def roberta_bytes() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(many_scripts(), trainer)
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return _wrapped(tokenizer, ROBERTA_ROLES)


def modernbert_bytes() -> PreTrainedTokenizerFast:
    """Special tokens at the end of the vocabulary, and BERT's names for them."""
    tokenizer = byte_level(400)
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.add_special_tokens([AddedToken(t, special=True, lstrip=t == "[MASK]") for t in BERT_ROLES.values()])
    _template(tokenizer, "[CLS]", "[SEP]")
    return _wrapped(tokenizer, BERT_ROLES, model_input_names=["input_ids", "attention_mask"])


def _unigram(specials: list[str], unk: str, size: int = 300) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=specials, unk_token=unk, show_progress=False)
    tokenizer.train_from_iterator(many_scripts(), trainer)
    return tokenizer


def xlmr_unigram() -> PreTrainedTokenizerFast:
    tokenizer = _unigram(["<s>", "<pad>", "</s>", "<unk>"], "<unk>")
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    _template(tokenizer, "<s>", "</s>")
    return _wrapped(tokenizer, ROBERTA_ROLES)


def camembert_unigram() -> PreTrainedTokenizerFast:
    """With tokens that Fairseq left behind before the padding and after it."""
    tokenizer = _unigram(["<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED", "<s>", "</s>"], "<unk>")
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    _template(tokenizer, "<s>", "</s>")
    return _wrapped(tokenizer, ROBERTA_ROLES)


def albert_unigram() -> PreTrainedTokenizerFast:
    tokenizer = _unigram(["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"], "<unk>")
    steps = [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    tokenizer.normalizer = normalizers.Sequence(steps)
    _template(tokenizer, "[CLS]", "[SEP]")
    return _wrapped(tokenizer, {**BERT_ROLES, "pad": "<pad>", "unk": "<unk>"})


def deberta_unigram() -> PreTrainedTokenizerFast:
    tokenizer = _unigram(["[PAD]", "[CLS]", "[SEP]", "[UNK]"], "[UNK]")
    tokenizer.add_special_tokens(["[MASK]"])
    _template(tokenizer, "[CLS]", "[SEP]")
    return _wrapped(tokenizer, BERT_ROLES)


def t5_unigram() -> PreTrainedTokenizerFast:
    """Only a last token; sentinels at the end of the vocabulary."""
    tokenizer = _unigram(["<pad>", "</s>", "<unk>"], "<unk>")
    tokenizer.add_special_tokens([AddedToken(f"<extra_id_{n}>", special=True) for n in range(4)])
    _template(tokenizer, None, "</s>")
    return _wrapped(tokenizer, {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"})


def gemma_bpe() -> PreTrainedTokenizerFast:
    """SentencePiece BPE with byte fallback: spaces replaced by the normalizer, words cut after them."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=specials, limit_alphabet=60, show_progress=False)
    tokenizer.train_from_iterator(many_scripts(), trainer)
    state = json.loads(tokenizer.to_str())
    vocab = state["model"]["vocab"]
    vocab.update({token: len(vocab) + n for n, token in enumerate(BYTES)})
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    _template(tokenizer, "<bos>", "<eos>")
    roles = {"pad": "<pad>", "eos": "<eos>", "bos": "<bos>", "unk": "<unk>", "mask": "<mask>"}
    return _wrapped(tokenizer, {**roles, "cls": "<bos>", "sep": "<eos>"})


def _ids(tokenizer: PreTrainedTokenizerFast, *roles: str) -> dict[str, int]:
    return {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in roles}


class Kind(NamedTuple):
    """An architecture: its tokenizer, its names in transformers, and its configuration besides the usual."""

    tokenizer: Callable[[], PreTrainedTokenizerFast]
    name: str
    options: Callable[[PreTrainedTokenizerFast], dict[str, Any]] = lambda tokenizer: {}
    shape: dict[str, Any] = SHAPE
    head: str = "ForMaskedLM"
    body: str = "Model"

    def config(self, tokenizer: PreTrainedTokenizerFast) -> Any:
        options = {"vocab_size": len(tokenizer), **self.shape, **self.options(tokenizer)}
        return getattr(transformers, f"{self.name}Config")(**options)


def _bert(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {"max_position_embeddings": POSITIONS, **_ids(tokenizer, "pad")}


def _roberta(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    positions = POSITIONS + tokenizer.pad_token_id + 1
    return {"max_position_embeddings": positions, "type_vocab_size": 1, **_ids(tokenizer, "pad", "bos", "eos")}


def _mpnet(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {"max_position_embeddings": POSITIONS + 2, **_ids(tokenizer, "pad", "bos", "eos")}


def _deberta(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True, "norm_rel_ebd": "layer_norm", "position_buckets": 8, "type_vocab_size": 0,
        "max_position_embeddings": POSITIONS, "max_relative_positions": -1, **_ids(tokenizer, "pad"),
    }  # fmt: skip


def _modernbert(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    ends = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    return {
        "global_attn_every_n_layers": 3, "local_attention": 8, "max_position_embeddings": POSITIONS,
        **ends, **_ids(tokenizer, "pad", "cls", "sep"),
    }  # fmt: skip


KINDS = {
    "bert": Kind(bert_wordpiece, "Bert", _bert),
    "distilbert": Kind(
        bert_wordpiece,
        "DistilBert",
        _bert,
        {"dim": 16, "n_layers": LAYERS, "n_heads": 2, "hidden_dim": 32},
    ),
    "roberta": Kind(roberta_bytes, "Roberta", _roberta),
    "xlm-roberta": Kind(xlmr_unigram, "XLMRoberta", _roberta),
    "camembert": Kind(camembert_unigram, "Camembert", _roberta),
    "electra": Kind(bert_wordpiece, "Electra", lambda t: {"embedding_size": 8, **_bert(t)}),
    "mpnet": Kind(mpnet_wordpiece, "MPNet", _mpnet),
    "albert": Kind(
        albert_unigram,
        "Albert",
        lambda t: {"embedding_size": 8, **_bert(t), "bos_token_id": 2, "eos_token_id": 3},
    ),
    "deberta-v2": Kind(
        deberta_unigram, "DebertaV2", lambda t: {"conv_kernel_size": 3, "conv_act": "gelu", **_deberta(t)}
    ),
    "deberta-v3": Kind(deberta_unigram, "DebertaV2", _deberta),
    "modernbert": Kind(modernbert_bytes, "ModernBert", _modernbert, {**SHAPE, "num_hidden_layers": 7}),
    "mmbert": Kind(
        gemma_bpe,
        "ModernBert",
        lambda t: {**_modernbert(t), "local_rope_theta": 160000.0},
        {**SHAPE, "num_hidden_layers": 7},
    ),
    "t5": Kind(
        t5_unigram,
        "T5",
        lambda t: {**_ids(t, "pad", "eos"), "decoder_start_token_id": 0},
        {"d_model": 16, "num_layers": LAYERS, "num_heads": 2, "d_kv": 8, "d_ff": 32},
        head="",
        body="EncoderModel",
    ),
    "t5-v1.1": Kind(
        t5_unigram,
        "T5",
        lambda t: {**_ids(t, "pad", "eos"), "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu",
                   "tie_word_embeddings": False},
        {"d_model": 16, "num_layers": LAYERS, "num_heads": 4, "d_kv": 8, "d_ff": 32},
        head="",
        body="EncoderModel",
    ),
}  # fmt: skip
WITH_HEAD = [name for name, kind in KINDS.items() if kind.head]


@functools.cache
def _root() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="tiny-teachers-")


@functools.cache
def _tokenizer(make: Callable[[], PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return make()


@functools.cache
def tiny_teacher(name: str, head: bool = True) -> Path:
    """The folder of a teacher, made once per process: with its MLM head, or the body alone.

    No weight or bias is a constant: what is forgotten in a copy shows.
    """
    kind = KINDS[name]
    tokenizer = _tokenizer(kind.tokenizer)
    path = Path(_root().name) / f"{name}{'' if head else '-body'}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(name) + 2 * head)
        suffix = kind.head if head and kind.head else kind.body
        model = getattr(transformers, kind.name + suffix)(kind.config(tokenizer))
        for parameter in model.parameters():
            centre = 1.0 if parameter.dim() == 1 and bool((parameter == 1).all()) else 0.0
            torch.nn.init.normal_(parameter, centre, 0.25)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def texts() -> list[str]:
    """A few texts of several lengths, in many scripts."""
    return many_scripts()[-12:] + plain_text()[:12]


OWN_CODE = """
from transformers import BertConfig, BertForMaskedLM, BertModel
class OwnConfig(BertConfig):
    model_type = "own"
class OwnModel(BertModel):
    config_class = OwnConfig
class OwnForMaskedLM(BertForMaskedLM):
    config_class = OwnConfig
"""


def with_code_of_its_own(bert: Path, folder: Path) -> Path:
    """A copy of a BERT that only code in its folder can load."""
    shutil.copytree(bert, folder)
    (folder / "own.py").write_text(OWN_CODE)
    names = {"AutoConfig": "OwnConfig", "AutoModel": "OwnModel", "AutoModelForMaskedLM": "OwnForMaskedLM"}
    changes = {"model_type": "own", "auto_map": {key: f"own.{name}" for key, name in names.items()}}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder
