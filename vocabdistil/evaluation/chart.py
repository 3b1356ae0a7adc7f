"""A picture of what models are worth, beside what they cost."""

from __future__ import annotations

import importlib.util
import math
import os
from pathlib import Path
from typing import Any

from ..core.errors import VocabdistilError, need, need_writable
from ..core.files import whole_file

__all__ = ["check_chart", "draw_chart"]

_SCORES = {"spearman": "Spearman", "accuracy": "accuracy"}


def check_chart(path: Any) -> None:
    """Raises VocabdistilError unless :func:`draw_chart` can write there: before the work that the picture is of."""
    expected = "an .svg or .png file to write"
    need(Path(path).suffix.lower() in (".svg", ".png"), "picture", expected, path)
    need_writable(path, "picture", expected)
    if importlib.util.find_spec("matplotlib") is None:
        raise VocabdistilError.of("picture", "needs matplotlib; pip install vocabdistil[picture]")


def draw_chart(found: dict[str, Any], path: str | os.PathLike) -> None:
    """Draws score against parameters and against CPU time: a row of two panels for every task.

    Args:
        found: what :func:`vocabdistil.evaluate` gives. A model without a score is left out.
        path: an ``.svg`` or ``.png`` file.

    Raises:
        VocabdistilError: it cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    models, tasks = found["models"], found["tasks"]
    colours = ["black", *["tab:blue"] * (len(models) - 1)]
    figure = Figure(figsize=(11, 4.2 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), 2, squeeze=False, sharey="row")
    for task, row in zip(tasks, panels, strict=True):
        points = [
            (model["name"], (model["parameters"] / 1e6, result["seconds"]), result[task["score"]], colour)
            for model, result, colour in zip(models, task["results"], colours, strict=True)
            if result[task["score"]] is not None
        ]
        for which, (panel, title) in enumerate(zip(row, ("parameters, M", "CPU time, s"), strict=True)):
            places = [costs[which] for _, costs, *_ in points]
            middle = math.sqrt(min(places) * max(places)) if places else 1.0
            for (name, _, score, colour), place in zip(points, places, strict=True):
                panel.plot(place, score, "o", color=colour)
                left = place > middle
                panel.annotate(
                    name, (place, score), (-6 if left else 6, 4), textcoords="offset points", color=colour,
                    ha="right" if left else "left", fontsize=9, parse_math=False,
                )  # fmt: skip
            panel.set(xscale="log", xlabel=title)
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.margins(0.15)
            panel.grid(alpha=0.3)
        row[0].set_ylabel(f"{_SCORES[task['score']]}\n{task['name']}", parse_math=False)
    kind = Path(path).suffix[1:].lower()
    try:
        # The same figures make the same file.
        with whole_file(path) as file, matplotlib.rc_context({"svg.hashsalt": "vocabdistil", "svg.fonttype": "none"}):
            figure.savefig(file, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    except OSError as error:
        raise VocabdistilError.of("picture", f"cannot write {path}: {error.strerror}") from None
