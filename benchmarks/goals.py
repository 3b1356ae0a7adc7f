"""What the kernels are to reach on an H200, and ``python -m benchmarks goals CSV``: what a results file says of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .report import failed, latest

__all__ = ["GOALS", "Goal", "judged", "table"]


@dataclass(frozen=True)
class Goal:
    """A figure of the best of our providers.

    Attributes:
        column: of the row: ``copy_fraction``, at least ``bound``, or ``p50_ms`` or ``peak_mb``, at most.
        mode: ``graph``: the kernels alone; ``fwd+bwd``: with what the host does, which in a small case is all.
    """

    operation: str
    case: str
    column: str
    bound: float
    mode: str = "graph"

    @property
    def at_least(self) -> bool:
        return self.column == "copy_fraction"

    def met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


GOALS = (
    Goal("span_loss", "b64-l512-d1024-bf16", "copy_fraction", 0.92),
    Goal("span_loss", "b16-l2048-d4096-bf16", "copy_fraction", 0.92),
    Goal("span_loss", "b64-l512-d768-bf16", "copy_fraction", 0.92),
    Goal("span_loss", "b64-l512-d768-60%-bf16", "copy_fraction", 0.92),
    Goal("span_loss", "b64-l512-d768-fp32", "copy_fraction", 0.97),
    Goal("span_loss", "b64-l512-d264-bf16", "copy_fraction", 0.85),
    Goal("span_loss", "b64-l512-d264-fp32", "copy_fraction", 0.85),
    Goal("span_loss", "b1-l8-d64-fp32", "p50_ms", 0.06, "fwd+bwd"),
    Goal("span_loss", "b1-l8-d64-from32-fp32", "p50_ms", 0.12, "fwd+bwd"),
    Goal("linear_matched_kl", "4096-119547-5031-4700", "p50_ms", 0.2),
    Goal("linear_matched_kl", "4096-119547-5031-4700", "peak_mb", 64, "fwd+bwd"),
    Goal("linear_matched_kl", "8192-151936-32000-28000", "p50_ms", 1.4),
    Goal("linear_matched_kl", "8192-151936-32000-28000", "peak_mb", 300, "fwd+bwd"),
)


def _best(run: dict[str, dict[str, str]], goal: Goal) -> float | None:
    values = [float(row[goal.column]) for name, row in run.items() if name.startswith("ours") and row[goal.column]]
    return (max if goal.at_least else min)(values, default=None)


def judged(rows: Iterable[dict[str, str]]) -> Iterator[tuple[str, str, str, str, bool]]:
    """Operation, case with its mode, what is asked, what was reached, and whether that is enough: a line for each goal,
    for each of ours that is wrong, and for each rival that is faster than ours."""
    groups = latest(rows)
    for goal in GOALS:
        runs = [run for key, run in groups.items() if key[:3] == (goal.operation, goal.case, goal.mode)]
        value = _best(runs[-1], goal) if runs else None
        asked = f"{goal.column} {'>=' if goal.at_least else '<='} {goal.bound:g}"
        where = goal.operation, f"{goal.case} {goal.mode}"
        yield *where, asked, "no row" if value is None else f"{value:g}", value is not None and goal.met(value)
    for (operation, case, mode, _), run in groups.items():
        where = operation, f"{case} {mode}"
        yield from ((*where, f"{name} right", row["error"], False) for name, row in run.items() if failed(row))
        ours = [float(row["p50_ms"]) for name, row in run.items() if name.startswith("ours") and row["p50_ms"]]
        for name, row in run.items():
            if ours and row["p50_ms"] and not name.startswith("ours") and float(row["p50_ms"]) < min(ours):
                yield *where, f"no slower than {name}", f"{min(ours):g} ms, {name} {row['p50_ms']} ms", False


def table(rows: Iterable[dict[str, str]]) -> tuple[str, bool]:
    """The lines as Markdown, those that fall short first, and whether none does."""
    lines = sorted(judged(rows), key=lambda line: line[-1])
    cells = [(*line[:-1], "met" if line[-1] else "MISSED") for line in lines]
    head = ("operation", "case", "goal", "reached", "")
    text = "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *cells))
    return text, all(line[-1] for line in lines)
