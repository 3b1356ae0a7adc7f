"""What a causal teacher with another tokenizer is worth: students of equal steps, by bits per byte of held-out text.

``python -m benchmarks.decoders --work FOLDER`` trains a teacher (a Llama with byte-level BPE) from scratch on the lines
of ``modern_en.txt`` in ``VOCABDISTIL_DATA``, and then students (a narrower Llama with Unigram) on the same lines:
on text alone, and with each loss of a teacher beside it. Each student appends a row to ``results.csv`` beside this
file, unless it is there. A teacher is trained once, into the folder, and goes on where it was stopped. ``--scale``
takes larger models, ``--teacher`` one with another family of tokenizer, ``--weights`` other weights of the losses.
``--report`` prints the file as a table.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
    logging,
)

import vocabdistil as vd
from benchmarks.report import environment
from benchmarks.students.rows import append, read
from vocabdistil.distillation.text import read_text
from vocabdistil.distillation.text_store import split_text

RESULTS = Path(__file__).parent / "results.csv"
COLUMNS = (
    "scale", "teacher", "weights", "seed", "steps", "batch_size", "bits_per_byte", "teacher_bits", "parameters",
    "teacher_parameters", "tokens", "teacher_tokens", "seconds", "device", "name", "python", "torch", "commit", "date",
)  # fmt: skip
# The text alone, and what is learned beside it.
WEIGHTS = (
    "lm=1", "lm=1,likelihood=100", "lm=1,matched=1", "lm=1,remapped=1", "lm=1,gold=1", "lm=1,likelihood=100,matched=1",
)  # fmt: skip
HELD_OUT = 512
_LENGTH = 128


@dataclass(frozen=True)
class Scale:
    """Shapes of a teacher and of its students (hidden size, intermediate size, layers, heads), and how both learn."""

    teacher: tuple[int, int, int, int]
    student: tuple[int, int, int, int]
    rate: float
    batch_size: int
    teacher_steps: int
    bf16: bool


SCALES = {
    "1m": Scale((192, 512, 4, 6), (128, 352, 2, 4), 2e-3, 32, 600, bf16=False),
    "10m": Scale((448, 1216, 7, 7), (384, 1024, 5, 6), 1.5e-3, 16, 2400, bf16=True),
}
STUDENT_TOKENS = 4000


def byte_level(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """In the manner of Llama 3."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|begin|>", "<|end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    return _finished(made, texts, trainer, "<|begin|>", "<|end|>")


def byte_fallback(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """BPE over words that keep their space in front, other characters as bytes, in the manner of Llama 2."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>", "<unk>", *byte_tokens], show_progress=False
    )
    return _finished(made, texts, trainer, "<s>", "</s>", unk_token="<unk>")


# And their numbers of tokens.
TEACHERS = {"byte-level-bpe": (byte_level, 8000), "byte-fallback-bpe": (byte_fallback, 6000)}


def unigram(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """In the manner of T5."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    return _finished(made, texts, trainer, "<s>", "</s>", unk_token="<unk>")


def _finished(made: Tokenizer, texts: list[str], trainer: Any, bos: str, eos: str, **roles: str) -> Any:
    made.train_from_iterator(texts, trainer)
    made.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=bos, eos_token=eos, **roles)


def fresh(tokens: int, shape: tuple[int, int, int, int], seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    hidden, intermediate, layers, heads = shape
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokens, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
            num_attention_heads=heads, max_position_embeddings=_LENGTH, tie_word_embeddings=True, bos_token_id=0,
            eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip


def arguments(folder: Path, scale: Scale, steps: int, batch_size: int, seed: int, **others: Any) -> TrainingArguments:
    return TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=batch_size, learning_rate=scale.rate, warmup_steps=20,
        lr_scheduler_type="cosine", weight_decay=0.01, adam_beta2=0.98, seed=seed, report_to="none", disable_tqdm=True,
        logging_steps=50, save_total_limit=1, use_cpu=not torch.cuda.is_available(), bf16=scale.bf16, **others,
    )  # fmt: skip


def teacher_of(args: argparse.Namespace, texts: list[str]) -> tuple[Any, Any]:
    """The teacher and its tokenizer, made where the folder has none."""
    work, scale = args.work / f"{args.scale}-{args.teacher}", SCALES[args.scale]
    done, run = work / "teacher", work / "run"
    if not done.exists():
        learn, tokens = TEACHERS[args.teacher]
        tokenizer = learn(texts, tokens)
        trainer = vd.CausalDistillTrainer(
            model := fresh(len(tokenizer), scale.teacher, 0),
            arguments(run, scale, scale.teacher_steps, scale.batch_size, 0, save_steps=100),
            processing_class=tokenizer, weights="lm=1", max_length=_LENGTH, packed=True, train_dataset=texts,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=any(run.glob("checkpoint-*")))
        model.save_pretrained(done)
        tokenizer.save_pretrained(done)
    return AutoModelForCausalLM.from_pretrained(done), AutoTokenizer.from_pretrained(done)


def row_of(
    weights: str, seed: int, args: argparse.Namespace, sides: Any, texts: list[str], held_out: list[str]
) -> dict[str, Any]:
    teacher, teacher_tokenizer, tokenizer = sides
    scale = SCALES[args.scale]
    model = fresh(len(tokenizer), scale.student, seed)
    trainer = vd.CausalDistillTrainer(
        model, arguments(args.work / "students", scale, args.steps, scale.batch_size, seed, save_strategy="no"),
        teacher=teacher, teacher_tokenizer=teacher_tokenizer, processing_class=tokenizer, weights=weights,
        max_length=_LENGTH, packed=True, train_dataset=texts,
    )  # fmt: skip
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    return {
        "scale": args.scale, "teacher": args.teacher, "weights": weights, "seed": seed, "steps": args.steps,
        "batch_size": scale.batch_size,
        "bits_per_byte": round(vd.bits_per_byte(model, tokenizer, held_out), 4),
        "teacher_bits": round(vd.bits_per_byte(teacher, teacher_tokenizer, held_out), 4),
        "parameters": model.num_parameters(), "teacher_parameters": teacher.num_parameters(),
        "tokens": len(tokenizer), "teacher_tokens": len(teacher_tokenizer), "seconds": round(seconds, 1),
        **environment("cuda" if torch.cuda.is_available() else "cpu"),
    }  # fmt: skip


def report(path: Path) -> str:
    """A line for each way to learn: mean and standard deviation over seeds."""
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in read(path, COLUMNS):
        key = ("parameters", "teacher", "teacher_parameters", "teacher_bits", "weights", "steps")
        groups.setdefault(tuple(row[name] for name in key), []).append(row)
    lines = ["| student | teacher | its bits | weights | steps | seeds | bits per byte | s |", "| --- " * 8 + "|"]
    for (size, teacher, teacher_size, teacher_bits, weights, steps), rows in sorted(groups.items(), key=_first):
        bits = [float(row["bits_per_byte"]) for row in rows]
        spread = f" ± {statistics.stdev(bits):.4f}" if len(bits) > 1 else ""
        seconds = statistics.mean(float(row["seconds"]) for row in rows)
        found = f"{statistics.mean(bits):.4f}{spread}"
        sides = f"{int(size) / 1e6:.1f} M | {int(teacher_size) / 1e6:.1f} M, {teacher} | {teacher_bits}"
        lines.append(f"| {sides} | `{weights}` | {steps} | {len(rows)} | {found} | {seconds:.0f} |")
    return "\n".join(lines)


def _first(group: tuple[tuple[str, ...], Any]) -> tuple[int, str]:
    """Students of one size and teacher together, in the order of the file."""
    return int(group[0][0]), group[0][1]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.decoders", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--work", type=Path, metavar="FOLDER", help="of the teachers")
    p.add_argument("--scale", choices=SCALES, default="1m", help="parameters of a student")
    p.add_argument("--teacher", choices=TEACHERS, default="byte-level-bpe", help="by its tokenizer")
    p.add_argument("--weights", nargs="*", default=WEIGHTS, help="of a student each; none: only the teacher is made")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--steps", type=int, default=100)
    p.add_argument("--report", action="store_true", help="print the file as Markdown, and train nothing")
    p.add_argument("--results", type=Path, default=RESULTS, metavar="CSV", help="default: beside this file")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.report:
        print(report(args.results))
        return 0
    data = os.environ.get("VOCABDISTIL_DATA")
    if not data or args.work is None:
        print("needs VOCABDISTIL_DATA=FOLDER, with modern_en.txt, and --work FOLDER", file=sys.stderr)
        return 2
    logging.set_verbosity_error()
    split = split_text(list(read_text([Path(data, "modern_en.txt")])), 0.05, 0, most=HELD_OUT)
    texts = list(split.train)
    sides = *teacher_of(args, texts), unigram(texts, STUDENT_TOKENS)
    key = ("scale", "teacher", "weights", "seed", "steps")
    had = {tuple(row[name] for name in key) for row in read(args.results, COLUMNS)}
    for seed in args.seeds:
        for weights in args.weights:
            if (args.scale, args.teacher, weights, str(seed), str(args.steps)) in had:
                continue
            row = row_of(weights, seed, args, sides, texts, split.held_out)
            append(args.results, row, COLUMNS)
            print(f"{weights} {seed}: {row['bits_per_byte']} bits per byte in {row['seconds']} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
