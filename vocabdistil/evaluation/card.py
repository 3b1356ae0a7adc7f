"""The model card of a student: ``README.md`` of its folder."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..core.names import display_names
from .report import NEXT_TOKENS, draft_line, held_out_rows

__all__ = ["causal_card", "draft_card", "model_card"]


def model_card(
    name: str,
    metrics: dict[str, Any],
    files: Sequence[str] | None = None,
    made: tuple[str, str] | None = None,
    stated: str | None = None,
) -> str:
    """The card of the student whose folder is called ``name``.

    Args:
        metrics: what ``metrics.json`` says, see :mod:`vocabdistil.evaluation.metrics`.
        files: the text that it was made from, if it came from files.
        made: the language and the text of the command that made it.
        stated: the licence that the cards of its teachers state, for where none was named.
    """
    licence = _line(metrics["settings"].get("license") or stated or "")
    parts = [_front(metrics, files, licence), f"# {_named(name)}", _about(metrics)]
    parts += ["## Use", _use(name, metrics), "## Intended use and limits", _limits(metrics, licence)]
    parts += ["## Scores", *_scores(metrics), _sizes(metrics)]
    parts += ["## How it was made", _data(metrics, files), _vocabulary(metrics)]
    parts += [_block(*made)] if made else []
    parts += [_settings(metrics)]
    return "\n\n".join(part for part in parts if part) + "\n"


def draft_card(
    name: str,
    metrics: dict[str, Any],
    files: Sequence[str] | None = None,
    made: tuple[str, str] | None = None,
    stated: str | None = None,
) -> str:
    """The card of a draft head; arguments as those of :func:`model_card`."""
    target, settings = metrics["teacher"][0], metrics["settings"]
    front = {
        "base_model": _known_bases(metrics["teacher"]),
        "license": _line(settings.get("license") or stated or ""),
        "tags": ["vocabdistil", "speculative-decoding"],
    }
    folder = json.dumps(f"{name}/model.safetensors", ensure_ascii=False)
    use = [
        "import torch",
        "from safetensors.torch import load_file",
        f"head = load_file({folder})",
        'ids = torch.arange(len(head["d2t"])) + head["d2t"]  # the target\'s id of each row of lm_head.weight',
        'assert torch.equal(head["t2d"].nonzero()[:, 0], ids)',
    ]
    parts = [
        _front_block(front),
        f"# {_named(name)}",
        f"A draft head for speculative decoding, made by vocabdistil: the rows of the output layer of {_code(target)} "
        "for the tokens that a text needs most, and the maps between their ids and the target's. Input embeddings are "
        "the target's. It is a start for the output layer of a draft model of EAGLE-3's kind, which is trained "
        "elsewhere.",
        "## Use",
        _block("python", "\n".join(use)),
        "## Scores",
        f"{draft_line(metrics['draft'], metrics['held_out_texts'])}.",
        "## How it was made",
        _data(metrics, files),
        *([_block(*made)] if made else []),
    ]
    return "\n\n".join(parts) + "\n"


def causal_card(
    name: str,
    metrics: dict[str, Any],
    files: Sequence[str] | None = None,
    made: tuple[str, str] | None = None,
    stated: str | None = None,
) -> str:
    """The card of a decoder that another one taught; arguments as those of :func:`model_card`."""
    settings, bits, columns = metrics["settings"], metrics["bits_per_byte"], ("teacher", "before", "after")
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": _known_bases([metrics["student"]]),
        "language": [_line(code) for code in settings.get("language") or ()],
        "license": _line(settings.get("license") or stated or ""),
        "text_files": [_line(Path(file).name) for file in files or ()],
        "tags": ["vocabdistil", "distillation"],
    }
    use = [
        "from transformers import pipeline",
        f'write = pipeline("text-generation", model={json.dumps(name, ensure_ascii=False)})',
        'print(write("One text", max_new_tokens=20)[0]["generated_text"])',
    ]
    names = ", ".join(_code(file) for file in display_names(metrics["teacher"]))
    weights = ", ".join(f"{loss} {value:g}" for loss, value in metrics["weights"].items() if value)
    texts = ", ".join(_code(Path(file).name) for file in files) if files else "given in Python"
    parts = [
        _front_block(front),
        f"# {_named(name)}",
        f"{_code(metrics['student'])}, taught by vocabdistil from {names}, which reads text in other tokens.",
        "## Use",
        _block("python", "\n".join(use)),
        "## Scores",
        f"Bits per byte of held-out text ({metrics['held_out_texts']} texts; less is better):",
        _table(("", *columns), [("bits per byte", *(f"{bits[k]:.4f}" for k in columns))]),
        "## How it was made",
        f"Text: {texts}; {metrics['train_texts']:,} texts to train on. Losses: {weights}.",
        *([_block(*made)] if made else []),
    ]
    return "\n\n".join(parts) + "\n"


def _line(text: str) -> str:
    """Text without line breaks, of which YAML and Markdown have ideas of their own."""
    return " ".join(text.split())


def _code(text: str) -> str:
    """Code inside a line, whatever is in it."""
    text = _line(text)
    ticks = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{ticks} {text} {ticks}" if text[:1] == "`" or text[-1:] == "`" else f"{ticks}{text}{ticks}"


def _block(language: str, text: str) -> str:
    """A block of code, whatever is in it."""
    ticks = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
    return f"{ticks}{language}\n{text}\n{ticks}"


def _named(text: str) -> str:
    """A name as text if it has nothing that Markdown would take for something else."""
    return text if re.fullmatch(r"[\w. -]+", text) else _code(text)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(_line(cell).replace('|', chr(92) + '|') for cell in cells)} |"

    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])


def _writes(metrics: dict[str, Any]) -> bool:
    """Whether it is a decoder."""
    return "next_tokens" in metrics


def _fills_masks(metrics: dict[str, Any]) -> bool:
    """Whether it is there to guess hidden words: it has the head for it, and its teacher was not one for vectors."""
    if _writes(metrics):
        return False
    head = metrics["architecture"]["class"].endswith("ForMaskedLM")
    rows = [metrics["after"]] if "after" in metrics else metrics["loyalty"].values()
    # Without a token to hide words with no guesses were compared.
    return head and not metrics["sentence_transformers"] and any("mlm" in row or "label" in row for row in rows)


def _front(metrics: dict[str, Any], files: Sequence[str] | None, licence: str) -> str:
    """What the Hub reads. It takes ``datasets`` for names there, so files have a key of their own."""
    settings, masks, writes = metrics["settings"], _fills_masks(metrics), _writes(metrics)
    sentences = metrics["sentence_transformers"]
    front = {
        "library_name": "sentence-transformers" if sentences else "transformers",
        "pipeline_tag": "text-generation" if writes else "fill-mask" if masks else "sentence-similarity",
        "base_model": _known_bases(metrics["teacher"]),
        "language": [_line(code) for code in settings.get("language") or ()],
        "license": licence,
        "text_files": [_line(Path(name).name) for name in files or ()],
        "tags": [
            "vocabdistil",
            "vocabulary-trimming" if metrics["command"] == "trim" else "distillation",
            *([] if masks or writes else ["feature-extraction"]),
        ],
    }
    return _front_block(front)


def _known_bases(teachers: Sequence[str]) -> list[str]:
    """The Hub takes ``base_model`` for a model's name there, so a folder is left out, and what it would refuse."""
    bases = [name for name in teachers if not Path(name).exists()]
    return [base for base in bases if re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", base, re.ASCII)]


def _front_block(front: dict[str, Any]) -> str:
    front = {key: value for key, value in front.items() if value}
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip()}\n---"


def _about(metrics: dict[str, Any]) -> str:
    names = ", ".join(map(_code, display_names(metrics["teacher"])))
    shape, models = metrics["architecture"], metrics["models"]
    made = "trimmed" if metrics["command"] == "trim" else "distilled"
    return (
        f"`{shape['class']}` with {shape.get('layers')} layers of width {shape.get('dim')} and "
        f"{models['student']['vocab']:,} tokens, {made} by vocabdistil from {names} "
        f"({models['teacher']['vocab']:,} tokens)."
    )


def _limits(metrics: dict[str, Any], licence: str) -> str:
    bases = " and ".join(map(_code, display_names(metrics["teacher"])))
    languages = ", ".join(metrics["settings"].get("language") or ())
    text = f"text in {_code(languages)}" if languages else "text like that which it was made from"
    does = "Vectors of texts: to compare, search and group them"
    if _fills_masks(metrics):
        does = "To guess hidden words, and as a start for fine-tuning"
    elif _writes(metrics):
        does = "To continue texts and conversations"
    lines = [
        f"{does}, in {text}, where {bases} would be too large or too slow.",
        "Its vocabulary was made for that text: other languages, scripts and subjects fall into more and rarer pieces, "
        "and what it says of them is worth less.",
        f"It has what {bases} learned, mistakes and prejudices included, and at most what it knew.",
        "The scores below say how far it agrees with its teacher, not how well it does a task: measure yours.",
    ]
    if not licence:
        lines.append("No licence was named; that of the base model and of the text hold in any case.")
    lines += metrics.get("warnings", [])
    return "\n".join(f"- {_line(line)}" for line in lines)


def _sizes(metrics: dict[str, Any]) -> str:
    models = metrics["models"]
    rows = [
        (side, f"{row['parameters'] / 1e6:.2f}", f"{row['vocab']:,}", f"{row['mb']:.1f}", f"{row['seconds']:.3f}")
        for side, row in ((side, models[side]) for side in ("teacher", "student"))
    ]
    time = f"one pass on the CPU, s (batch {models['time_batch']}, up to {models['time_length']} tokens)"
    return _table(("", "parameters, M", "vocabulary", "MB", time), rows)


def _scores(metrics: dict[str, Any]) -> list[str]:
    """What it is worth on the text, beside what is known of others."""
    baselines = metrics.get("baselines", {})
    if "after" in metrics:
        rows = [(f"{label} ({better} is better)", *values) for label, *values, better in held_out_rows(metrics)]
        table = _table(("", "untrained", "trained", *baselines), rows)
        return [f"Held-out text ({metrics['held_out_texts']} texts):", table]
    about = (
        f"Agreement with the teacher on {metrics['compared_texts']} texts of those that the vocabulary was made for "
        "(on other text it is less):"
    )
    if _writes(metrics):
        found = metrics["next_tokens"]
        worth = [("bits per byte", *(f"{found[key]:.4f}" for key in ("teacher_bits_per_byte", "bits_per_byte")))]
        worth += [(label, "", form.format(found[key])) for key, label, form in NEXT_TOKENS if key in found]
        return [about, _table(("", "teacher", "student"), worth)]
    measures = {
        "pearson": "regression loyalty: Pearson", "spearman": "Spearman", "cosine": "cosine of the vectors"
    }  # fmt: skip
    rows = [
        (name, *(f"{row[key]:.4f}" if key in row else "-" for key in measures))
        for name, row in (metrics["loyalty"] | baselines).items()
    ]
    return [about, _table(("", *measures.values()), rows)]


def _use(name: str, metrics: dict[str, Any]) -> str:
    """Code that runs where the folder lies."""
    # A JSON string is one of Python too.
    folder = json.dumps(name, ensure_ascii=False)
    # sentence-transformers puts the prompt there itself.
    prompt = "" if metrics["sentence_transformers"] else metrics["prompt"]
    texts = json.dumps([f"{prompt}{word} text" for word in ("One", "Another")], ensure_ascii=False)
    if _writes(metrics):
        lines = [
            "from transformers import pipeline",
            f'write = pipeline("text-generation", model={folder})',
            f'print(write({texts}[0], max_new_tokens=20)[0]["generated_text"])',
        ]
    elif metrics["sentence_transformers"]:
        lines = [
            "from sentence_transformers import SentenceTransformer",
            f"model = SentenceTransformer({folder})",
            f"print(model.similarity(*model.encode({texts})))",
        ]
    elif _fills_masks(metrics):
        before = json.dumps(f"{prompt}One ", ensure_ascii=False)
        lines = [
            "from transformers import pipeline",
            f'fill = pipeline("fill-mask", model={folder})',
            f'print(fill({before} + fill.tokenizer.mask_token + " text"))',
        ]
    else:
        # AutoModel takes another class for an encoder of T5's kind.
        shape = metrics["architecture"]["class"]
        model = shape if shape.endswith("EncoderModel") else "AutoModel"
        lines = [
            "import torch",
            f"from transformers import {', '.join(sorted(('AutoTokenizer', model)))}",
            f"tokenizer, model = AutoTokenizer.from_pretrained({folder}), {model}.from_pretrained({folder})",
            f'batch = tokenizer({texts}, padding=True, truncation=True, return_tensors="pt")',
            'mask = batch["attention_mask"][..., None]',
            "vectors = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)",
            "print(torch.cosine_similarity(*vectors, dim=0))",
        ]
    return _block("python", "\n".join(lines))


def _data(metrics: dict[str, Any], files: Sequence[str] | None) -> str:
    count = metrics["texts"] if "texts" in metrics else metrics["train_texts"]
    names = ", ".join(_code(Path(name).name) for name in files) if files else "given in Python"
    done = "read" if metrics["command"] == "trim" else "trained on"
    prompt = f" Before each stands {_code(metrics['prompt'])}." if metrics["prompt"].strip() else ""
    return f"Text: {names}; {count:,} texts {done}.{prompt}"


def _vocabulary(metrics: dict[str, Any]) -> str:
    kinds = metrics["initialisation"].get("tokens") or {}
    vocabulary = metrics.get("vocabulary") or {}
    lines = [f"Vocabulary: {_code(vocabulary['source'])}."] if vocabulary else []
    lines += vocabulary.get("notes", [])
    if metrics["whitened"]:
        lines.append(
            "The vectors were whitened in part on the text (arXiv 2103.15316): they are not comparable with those of "
            "the base model."
        )
    if kinds:
        lines.append(f"Where its tokens start from: {_code(json.dumps(kinds))}.")
    return " ".join(lines)


def _settings(metrics: dict[str, Any]) -> str:
    given = {key: value for key, value in metrics["settings"].items() if value is not None}
    return (
        f"All settings: {_code(json.dumps(given, ensure_ascii=False))}. `metrics.json` has all figures, `remap.vdrt` "
        "maps the teacher's tokens to the student's, `projection.safetensors`, if there, its hidden states to the "
        "teacher's (`[D_t, D_s]`)."
    )
