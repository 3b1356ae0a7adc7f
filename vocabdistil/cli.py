# PYTHON_ARGCOMPLETE_OK
"""The command line: ``vocabdistil`` or ``python -m vocabdistil``."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TextIO

from . import __version__
from .core.clock import one_clock
from .core.errors import VocabdistilError, need, on_command_line, one_line
from .core.options import Json, add_options, flags_of, options_of
from .core.processes import FirstFailed, follows, have_met, launched, leave
from .distillation.options import CoverageOptions, DemoOptions, DistillConfig, TeacherConfig, TrimConfig
from .evaluation.options import BenchOptions, EvaluateOptions, LoyaltyOptions

# Everything else is imported by the commands that need it, when their options have been checked: it takes seconds.
if TYPE_CHECKING:
    from .alignment.picture import AlignmentPicture
    from .alignment.worst import AlignedText

__all__ = ["build_parser", "main", "run"]

_INTERRUPTED = 130
# Texts that a page of pictures shows, if nobody says.
_FIRST = 20


@dataclass
class _EvaluateOptions(EvaluateOptions):
    json: Json = False


@dataclass
class _EnvOptions:
    def look(self) -> None:
        """There is nothing to look at."""


class _Parser(argparse.ArgumentParser):
    """Errors of usage are one line too."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, None if follows() else f"{self.prog}: {one_line(message)}\n")


def _print_line(text: str, stream: TextIO | None) -> Exception | None:
    from .core.console import print_line  # takes a while to import

    return print_line(text, stream)


def _print_json(value: Any) -> None:
    """The result of a command, which unlike a report of its work must not be lost in silence."""
    error = _print_line(json.dumps(value, indent=2), sys.stdout)
    if isinstance(error, OSError) and error.errno != errno.EPIPE:  # a reader may have read enough
        raise VocabdistilError(f"cannot write to standard output: {error.strerror}")


def _trim(config: TrimConfig) -> None:
    from .distillation.trim import trim

    trim(config)


def _distill(config: DistillConfig) -> None:
    from .distillation.job import distill

    distill(config)


def _teacher(config: TeacherConfig) -> None:
    from .distillation.pretraining import train_teacher

    train_teacher(config)


def _demo(options: DemoOptions) -> None:
    from .distillation.demo import demo

    demo(**asdict(options))


def _coverage(args: CoverageOptions) -> None:
    from itertools import islice

    from .alignment.coverage import coverage
    from .alignment.picture import Pictures, show_alignment
    from .alignment.remap import RemapTable
    from .alignment.vocab import MatchedVocab
    from .alignment.worst import worst_aligned
    from .core.console import Reporter
    from .core.files import whole_file
    from .distillation.student import known_prompts, make_vocabulary
    from .distillation.text import Prefixed, TextFiles
    from .evaluation.report import coverage_tables
    from .models.sentence import expected_prompt, read_sentence_settings
    from .models.teachers import load_tokenizer
    from .models.vocabularies import Vocabulary

    methods = args.methods
    sentence = read_sentence_settings(args.teacher)
    prompt = expected_prompt(args.prompt, sentence)
    texts = Prefixed(TextFiles(args.text, args.unit), prompt) if args.text else None
    shown: Iterable[str] = (args.show or ()) if texts is None else texts
    teacher = load_tokenizer(args.teacher if sentence is None else sentence.transformer_folder)
    if args.student is None:
        others = known_prompts(prompt, sentence)
        made = make_vocabulary(args.vocabulary, teacher, texts, args.vocab_size, args.family, others)
    else:
        made = Vocabulary(load_tokenizer(args.student, "student"), "given")
    student = made.tokenizer
    say, name = Reporter(), args.student or f"a new vocabulary of {len(made)}"
    if not args.json:
        say.print(*made.notes)
    # One picture of each text is enough, unless several were asked for.
    drawn = methods if args.method else methods[:1]
    counted = texts is not None or args.json
    ready: dict[str, Any] = {
        "table": RemapTable.from_tokenizers(teacher, student) if "reduce" in (methods if counted else drawn) else None,
        "matched": MatchedVocab.from_tokenizers(teacher, student),
    }
    worst: dict[str, list[AlignedText]] = {}
    if args.worst:
        worst = {m: worst_aligned(shown, teacher, student, args.worst, m, quiet=False, **ready) for m in drawn}
    if counted:
        found = coverage(shown, teacher, student, methods, quiet=False, **ready)
        if args.json:
            listed = {method: [asdict(text) for text in chosen] for method, chosen in worst.items()}
            _print_json(found.as_dict() | ({"worst": listed} if listed else {}))
        else:
            say.print(*coverage_tables((args.teacher, name), (teacher, student), found))

    def pictures(of: Sequence[str], by: Sequence[str]) -> list[AlignmentPicture]:
        return [show_alignment(text, teacher, student, method, **ready) for text in of for method in by]

    sections = {}
    if args.show:
        sections["Texts asked for" if worst else ""] = pictures(args.show, drawn)
    elif args.html or worst:
        first = list(islice(shown, _FIRST if args.html else args.worst))
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
            raise VocabdistilError.of("html", f"cannot write {args.html}: {error.strerror}") from None
        wrote = f"Wrote {args.html} ({len(page)} picture{'s' * (len(page) != 1)})"
        _print_line(wrote, sys.stderr if args.json else sys.stdout)


def _loyalty(args: LoyaltyOptions) -> None:
    import random

    from .distillation.text import TextFiles, sample_text

    texts = sorted(set(sample_text(TextFiles(args.text, args.unit), args.seed)))
    # Only now what takes seconds to import.
    from .core.console import Reporter
    from .evaluation.predictions import compare_predictions
    from .evaluation.report import loyalty_table
    from .evaluation.student import embed, embedding_loyalty, load_embedder

    texts = random.Random(args.seed).sample(texts, min(args.texts, len(texts)))
    teacher, settings = load_embedder(args.teacher, "teacher", args.prompt, head=True)
    # All read the same text: both sides fill the same gaps of it.
    students = [load_embedder(name, "student", teacher.prompt, head=True) for name in args.student]
    theirs, found = embed(teacher, texts, args.max_length, settings), {}
    read = [teacher.prompt + text for text in texts]
    for student, own in students:
        vectors = embedding_loyalty(embed(student, texts, args.max_length, own), theirs)
        found[student.name] = vectors | compare_predictions(teacher, student, read, args.max_length, args.seed)
    if args.json:
        _print_json(found)
    else:
        Reporter().print(loyalty_table(found, f"{len(texts)} texts"))


def _evaluate(args: _EvaluateOptions) -> None:
    from .core.console import Reporter
    from .evaluation.report import task_tables
    from .evaluation.tasks import evaluate

    found = evaluate(**{name: getattr(args, name) for name in options_of(EvaluateOptions)}, quiet=False)
    if args.json:
        _print_json(found)
    else:
        Reporter().print(*task_tables(found))


def _bench(args: BenchOptions) -> None:
    from itertools import islice

    from .distillation.text import TextFiles

    # There is a word in each at least.
    texts = list(islice(TextFiles(args.text), args.batch * args.length))
    # Only now what takes seconds to import.
    import torch

    from .core.console import Reporter
    from .evaluation.report import bench_table
    from .evaluation.timing import bench_models
    from .models.teachers import load_teacher

    if args.threads:
        torch.set_num_threads(args.threads)
    models = [load_teacher(name, "models", head=False) for name in args.models]
    rows = bench_models(models, texts, args.batch, args.length)
    if args.json:
        _print_json(rows)
    else:
        Reporter().print(bench_table(rows, args.batch, args.length))


def _env(args: _EnvOptions) -> None:
    from .core.backends import backends

    _print_json(backends())


class _Command(NamedTuple):
    options: type
    run: Callable[[Any], None]
    about: str


_COMMANDS = {
    "trim": _Command(
        TrimConfig, _trim, "give a model a smaller vocabulary, and fewer layers, without training: in seconds"
    ),
    "distill": _Command(DistillConfig, _distill, "distil a teacher into a student with a smaller vocabulary"),
    "demo": _Command(
        DemoOptions, _demo, "see it work: teacher, student and table in two minutes, nothing downloaded"
    ),
    "teacher": _Command(TeacherConfig, _teacher, "train a small BERT on a text, to have a teacher"),
    "coverage": _Command(CoverageOptions, _coverage, "how two tokenizers align on a text, before any training"),
    "loyalty": _Command(LoyaltyOptions, _loyalty, "how far students agree with their teacher on a text"),
    "evaluate": _Command(
        _EvaluateOptions, _evaluate, "what models are worth on tasks: pairs with scores, texts with labels"
    ),
    "bench": _Command(BenchOptions, _bench, "parameters, vocabulary, size and CPU time of models on the same text"),
    "env": _Command(_EnvOptions, _env, "what is built and what can run here, as JSON"),
}


def build_parser() -> argparse.ArgumentParser:
    about = "Distil a transformer into one with a different, smaller vocabulary."
    parser = _Parser(prog="vocabdistil", description=about)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in _COMMANDS.items():
        add_options(commands.add_parser(name, help=command.about, description=command.about), command.options)
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
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks how the line may go on
        with contextlib.suppress(ImportError):
            import argcomplete

            argcomplete.autocomplete(parser)
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:  # usage errors and --help
        return int(stop.code or 0)
    command = _COMMANDS[args.command]
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # for what a look at a tokenizer may import
    try:
        with on_command_line(flags_of(command.options)), one_clock():
            options = command.options(**{name: getattr(args, name) for name in options_of(command.options)})
            if args.command != "distill":
                need(launched() == 1, "command", "distill where several processes were started", args.command)
            if not follows():
                options.look()
            _quiet_libraries()
            command.run(options)
        return 0
    except VocabdistilError as error:
        if not isinstance(error, FirstFailed) and (not follows() or have_met()):
            _print_line(f"vocabdistil: {error}", sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        if not follows():
            _print_line(f"vocabdistil: {str(error) or 'interrupted'}", sys.stderr)
        return _INTERRUPTED


def run() -> None:
    """:func:`main` as a program."""
    code = main()
    if launched() > 1:
        leave(code)
    sys.exit(code)
