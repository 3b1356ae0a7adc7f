"""The command line: ``vocabdistil`` or ``python -m vocabdistil``."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from .alignment.picture import AlignmentPicture
    from .alignment.worst import AlignedText

__all__ = ["build_parser", "main"]

_INTERRUPTED = 130
# Texts that a page of pictures shows, if nobody says.
_FIRST = 20
# Written out, as their module takes a second to import; a test compares it with vocabdistil.models.students.PRESETS.
_PRESETS = (
    "a DistilBERT instead of the teacher's own kind of body: base (6 layers x 768), small (2 x 768), tiny (3 x 264) "
    "or tiny-5k (3 x 264, 5,000 tokens)"
)
# Written out too, and compared with vocabdistil.distillation.recipes.RECIPES.
_RECIPES = (
    "what is learned and how: embedding, masked, paper, tiny-5k, distilbert, base or small (default auto: masked where "
    "student and teacher have an MLM head, else embedding)"
)

# The default of an option that the recipe gives.
_ASK = "the recipe's"


class _Parser(argparse.ArgumentParser):
    """Errors of usage are one line too."""

    def error(self, message: str) -> None:
        from .core.errors import one_line

        self.exit(2, f"{self.prog}: {one_line(message)}\n")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers with commas between them, got {text!r}") from None


def _file(name: str) -> Path:
    if not name:
        raise argparse.ArgumentTypeError("expected a file, got nothing")
    return Path(name)


def _print_line(text: str, stream: TextIO | None) -> None:
    from .core.console import print_line  # takes a while to import

    print_line(text, stream)


def _print_json(value: Any) -> None:
    _print_line(json.dumps(value, indent=2), sys.stdout)


def _number(p: argparse.ArgumentParser, name: str, default: float, text: str) -> None:
    kind, metavar = (int, "N") if isinstance(default, int) else (float, "X")
    p.add_argument(name, type=kind, default=default, metavar=metavar, help=f"{text} (default {default})")


def _add_text_options(p: argparse.ArgumentParser) -> None:
    """What every job that reads text and writes a folder has."""
    p.add_argument("--text", nargs="+", type=_file, required=True, metavar="FILE", help="UTF-8 text")
    p.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    _number(p, "--max-length", 128, "teacher tokens")
    p.add_argument("--unit", default="line", help="what one text is: line or paragraph (default %(default)s)")
    _number(p, "--seed", 0, "of everything random")
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads of torch")
    p.add_argument("--overwrite", action="store_true", help="replace the output folder of an earlier run")
    p.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _add_training_options(p: argparse.ArgumentParser, steps: int | None, lr: float | None) -> None:
    """What every training run has."""
    size = None if lr is None else 32
    p.add_argument("--batch-size", type=int, default=size, metavar="N", help=f"texts per step (default {size or _ASK})")
    p.add_argument("--lr", type=float, default=lr, metavar="X", help=f"peak learning rate (default {lr or _ASK})")
    p.add_argument("--steps", type=int, default=steps, metavar="N", help=f"default {steps or 'by --epochs'}")
    _number(p, "--held-out", 0.05, "share to evaluate on")
    _number(p, "--save-every", 500, "checkpoint every N steps")
    _number(p, "--log-every", 50, "log every N steps")
    p.add_argument("--resume", action="store_true", help="continue an interrupted run")


def _add_teachers(p: argparse.ArgumentParser, about: str) -> None:
    p.add_argument("--teacher", action="append", required=True, metavar="DIR_OR_NAME", help=about)
    prompt = "what the teacher expects before every text, such as 'query: ' (default: what its folder says)"
    p.add_argument("--prompt", metavar="TEXT", help=prompt)
    p.add_argument("--trust-remote-code", action="store_true", help="run code that comes with a model")


def _add_vocabulary(p: argparse.ArgumentParser, default: str | None, size: str) -> None:
    vocabulary = (
        "train: new tokens in the teacher's family; trim: those of the teacher that the text needs; or a "
        f"tokenizer's folder (default {default or _ASK})"
    )
    p.add_argument("--vocabulary", default=default, metavar="train|trim|DIR", help=vocabulary)
    p.add_argument("--vocab-size", type=int, metavar="N", help=f"tokens of the student (default {size})")
    family = "of new tokens: wordpiece, byte-bpe, bpe or unigram (default: the teacher's)"
    p.add_argument("--family", metavar="NAME", help=family)


def _add_body(p: argparse.ArgumentParser, default: str) -> None:
    layers = f"layers of the teacher to keep, evenly spaced, the last among them (default {default})"
    p.add_argument("--layers", type=int, metavar="N", help=layers)
    p.add_argument("--keep-layers", metavar="I,J,...", help="which ones instead, from 0")
    p.add_argument("--dim", type=int, metavar="N", help="hidden width (default: the teacher's)")
    p.add_argument("--heads", type=int, metavar="N", help="attention heads (default: the teacher's)")
    p.add_argument("--ffn", type=int, metavar="N", help="width of the feed-forward layers (default: the teacher's)")
    copied = "copy layers as they are; else, where some are left out, the others are fitted to the teacher on the text"
    p.add_argument("--no-fit", dest="fit", action="store_false", help=copied)


def _add_card(p: argparse.ArgumentParser, batch: int, length: int) -> None:
    p.add_argument("--language", metavar="CODE,...", help="for the model card, such as ru")
    p.add_argument("--license", metavar="NAME", help="for the model card, such as mit")
    _number(p, "--time-batch", batch, "texts of the CPU timing")
    _number(p, "--time-length", length, "tokens of each")


def _config(kind: type, args: argparse.Namespace) -> Any:
    return kind(**{field.name: getattr(args, field.name) for field in fields(kind)})


def _add_trim(p: argparse.ArgumentParser) -> None:
    _add_teachers(p, "the model")
    _add_text_options(p)
    _add_vocabulary(p, "trim", "8000")
    _add_body(p, "all")
    _add_card(p, 8, 128)


def _trim(args: argparse.Namespace) -> None:
    from .distillation.trim import TrimConfig, trim

    trim(_config(TrimConfig, args))


def _add_distill(p: argparse.ArgumentParser) -> None:
    _add_teachers(p, "the model to learn from; repeat for several")
    _add_text_options(p)
    _add_vocabulary(p, None, "the preset's, else 8000")
    _add_body(p, "half")
    p.add_argument("--preset", metavar="NAME", help=_PRESETS)
    p.add_argument("--student", metavar="DIR", help="a checkpoint to go on from instead, with its own vocabulary")
    p.add_argument("--recipe", default="auto", metavar="NAME", help=_RECIPES)
    _add_training_options(p, None, None)
    _number(p, "--epochs", 3.0, "passes over the text")
    p.add_argument("--minutes", type=float, metavar="X", help="as many steps as fit into so long a job, instead")
    _number(p, "--accumulate", 1, "batches of one step")
    p.add_argument("--student-max-length", type=int, metavar="N", help="student tokens (default: twice --max-length)")
    p.add_argument("--warmup", type=float, metavar="X", help=f"share of the steps (default {_ASK})")
    schedule = f"after it: linear, cosine or constant (default {_ASK})"
    p.add_argument("--schedule", metavar="NAME", help=schedule)
    _number(p, "--weight-decay", 0.01, "of AdamW")
    p.add_argument("--temperature", type=float, metavar="X", help=f"of both kinds of KL (default {_ASK})")
    weights = (
        "kl, cosine, mse, pooled, similarity, relations, attention, logits, mlm: what differs from the recipe's; "
        "logits and mlm need an MLM head"
    )
    p.add_argument("--weights", default="", metavar="NAME=X,...", help=weights)
    logits = "where output distributions are learned: match, reduce, reduce-map or none (default: match if possible)"
    p.add_argument("--logits", metavar="MODE", help=logits)
    p.add_argument("--teacher-weights", type=_numbers, metavar="X,...", help="of the teachers (default: alike)")
    p.add_argument("--layer-map", metavar="NAME", help=f"last, skip, average, average_all or kept (default {_ASK})")
    p.add_argument("--train-projection", action="store_true", help="train the map to the teacher's width too")
    p.add_argument("--cache-teacher", metavar="DIR", help="remember there what teachers made of texts, for other runs")
    p.add_argument("--dev", metavar="FILE", help="CSV of sentence, sentence, score: told at every checkpoint")
    p.add_argument("--patience", type=int, metavar="N", help="stop after N checkpoints without a better held-out loss")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda (default %(default)s)")
    p.add_argument("--precision", default="fp32", help="fp32 or bf16 (default %(default)s)")
    _add_card(p, 16, 512)


def _distill(args: argparse.Namespace) -> None:
    from .distillation.job import DistillConfig, distill

    distill(_config(DistillConfig, args))


def _add_teacher(p: argparse.ArgumentParser) -> None:
    _add_text_options(p)
    _number(p, "--vocab-size", 30000, "tokens")
    _number(p, "--layers", 4, "transformer layers")
    _number(p, "--dim", 256, "hidden width")
    _number(p, "--heads", 4, "attention heads")
    p.add_argument("--cased", action="store_true", help="keep upper case and accents")
    _add_training_options(p, 1000, 5e-4)


def _teacher(args: argparse.Namespace) -> None:
    from .distillation.pretraining import TeacherConfig, train_teacher

    train_teacher(_config(TeacherConfig, args))


def _add_demo(p: argparse.ArgumentParser) -> None:
    p.add_argument("--out", default="vocabdistil-demo", metavar="DIR", help="folder to write (default %(default)s)")
    _number(p, "--seed", 0, "of everything random")
    p.add_argument("--overwrite", action="store_true", help="replace an earlier demo")


def _demo(args: argparse.Namespace) -> None:
    from .distillation.demo import demo

    demo(args.out, args.seed, args.overwrite)


def _add_coverage(p: argparse.ArgumentParser) -> None:
    p.add_argument("--teacher", required=True, metavar="DIR_OR_NAME", help="the teacher's tokenizer")
    student = "the student's (default: the one that distill would make of the text)"
    p.add_argument("--student", metavar="DIR_OR_NAME", help=student)
    _add_vocabulary(p, "train", "8000")
    p.add_argument("--prompt", metavar="TEXT", help="what stands before every text (default: what the folder says)")
    p.add_argument("--text", nargs="+", type=_file, metavar="FILE", help="UTF-8 text to count on")
    p.add_argument("--unit", default="line", help="what one text is: line or paragraph (default %(default)s)")
    p.add_argument("--method", action="append", metavar="NAME", help="boundary, word, match, reduce (default: all)")
    p.add_argument("--show", action="append", metavar="TEXT", help="draw how this text is aligned; repeat for several")
    worst = "draw the N texts that align worst, with the smallest share in 1:1 pairs, beside the first ones or --show's"
    p.add_argument("--worst", type=int, metavar="N", help=worst)
    p.add_argument("--html", metavar="FILE", help="write these pictures (default: of the first 20 texts) as HTML")
    p.add_argument("--json", action="store_true", help="print JSON")


def _coverage(args: argparse.Namespace) -> None:
    from itertools import islice

    from .alignment.coverage import coverage
    from .alignment.methods import METHODS
    from .alignment.picture import Pictures, show_alignment
    from .alignment.remap import RemapTable
    from .alignment.vocab import MatchedVocab
    from .alignment.worst import worst_aligned
    from .core.console import Reporter
    from .core.errors import VocabdistilError, need, need_place, need_whole, utf8
    from .core.files import whole_file
    from .distillation.student import known_prompts, make_vocabulary
    from .distillation.text import Prefixed, TextFiles
    from .evaluation.report import coverage_tables
    from .models.sentence import expected_prompt, read_sentence_settings
    from .models.teachers import load_tokenizer
    from .models.vocabularies import Vocabulary

    methods = tuple(dict.fromkeys(args.method or METHODS))
    for method in methods:
        need(method in METHODS, "method", " or ".join(METHODS), repr(method))
    need(bool(args.text or args.show), "text", "a file, or --show with a text", "neither")
    need(bool(args.text or args.student), "student", "a tokenizer, or --text to train one on", "neither")
    if args.vocab_size is not None:
        need_whole(args.vocab_size, "vocab_size")
    if args.worst is not None:
        need_whole(args.worst, "worst")
        need(bool(args.text), "worst", "--text, to find them in", "none")
    for text in args.show or ():
        need(utf8(text), "show", "text that UTF-8 can hold", ascii(text))
    if args.html is not None:
        need_place(args.html, "html", "a file to write")
        place = Path(args.html)
        need(place.parent.is_dir() and not place.is_dir(), "html", "a file to write, in a folder", args.html)
    sentence = read_sentence_settings(args.teacher)
    prompt = expected_prompt(args.prompt, sentence)
    texts = Prefixed(TextFiles(args.text, args.unit), prompt) if args.text else None
    teacher = load_tokenizer(args.teacher if sentence is None else sentence.transformer_folder)
    if args.student is None:
        others = known_prompts(prompt, sentence)
        made = make_vocabulary(args.vocabulary, teacher, texts, args.vocab_size, args.family, others)
    else:
        made = Vocabulary(load_tokenizer(args.student, "--student"), "given")
    student = made.tokenizer
    say, name = Reporter(), args.student or f"a new vocabulary of {len(made)}"
    if not args.json:
        say.print(*made.notes)
    # One picture of each text is enough, unless several were asked for.
    drawn = methods if args.method else methods[:1]
    counted = texts is not None or args.json
    ready = {
        "table": RemapTable.from_tokenizers(teacher, student) if "reduce" in (methods if counted else drawn) else None,
        "matched": MatchedVocab.from_tokenizers(teacher, student),
    }
    worst: dict[str, list[AlignedText]] = {}
    if args.worst:
        worst = {m: worst_aligned(texts, teacher, student, args.worst, m, quiet=False, **ready) for m in drawn}
    if counted:
        found = coverage(args.show if texts is None else texts, teacher, student, methods, quiet=False, **ready)
        if args.json:
            listed = {method: [asdict(text) for text in chosen] for method, chosen in worst.items()}
            _print_json(found.as_dict() | ({"worst": listed} if listed else {}))
        else:
            say.print(*coverage_tables((args.teacher, name), (teacher, student), found))

    def pictures(shown: Sequence[str], by: Sequence[str]) -> list[AlignmentPicture]:
        return [show_alignment(text, teacher, student, method, **ready) for text in shown for method in by]

    sections = {}
    if args.show:
        sections["Texts asked for" if worst else ""] = pictures(args.show, drawn)
    elif args.html or worst:
        first = list(islice(texts, _FIRST if args.html else args.worst))
        sections[f"First texts ({len(first)})" if worst else ""] = pictures(first, drawn)
    for method, chosen in worst.items():
        shares = f"{chosen[0].one_to_one:.0%} to {chosen[-1].one_to_one:.0%} of their bytes in 1:1 pairs"
        heading = f"Texts that align worst by {method} ({len(chosen)}): {shares}"
        sections[heading] = pictures([text.text for text in chosen], [method])
    page = Pictures(sections)
    if not args.json and (args.show or worst and not args.html):
        say.print(page)
    if args.html:
        try:
            with whole_file(args.html) as file:
                file.write(page.html().encode())
        except OSError as error:
            raise VocabdistilError(f"--html: cannot write {args.html}: {error.strerror}") from None
        wrote = f"Wrote {args.html} ({len(page)} picture{'s' * (len(page) != 1)})"
        _print_line(wrote, sys.stderr if args.json else sys.stdout)


def _add_loyalty(p: argparse.ArgumentParser) -> None:
    p.add_argument("--teacher", required=True, metavar="DIR_OR_NAME", help="the teacher")
    p.add_argument("--student", nargs="+", required=True, metavar="DIR_OR_NAME", help="the students")
    text = "UTF-8 text that none was trained on"
    p.add_argument("--text", nargs="+", type=_file, required=True, metavar="FILE", help=text)
    p.add_argument("--unit", default="line", help="what one text is: line or paragraph (default %(default)s)")
    prompt = "what stands before every text (default: what the teacher's folder says)"
    p.add_argument("--prompt", metavar="TEXT", help=prompt)
    _number(p, "--texts", 512, "at most so many")
    _number(p, "--max-length", 128, "tokens of a text")
    _number(p, "--seed", 0, "of the choice of texts")
    p.add_argument("--json", action="store_true", help="print JSON")


def _loyalty(args: argparse.Namespace) -> None:
    import random

    from .core.console import Reporter
    from .core.errors import need_prompt, need_seed, need_whole
    from .distillation.text import read_text
    from .evaluation.predictions import compare_predictions
    from .evaluation.report import loyalty_table
    from .evaluation.student import embed, embedding_loyalty, load_embedder

    need_prompt(args.prompt)
    for name in ("texts", "max_length"):
        need_whole(getattr(args, name), name, above=2)
    need_seed(args.seed)
    texts = sorted(set(read_text(args.text, args.unit)))
    texts = random.Random(args.seed).sample(texts, min(args.texts, len(texts)))
    teacher, settings = load_embedder(args.teacher, "--teacher", args.prompt, head=True)
    # All read the same text: both sides fill the same gaps of it.
    students = [load_embedder(name, "--student", teacher.prompt, head=True) for name in args.student]
    theirs, found = embed(teacher, texts, args.max_length, settings), {}
    read = [teacher.prompt + text for text in texts]
    for student, own in students:
        vectors = embedding_loyalty(embed(student, texts, args.max_length, own), theirs)
        found[student.name] = vectors | compare_predictions(teacher, student, read, args.max_length, args.seed)
    if args.json:
        _print_json(found)
    else:
        Reporter().print(loyalty_table(found, f"{len(texts)} texts"))


def _add_evaluate(p: argparse.ArgumentParser) -> None:
    models = "models to compare; the first is the yardstick"
    p.add_argument("--model", nargs="+", action="extend", required=True, metavar="DIR_OR_NAME", help=models)
    files = {"nargs": "+", "action": "extend", "type": _file, "default": [], "metavar": "FILE"}
    p.add_argument("--pairs", **files, help="CSV with sentence, sentence, score: cosines are compared with the scores")
    p.add_argument("--labels", **files, help="CSV with text, label: linear probes on the vectors, tested on a fifth")
    p.add_argument("--prompt", metavar="TEXT", help="what stands before every text (default: what each folder says)")
    _number(p, "--max-length", 512, "tokens of a text, fewer where a folder says so")
    _number(p, "--seed", 0, "of the split of labelled texts")
    p.add_argument("--picture", metavar="FILE", help="draw score against parameters and time: .svg or .png")
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads of torch")
    p.add_argument("--trust-remote-code", action="store_true", help="run code that comes with a model")
    p.add_argument("--json", action="store_true", help="print JSON")


def _evaluate(args: argparse.Namespace) -> None:
    from .core.console import Reporter
    from .evaluation.report import task_tables
    from .evaluation.tasks import evaluate

    found = evaluate(
        args.model, args.pairs, args.labels, prompt=args.prompt, max_length=args.max_length, seed=args.seed,
        picture=args.picture, threads=args.threads, trust_remote_code=args.trust_remote_code, quiet=False,
    )  # fmt: skip
    if args.json:
        _print_json(found)
    else:
        Reporter().print(*task_tables(found))


def _add_bench(p: argparse.ArgumentParser) -> None:
    p.add_argument("models", nargs="+", metavar="DIR_OR_NAME", help="models to compare; the first is the yardstick")
    p.add_argument("--text", nargs="+", type=_file, required=True, metavar="FILE", help="UTF-8 text to read")
    _number(p, "--batch", 16, "texts at once")
    _number(p, "--length", 512, "tokens of each")
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads of torch")
    p.add_argument("--json", action="store_true", help="print JSON")


def _bench(args: argparse.Namespace) -> None:
    import torch

    from .core.console import Reporter
    from .core.errors import need, need_threads
    from .distillation.options import check_timing
    from .distillation.text import read_text
    from .evaluation.report import bench_table
    from .evaluation.timing import bench_models
    from .models.teachers import load_teacher

    check_timing(args.batch, args.length, ("batch", "length"))
    need(args.length > 2, "length", "a number above 2", args.length)
    need_threads(args.threads)
    if args.threads:
        torch.set_num_threads(args.threads)
    texts = read_text(args.text)
    models = [load_teacher(name, "models", head=False) for name in args.models]
    rows = bench_models(models, texts, args.batch, args.length)
    if args.json:
        _print_json(rows)
    else:
        Reporter().print(bench_table(rows, args.batch, args.length))


def _add_env(p: argparse.ArgumentParser) -> None:
    pass


def _env(args: argparse.Namespace) -> None:
    from .core.backends import backends

    _print_json(backends())


_COMMANDS = {
    "trim": (_add_trim, _trim, "give a model a smaller vocabulary, and fewer layers, without training: in seconds"),
    "distill": (_add_distill, _distill, "distil a teacher into a student with a smaller vocabulary"),
    "demo": (_add_demo, _demo, "see it work: teacher, student and table in about a minute, nothing downloaded"),
    "teacher": (_add_teacher, _teacher, "train a small BERT on a text, to have a teacher"),
    "coverage": (_add_coverage, _coverage, "how two tokenizers align on a text, before any training"),
    "loyalty": (_add_loyalty, _loyalty, "how far students agree with their teacher on a text"),
    "evaluate": (_add_evaluate, _evaluate, "what models are worth on tasks: pairs with scores, texts with labels"),
    "bench": (_add_bench, _bench, "parameters, vocabulary, size and CPU time of models on the same text"),
    "env": (_add_env, _env, "what is built and what can run here, as JSON"),
}


def build_parser() -> argparse.ArgumentParser:
    about = "Distil a transformer into one with a different, smaller vocabulary."
    parser = _Parser(prog="vocabdistil", description=about)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add, run, text) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        add(command)
        command.set_defaults(run=run)
    return parser


def _quiet_libraries() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0, 2 for bad input (one line on standard error), 130 when interrupted."""
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:  # usage errors and --help
        return int(stop.code or 0)
    from .core.errors import VocabdistilError

    try:
        _quiet_libraries()
        args.run(args)
        return 0
    except VocabdistilError as error:
        _print_line(f"vocabdistil: {error}", sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        _print_line(f"vocabdistil: {error or 'interrupted'}", sys.stderr)
        return _INTERRUPTED
