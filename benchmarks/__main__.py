"""``python -m benchmarks NAME...`` measures; ``picture CSV --out FILE.png``, ``figures [CSV...]`` and ``goals CSV``
show; ``smoke`` says in a minute whether every loss is right on every backend, ``static`` what the compiler says of the
CUDA kernels.

The cases of remap and align on real text read war_and_peace_ru.txt and shakespeare_en.txt in the folder
VOCABDISTIL_DATA.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import goals, report, smoke, static

OPERATIONS = (
    "span_mean", "span_loss", "matched_kl", "linear_matched_kl", "remapped_kl", "linear_remapped_kl", "span_likelihood",
    "linear_span_likelihood", "contrastive", "pooled_loss", "similarity_loss", "relation_loss", "attention_loss",
    "remap", "align", "collate",
)  # fmt: skip
ALIASES = {"span_kl": "span_loss"}


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("names", nargs="+", metavar="NAME", choices=[*OPERATIONS, *ALIASES, "all"],
                   help=f"{', '.join(OPERATIONS)} (span_kl is span_loss), or all")  # fmt: skip
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default %(default)s")
    p.add_argument("--case", default="", metavar="SUBSTRING", help="only cases whose name holds this")
    p.add_argument("--providers", nargs="+", metavar="NAME",
                   help="only these; ours takes ours-cuda and ours-triton")  # fmt: skip
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's own number)")
    p.add_argument("--quick", action="store_true", help="three rounds per case: to see that it runs")
    p.add_argument("--retries", type=int, default=0, metavar="N",
                   help=f"measure again while others take over {report.QUIET:.0%}% of the CPU")  # fmt: skip
    p.add_argument("--missing", action="store_true", help="leave out cases of which the file has rows of this commit")
    p.add_argument("--out", type=Path, metavar="CSV",
                   help="default: benchmarks/results/cpu.csv or cuda-GPU.csv")  # fmt: skip
    return p


def _other(argv: Sequence[str]) -> int:
    p = argparse.ArgumentParser(prog=f"python -m benchmarks {argv[0]}")
    if argv[0] == "picture":
        p.description = "Draw time against pairs and against hidden size from the sweep in a results file."
        p.add_argument("csv", type=Path)
        p.add_argument("--out", type=Path, required=True, metavar="FILE.png")
        args = p.parse_args(argv[1:])
        report.picture(args.csv, args.out)
        return 0
    if argv[0] == "smoke":
        p.description = "Every loss with kernels on every backend, against float64; exit status 1 if one is wrong."
        p.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default %(default)s")
        return int(smoke.smoke(torch.device(p.parse_args(argv[1:]).device)) > 0)
    if argv[0] == "goals":
        p.description = "Say which goals of the kernels on an H200 a results file reaches; exit status 1 if not all."
        p.add_argument("csv", type=Path)
        text, reached = goals.table(report.read_rows(p.parse_args(argv[1:]).csv))
        print(text)
        return int(not reached)
    p.description = "Print the headline rows of results files as Markdown."
    p.add_argument("csv", type=Path, nargs="*", help="default: all files in benchmarks/results")
    paths = p.parse_args(argv[1:]).csv or sorted(report.RESULTS.glob("*.csv"))
    print(report.figures(paths))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 when one of our implementations is wrong or raises."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ("picture", "figures", "goals", "smoke"):
        return _other(argv)
    if argv and argv[0] == "static":
        return static.main(argv[1:])
    from . import harness

    parser = _parser()
    args = parser.parse_args(argv)
    if args.threads is not None:
        if args.threads < 1:
            parser.error(f"argument --threads: expected at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
        os.environ["RAYON_NUM_THREADS"] = str(args.threads)  # those of `tokenizers`, which has not encoded yet
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch finds no CUDA device")
    names = [ALIASES.get(name, name) for name in args.names]
    path, measured, known, bad, swept = args.out or report.default_path(device), 0, 0, False, False
    commit = report.environment(device.type)["commit"]
    had = {
        (row["operation"], row["case"])
        for row in (report.read_rows(path) if args.missing and path.exists() else ())
        if row["commit"] == commit and row["device"] == device.type
    }
    for name in OPERATIONS if "all" in names else dict.fromkeys(names):
        operation = importlib.import_module(f"benchmarks.{name}")
        for case in operation.cases(device):
            if args.case not in case.name:
                continue
            if (operation.OPERATION, case.name) in had:
                known += 1
                continue
            rows = harness.run_case(operation.OPERATION, case, device, args.providers, args.quick, args.retries)
            if not rows:
                continue
            measured += len(rows)
            swept |= case.name.startswith("sweep-")
            report.print_rows(rows)
            report.append_rows(path, rows)
            bad |= any(map(report.failed, rows))
    if not measured and not known:
        parser.error("no case and provider of that name for this device")
    print(f"{measured} rows added to {path}")
    if swept and importlib.util.find_spec("matplotlib"):
        report.picture(path, path.with_suffix(".png"))
        print(f"drawn: {path.with_suffix('.png')}")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
