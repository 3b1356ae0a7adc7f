"""What a causal teacher with another tokenizer is worth: students of equal steps, by bits per byte of held-out text.

``python -m benchmarks.decoders --work FOLDER`` trains a teacher (a Llama with byte-level BPE) from scratch on the lines
of ``modern_en.txt`` in ``VOCABDISTIL_DATA``, and then students (a narrower Llama with Unigram) on the same lines:
on text alone, and with each loss of a teacher beside it. Each student appends a row to ``results.csv`` beside this
file, unless it is there. The teacher is trained once, into the folder, and goes on where it was stopped. ``--report``
prints the file as a table.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
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
    "student", "weights", "seed", "steps", "batch_size", "bits_per_byte", "teacher_bits", "parameters",
    "teacher_parameters", "tokens", "teacher_tokens", "seconds", "device", "name", "python", "torch", "commit", "date",
)  # fmt: skip
# What is learned beside the text.
WEIGHTS = {
    "text": "lm=1",
    "likelihood": "lm=1,likelihood=100",
    "matched": "lm=1,matched=1",
    "remapped": "lm=1,remapped=1",
    "gold": "lm=1,gold=1",
    "both": "lm=1,likelihood=100,matched=1",
}
HELD_OUT = 512
_LENGTH = 128
TEACHER = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6}
STUDENT = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4}
TEACHER_TOKENS, STUDENT_TOKENS = 8000, 4000


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


def fresh(tokens: int, shape: dict[str, int], seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {"max_position_embeddings": _LENGTH, "tie_word_embeddings": True, **shape}
    return LlamaForCausalLM(LlamaConfig(vocab_size=tokens, bos_token_id=0, eos_token_id=1, pad_token_id=1, **shape))


def arguments(folder: Path, steps: int, batch_size: int, seed: int, **others: Any) -> TrainingArguments:
    return TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=batch_size, learning_rate=2e-3, warmup_steps=20,
        lr_scheduler_type="cosine", weight_decay=0.01, adam_beta2=0.98, seed=seed, report_to="none", disable_tqdm=True,
        logging_steps=50, save_total_limit=1, use_cpu=not torch.cuda.is_available(), **others,
    )  # fmt: skip


def teacher_of(work: Path, texts: list[str], steps: int, batch_size: int) -> tuple[Any, Any]:
    """The teacher and its tokenizer, made where the folder has none."""
    done = work / "teacher"
    if not done.exists():
        tokenizer = byte_level(texts, TEACHER_TOKENS)
        model, run = fresh(len(tokenizer), TEACHER, 0), work / "run"
        trainer = vd.CausalDistillTrainer(
            model, arguments(run, steps, batch_size, 0, save_steps=100), processing_class=tokenizer, weights="lm=1",
            max_length=_LENGTH, packed=True, train_dataset=texts,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=any(run.glob("checkpoint-*")))
        model.save_pretrained(done)
        tokenizer.save_pretrained(done)
    return AutoModelForCausalLM.from_pretrained(done), AutoTokenizer.from_pretrained(done)


def row_of(
    name: str, seed: int, args: argparse.Namespace, sides: tuple[Any, Any, Any], texts: list[str], held_out: list[str]
) -> dict[str, Any]:
    teacher, teacher_tokenizer, tokenizer = sides
    model = fresh(len(tokenizer), STUDENT, seed)
    trainer = vd.CausalDistillTrainer(
        model, arguments(args.work / "students", args.steps, args.batch_size, seed, save_strategy="no"),
        teacher=teacher, teacher_tokenizer=teacher_tokenizer, processing_class=tokenizer, weights=WEIGHTS[name],
        max_length=_LENGTH, packed=True, train_dataset=texts,
    )  # fmt: skip
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    return {
        "student": name, "weights": WEIGHTS[name], "seed": seed, "steps": args.steps, "batch_size": args.batch_size,
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
        groups.setdefault((row["student"], row["weights"], row["steps"], row["teacher_bits"]), []).append(row)
    lines = ["| student | weights | steps | seeds | bits per byte | teacher | s |", "| --- " * 7 + "|"]
    for (name, weights, steps, teacher), rows in groups.items():
        bits = [float(row["bits_per_byte"]) for row in rows]
        spread = f" ± {statistics.stdev(bits):.4f}" if len(bits) > 1 else ""
        seconds = statistics.mean(float(row["seconds"]) for row in rows)
        found = f"{statistics.mean(bits):.4f}{spread}"
        lines.append(f"| {name} | `{weights}` | {steps} | {len(rows)} | {found} | {teacher} | {seconds:.0f} |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.decoders", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--work", type=Path, metavar="FOLDER", help="of the teacher")
    names = [*WEIGHTS, "teacher"]
    p.add_argument("--only", nargs="+", choices=names, default=list(WEIGHTS), help="default: all students")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--steps", type=int, default=100)
    p.add_argument("--teacher-steps", type=int, default=600)
    p.add_argument("--batch-size", type=int, default=32)
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
    teacher = teacher_of(args.work, texts, args.teacher_steps, args.batch_size)
    if args.only == ["teacher"]:
        return 0
    sides = *teacher, unigram(texts, STUDENT_TOKENS)
    had = {(row["student"], row["seed"], row["steps"]) for row in read(args.results, COLUMNS)}
    for seed in args.seeds:
        for name in args.only:
            if (name, str(seed), str(args.steps)) in had:
                continue
            row = row_of(name, seed, args, sides, texts, split.held_out)
            append(args.results, row, COLUMNS)
            print(f"{name} {seed}: {row['bits_per_byte']} bits per byte in {row['seconds']} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
