"""A small BERT teacher trained on a text, for when there is no teacher to start from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from ..alignment.collator import pad
from ..alignment.families import encode
from ..alignment.masking import mask_tokens, masking_probabilities
from ..core.console import Reporter
from ..core.seeds import mix_seed
from ..models.architectures import move
from ..models.vocabularies import count_tokens, save_tokenizer, train_wordpiece
from ..reference.mlm import mlm_loss
from .options import TeacherConfig, configured
from .order import TrainingOrder
from .run_folder import Diverged, RunFolder, last_checkpoint
from .runs import SeededTrainer, fit, training_arguments
from .text import TextFiles, sample_text
from .text_store import split_text, stored

__all__ = ["train_teacher"]

# Held-out texts at most: enough for three digits of a loss.
_HELD_OUT = 4096
_SPECIALS = {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}


def bert_tokenizer(texts: Iterable[str], vocab_size: int, cased: bool, max_length: int) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer trained on ``texts`` that treats text as BERT's does."""
    base = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    base.normalizer = normalizers.BertNormalizer(lowercase=not cased)
    base.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    base.decoder = decoders.WordPiece()
    vocab = train_wordpiece(texts, vocab_size, base, list(_SPECIALS.values()), "[UNK]")
    base.model = models.WordPiece(vocab, unk_token="[UNK]")
    base.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocab[token]) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(tokenizer_object=base, model_max_length=max_length, **_SPECIALS)


class _MlmCollator:
    def __init__(self, tokenizer: PreTrainedTokenizerFast, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length

    def __call__(self, features: Sequence[dict[str, str]]) -> dict[str, torch.Tensor]:
        rows = encode(self.tokenizer, [f["text"] for f in features], "teacher", self.max_length)
        ids, mask = pad(rows, self.tokenizer.pad_token_id)
        return {"input_ids": ids, "attention_mask": mask}


class _MlmTrainer(SeededTrainer):
    def __init__(self, *args: Any, probabilities: torch.Tensor, mask_id: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.probabilities, self.mask_id = probabilities, mask_id

    def part_of_step(
        self, model: nn.Module, inputs: dict[str, Any], totals: dict[str, Any] | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = _mlm(model, inputs, self.probabilities, self.mask_id, self.step_seed)
        return loss, {"mlm": loss}


def _mlm(
    model: Any, batch: dict[str, torch.Tensor], probabilities: torch.Tensor, mask_id: int, seed: int
) -> torch.Tensor:
    generator = torch.Generator(batch["input_ids"].device).manual_seed(seed)
    masked = mask_tokens(
        batch["input_ids"], probabilities, mask_id, attention_mask=batch["attention_mask"], generator=generator
    )
    hidden = model.bert(input_ids=masked.input_ids, attention_mask=batch["attention_mask"]).last_hidden_state
    return mlm_loss(hidden, masked.labels, model.cls)


def train_teacher(config: TeacherConfig | None = None, **options: Any) -> Path:
    """Trains a WordPiece vocabulary and a BERT with masked language modelling, and writes them to a folder.

    Args:
        config: everything; or give the fields of :class:`TeacherConfig` by name.

    Returns:
        The folder; ``metrics.json`` in it holds the held-out MLM loss (nats per masked token) before and after.

    Raises:
        VocabdistilError: bad input; nothing is left half-written.
        Interrupted: SIGINT, SIGTERM or SIGHUP; a checkpoint has been saved.
    """
    config = configured(TeacherConfig, config, options)
    text = config.look()
    folder = RunFolder.open(config.out, config.identity(), config.resume, config.overwrite)
    with folder.held():
        return _run(config, text, folder)


def _run(config: TeacherConfig, text: TextFiles, folder: RunFolder) -> Path:
    say = Reporter(config.quiet)
    say.status("Reading the text")
    split = split_text(stored(text, folder, quiet=config.quiet), config.held_out, config.seed, most=_HELD_OUT)
    counted = sample_text(split.train, config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    say.status("Training the teacher's vocabulary")
    tokenizer = bert_tokenizer(counted, config.vocab_size, config.cased, config.max_length)
    torch.manual_seed(config.seed)
    made = BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.dim,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=4 * config.dim,
            max_position_embeddings=config.max_length,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model = move(made, device)
    probabilities = masking_probabilities(count_tokens(tokenizer, counted), tokenizer.all_special_ids).to(device)
    collator = _MlmCollator(tokenizer, config.max_length)

    @torch.no_grad()
    def held_out_loss() -> float:
        model.eval()
        losses = []
        for start in range(0, len(split.held_out), config.batch_size):
            batch = collator([{"text": text} for text in split.held_out[start : start + config.batch_size]])
            batch = {key: value.to(device) for key, value in batch.items()}
            losses.append(_mlm(model, batch, probabilities, tokenizer.mask_token_id, mix_seed(config.seed, start)))
        return float(torch.stack(losses).mean())

    if "before" not in folder.record:
        folder.store(before=held_out_loss())
    trainer = _MlmTrainer(
        model=model,
        args=training_arguments(
            folder.path,
            steps=config.steps,
            batch_size=config.batch_size,
            lr=config.lr,
            seed=config.seed,
            save_every=config.save_every,
            log_every=config.log_every,
            device=device,
        ),
        train_dataset=TrainingOrder(split.train, config.batch_size, config.steps, config.seed),
        data_collator=collator,
        probabilities=probabilities,
        mask_id=tokenizer.mask_token_id,
    )
    seconds = fit(trainer, say, last_checkpoint(folder.path) if config.resume else None, "Training")
    after = held_out_loss()
    if not math.isfinite(after):
        raise Diverged.of("lr", "the training diverged, the held-out loss is not finite; try a smaller one")
    final = folder.begin_result()
    move(model, "cpu").save_pretrained(final)
    save_tokenizer(tokenizer, final)
    before = folder.record["before"]
    figures = {"held_out_mlm": {"before": before, "after": after}, "train_seconds": round(seconds, 1)}
    out = folder.publish(final, figures)
    say.print(f"Held-out MLM loss {before:.3f} -> {after:.3f}. The teacher is {folder.place}")
    return out
