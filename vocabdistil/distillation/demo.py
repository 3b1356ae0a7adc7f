"""The demonstration: text from a small grammar, a teacher trained on it, a student with a sixth of its vocabulary."""

from __future__ import annotations

import os
import random
import shlex
from pathlib import Path
from typing import Any

from ..core.clock import one_clock
from ..core.console import Reporter
from ..core.errors import VocabdistilError
from ..core.files import told, whole_file
from ..models.presets import Preset
from .folder import DistillResult
from .job import distill
from .options import DemoOptions, DistillConfig
from .pretraining import train_teacher

__all__ = ["demo", "demo_text"]

# Each theme has its places, people, things, deeds (present, past) and qualities: a masked word can be guessed from the
# others, so there is something to learn. Things of one theme join into compounds, which makes the vocabulary large.
_THEMES = (
    (
        ("harbour", "pier", "lighthouse", "bay", "shore"),
        ("sailor", "fisher", "captain", "diver", "pilot"),
        ("boat", "net", "rope", "anchor", "sail", "oar", "mast", "wave", "fish", "shell", "sand", "tide"),
        (("mends", "mended"), ("hauls", "hauled"), ("lowers", "lowered"), ("watches", "watched"), ("ties", "tied")),
        ("salty", "windy", "wet", "rusty", "calm", "stormy"),
    ),
    (
        ("kitchen", "bakery", "cellar", "market", "pantry"),
        ("baker", "cook", "brewer", "grocer", "waiter"),
        ("bread", "oven", "flour", "butter", "salt", "apple", "kettle", "spoon", "honey", "soup", "cheese", "plum"),
        (("bakes", "baked"), ("stirs", "stirred"), ("tastes", "tasted"), ("slices", "sliced"), ("serves", "served")),
        ("sweet", "fresh", "warm", "bitter", "ripe", "spicy"),
    ),
    (
        ("garden", "orchard", "meadow", "greenhouse", "hill"),
        ("gardener", "farmer", "shepherd", "botanist", "beekeeper"),
        ("seed", "rose", "hedge", "root", "leaf", "berry", "bee", "grass", "branch", "moss", "soil", "thorn"),
        (("plants", "planted"), ("waters", "watered"), ("trims", "trimmed"), ("picks", "picked"), ("digs", "dug")),
        ("green", "wild", "shady", "muddy", "tender", "tall"),
    ),
    (
        ("workshop", "forge", "sawmill", "factory", "studio"),
        ("smith", "carpenter", "potter", "weaver", "engineer"),
        ("hammer", "nail", "wheel", "board", "wire", "clay", "loom", "gear", "steel", "thread", "glass", "saw"),
        (("builds", "built"), ("bends", "bent"), ("shapes", "shaped"), ("repairs", "repaired"), ("cuts", "cut")),
        ("heavy", "sturdy", "rough", "hot", "polished", "broken"),
    ),
    (
        ("library", "school", "archive", "museum", "theatre"),
        ("writer", "teacher", "scholar", "printer", "actor"),
        ("book", "page", "ink", "letter", "story", "map", "song", "word", "paper", "mask", "scroll", "verse"),
        (("reads", "read"), ("copies", "copied"), ("learns", "learned"), ("sorts", "sorted"), ("recites", "recited")),
        ("old", "quiet", "dusty", "famous", "clever", "forgotten"),
    ),
)  # fmt: skip
_TIMES = ("in the morning", "at noon", "in the evening", "before winter", "after the rain", "every spring")
_NAMES = (
    "Ada", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo", "Irina", "Jonas", "Katya", "Leo", "Marta",
    "Nils", "Olga", "Pavel", "Rosa", "Stefan", "Tanya", "Viktor",
)  # fmt: skip


def demo_text(lines: int = 8000, seed: int = 0) -> list[str]:
    """Sentences of a small grammar, the same for the same arguments on every version of Python."""
    draw = random.Random(seed)

    def pick(options):
        return options[int(draw.random() * len(options))]

    def thing(things: tuple[str, ...], qualities: tuple[str, ...]) -> str:
        noun = pick(things) if draw.random() < 0.6 else pick(things) + pick(things)
        return f"{pick(qualities)} {noun}" if draw.random() < 0.5 else noun

    text = []
    for _ in range(lines):
        places, people, things, deeds, qualities = pick(_THEMES)
        past = int(draw.random() < 0.5)
        who = pick(_NAMES) if draw.random() < 0.3 else f"the {pick(people)}"
        sentence = f"{who} {pick(deeds)[past]} the {thing(things, qualities)}"
        shape = draw.random()
        if shape < 0.3:
            sentence += f" in the {pick(places)} {pick(_TIMES)}"
        elif shape < 0.55:
            sentence += f" and the {pick(people)} {pick(deeds)[past]} a {thing(things, qualities)}"
            sentence += f" near the {pick(places)}"
        elif shape < 0.75:
            sentence = f"{pick(_TIMES)} {sentence}, because the {pick(things)} {('is', 'was')[past]} {pick(qualities)}"
        else:
            sentence += f" with a {thing(things, qualities)} from the {pick(places)}"
        text.append(sentence[0].upper() + sentence[1:] + ".")
    return text


def demo(
    out: str | Path, seed: int = 0, resume: bool = False, overwrite: bool = False, quiet: bool = False
) -> DistillResult:
    """Writes ``out/text.txt``, ``out/teacher`` and ``out/student``; two minutes on two cores, nothing downloaded.

    Args:
        resume: go on with a demo that was interrupted.

    Raises:
        VocabdistilError: ``out/teacher`` or ``out/student`` exists and is not to be replaced, there is nothing to
            resume, or ``out/text.txt`` is another text.
    """
    options = DemoOptions(out, seed, resume, overwrite, quiet)
    options.look()
    with one_clock():
        return _run(options)


def _run(options: DemoOptions) -> DistillResult:
    out, seed = Path(options.out), options.seed
    say, text = Reporter(options.quiet), out / "text.txt"
    data = ("\n".join(demo_text(seed=seed)) + "\n").encode()
    if not os.path.lexists(text):
        with told("out", out):
            out.mkdir(parents=True, exist_ok=True)
            with whole_file(text) as file:
                file.write(data)
    elif not text.is_file() or text.read_bytes() != data:
        raise VocabdistilError.of("out", f"{text} is not the text of this demo; name another folder")
    say.status("A teacher: BERT, 4 layers, width 192, trained on 8,000 generated sentences")
    common: dict[str, Any] = {"text": text, "seed": seed, "overwrite": options.overwrite, "quiet": options.quiet}
    common["max_length"] = 48
    if not options.has_teacher:
        size: dict[str, Any] = {"vocab_size": 1200, "layers": 4, "dim": 192, "heads": 6}
        train_teacher(out=out / "teacher", **size, steps=400, lr=1e-3, resume=options.resume, **common)
    say.status("A student: DistilBERT, 2 layers, width 96, with its own vocabulary of 200 tokens")
    made = distill(
        DistillConfig(
            teacher=out / "teacher",
            out=out / "student",
            vocabulary="train",
            preset=Preset(layers=2, dim=96, heads=6, ffn=288, vocab_size=200),
            steps=400,
            lr=1e-3,
            time_length=48,
            resume=options.began_student,
            **common,
        )
    )
    other = shlex.join(["--teacher", str(out / "teacher"), "--text", str(text), "--out", "small"])
    say.print(f"Or make another without training: vocabdistil trim {other} --vocab-size 600 --layers 2")
    return made
