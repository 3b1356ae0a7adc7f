"""The command line: ``vocabdistil`` or ``python -m vocabdistil``."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields

__all__ = ["build_parser", "main"]

_INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """Errors of usage are one line too."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}\n")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers with commas between them, got {text!r}") from None


def _add_distill(commands: argparse._SubParsersAction) -> None:
    p = commands.add_parser("distill", help="distil a teacher into a student with a smaller vocabulary")
    p.add_argument("--teacher", action="append", required=True, metavar="FOLDER_OR_NAME",
                   help="the teacher; give it again for more teachers")  # fmt: skip
    p.add_argument("--text", nargs="+", required=True, metavar="FILE", help="UTF-8 text to train on")
    p.add_argument("--out", required=True, metavar="DIR", help="folder to write the student to")
    p.add_argument("--preset", default="tiny-5k", help="base, small, tiny or tiny-5k (default %(default)s)")
    p.add_argument("--vocab-size", type=int, metavar="N", help="tokens of the student (default: the preset's)")
    p.add_argument("--steps", type=int, metavar="N", help="training steps (default: by --epochs)")
    p.add_argument("--epochs", type=float, default=3.0, metavar="X", help="passes over the text (default %(default)s)")
    p.add_argument("--batch-size", type=int, default=32, metavar="N", help="texts per step (default %(default)s)")
    p.add_argument("--max-length", type=int, default=128, metavar="N",
                   help="teacher tokens of a text (default %(default)s)")  # fmt: skip
    p.add_argument("--student-max-length", type=int, metavar="N",
                   help="student tokens of a text (default: twice --max-length, at most 512)")  # fmt: skip
    p.add_argument("--lr", type=float, default=5e-4, metavar="X", help="peak learning rate (default %(default)s)")
    p.add_argument("--warmup", type=float, default=0.05, metavar="X", help="share of steps of warm-up (default %(default)s)")
    p.add_argument("--weight-decay", type=float, default=0.01, metavar="X", help="of AdamW (default %(default)s)")
    p.add_argument("--temperature", type=float, default=2.0, metavar="T", help="of the span KL (default %(default)s)")
    p.add_argument("--weights", default="", metavar="NAME=X,...",
                   help="weights of the losses kl, mlm, cosine, mse (default kl=2,mlm=0.5)")  # fmt: skip
    p.add_argument("--teacher-weights", type=_numbers, metavar="X,...", help="what each teacher counts (default: alike)")
    p.add_argument("--layer-map", default="last", help="last, skip, average or average_all (default %(default)s)")
    p.add_argument("--held-out", type=float, default=0.05, metavar="X",
                   help="share of the texts kept for evaluation (default %(default)s)")  # fmt: skip
    p.add_argument("--unit", default="line", help="what one text is: line or paragraph (default %(default)s)")
    p.add_argument("--seed", type=int, default=0, metavar="N")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda (default %(default)s)")
    p.add_argument("--precision", default="fp32", help="fp32 or bf16 (default %(default)s)")
    p.add_argument("--save-every", type=int, default=500, metavar="N", help="steps between checkpoints (default %(default)s)")
    p.add_argument("--log-every", type=int, default=50, metavar="N", help="steps between log entries (default %(default)s)")
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads of torch")
    p.add_argument("--time-batch", type=int, default=16, metavar="N", help="batch of the CPU timing (default %(default)s)")
    p.add_argument("--time-length", type=int, default=512, metavar="N",
                   help="tokens per text of the CPU timing (default %(default)s)")  # fmt: skip
    p.add_argument("--resume", action="store_true", help="continue an interrupted run")
    p.add_argument("--overwrite", action="store_true", help="replace the output folder")
    p.add_argument("--quiet", action="store_true", help="print nothing but errors")
    p.set_defaults(run=_distill)


def _distill(args: argparse.Namespace) -> int:
    from .training import DistillConfig, distill

    distill(DistillConfig(**{field.name: getattr(args, field.name) for field in fields(DistillConfig)}))
    return 0


def _add_env(commands: argparse._SubParsersAction) -> None:
    p = commands.add_parser("env", help="what is built and what can run here, as JSON")
    p.set_defaults(run=_env)


def _env(args: argparse.Namespace) -> int:
    from ._backends import backends

    print(json.dumps(backends(), indent=2))
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vocabdistil", description="Distil a transformer into one with a different, smaller vocabulary.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_distill(commands)
    _add_env(commands)
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
    from .errors import VocabdistilError

    _quiet_libraries()
    try:
        return args.run(args)
    except VocabdistilError as error:
        print(f"vocabdistil: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"vocabdistil: {error or 'interrupted'}", file=sys.stderr)
        return _INTERRUPTED
