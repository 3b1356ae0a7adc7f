"""The model card of a student: ``README.md`` of its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from ..core.names import display_names
from .report import held_out_rows

__all__ = ["model_card"]


def model_card(name: str, metrics: dict[str, Any]) -> str:
    """The card of the student whose folder is called ``name``.

    Args:
        metrics: what ``metrics.json`` says; see :func:`vocabdistil.distill` and :func:`vocabdistil.trim`.
    """
    parts = [_front(metrics), f"# {name}", _about(metrics), _sizes(metrics), *_figures(metrics), _use(name, metrics)]
    parts += ["## How it was made", _vocabulary(metrics), _settings(metrics)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _is_embedder(metrics: dict[str, Any]) -> bool:
    return not metrics["architecture"]["class"].endswith("ForMaskedLM")


def _front(metrics: dict[str, Any]) -> str:
    """What the Hub reads."""
    settings, embedder = metrics["settings"], _is_embedder(metrics)
    sentences = metrics.get("sentence_transformers", False)
    front: dict[str, Any] = {
        "library_name": "sentence-transformers" if sentences else "transformers",
        "pipeline_tag": "sentence-similarity" if embedder else "fill-mask",
        "base_model": [_base(teacher) for teacher in metrics["teacher"]],
        "tags": ["vocabdistil", "vocabulary-trimming" if metrics["command"] == "trim" else "distillation"],
    }
    if settings.get("language"):
        front["language"] = settings["language"]
    if settings.get("license"):
        front["license"] = settings["license"]
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip()}\n---"


def _base(teacher: str) -> str:
    """A name on the Hub as it is, a folder by its last part."""
    return Path(teacher).name if Path(teacher).exists() else teacher


def _about(metrics: dict[str, Any]) -> str:
    names = ", ".join(f"`{name}`" for name in display_names(metrics["teacher"]))
    shape, models = metrics["architecture"], metrics["models"]
    made = "trimmed" if metrics["command"] == "trim" else "distilled"
    return (
        f"`{shape['class']}` with {shape.get('layers')} layers of width {shape.get('dim')} and "
        f"{models['student']['vocab']:,} tokens, {made} by vocabdistil from {names} "
        f"({models['teacher']['vocab']:,} tokens)."
    )


def _sizes(metrics: dict[str, Any]) -> str:
    models = metrics["models"]
    rows = [
        f"| {side} | {row['parameters'] / 1e6:.2f} | {row['vocab']:,} | {row['mb']:.1f} | {row['seconds']:.3f} |"
        for side, row in ((side, models[side]) for side in ("teacher", "student"))
    ]
    head = f"CPU s (batch {models['time_batch']}, up to {models['time_length']} tokens)"
    return "\n".join([f"| | parameters, M | vocabulary | MB | {head} |", "| --- | --- | --- | --- | --- |", *rows])


def _figures(metrics: dict[str, Any]) -> list[str]:
    """What it is worth on the text."""
    if "after" in metrics:
        count = metrics["held_out_texts"]
        rows = [f"| {' | '.join(row[:3])} |" for row in held_out_rows(metrics)]
        lines = ["| | untrained | trained |", "| --- | --- | --- |", *rows]
        return [f"Held-out text ({count} texts):", "\n".join(lines)]
    rows = []
    for name, row in metrics["loyalty"].items():
        cosine = f"{row['cosine']:.4f}" if "cosine" in row else "-"
        rows.append(f"| {name} | {row['pearson']:.4f} | {row['spearman']:.4f} | {cosine} |")
    lines = ["| | Pearson | Spearman | cosine of the vectors |", "| --- | --- | --- | --- |", *rows]
    about = (
        f"Agreement with the teacher on {metrics['compared_texts']} texts of those that the vocabulary was made for "
        "(on other text it is less):"
    )
    return [about, "\n".join(lines)]


def _use(name: str, metrics: dict[str, Any]) -> str:
    # sentence-transformers puts the prompt there itself.
    prompt = "" if metrics.get("sentence_transformers") else metrics.get("prompt", "")
    texts = json.dumps([f"{prompt}{word} text" for word in ("One", "Another")], ensure_ascii=False)
    if metrics.get("sentence_transformers"):
        lines = [
            "from sentence_transformers import SentenceTransformer",
            f'model = SentenceTransformer("{name}")',
            f"print(model.similarity(*model.encode({texts})))",
        ]
    elif _is_embedder(metrics):
        lines = [
            "from transformers import AutoModel, AutoTokenizer",
            f'tokenizer, model = AutoTokenizer.from_pretrained("{name}"), {_auto(metrics)}.from_pretrained("{name}")',
            f'batch = tokenizer({texts}, padding=True, return_tensors="pt")',
            'mask = batch["attention_mask"][..., None]',
            "vectors = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)",
        ]
    else:
        lines = [
            "from transformers import AutoModelForMaskedLM, AutoTokenizer",
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
            f'model = AutoModelForMaskedLM.from_pretrained("{name}")  # AutoModel: without the head',
        ]
    return "\n".join(["## Use", "", "```python", *lines, "```"])


def _auto(metrics: dict[str, Any]) -> str:
    """AutoModel takes another class for an encoder of T5's kind."""
    shape = metrics["architecture"]["class"]
    return shape if shape.endswith("EncoderModel") else "AutoModel"


def _vocabulary(metrics: dict[str, Any]) -> str:
    kinds = metrics["initialisation"].get("tokens") or {}
    vocabulary = metrics.get("vocabulary") or {}
    lines = [f"Vocabulary: `{vocabulary['source']}`."] if vocabulary else []
    lines += vocabulary.get("notes", [])
    if kinds:
        lines.append(f"Where its tokens start from: `{json.dumps(kinds)}`.")
    return " ".join(lines)


def _settings(metrics: dict[str, Any]) -> str:
    """The options that differ from nothing, as they were given."""
    given = {key: value for key, value in metrics["settings"].items() if value not in (None, False, "", [])}
    return (
        f"Settings: `{json.dumps(given, ensure_ascii=False)}`. `metrics.json` has all figures, `remap.vdrt` maps the "
        "teacher's tokens to the student's, `projection.safetensors`, if there, its hidden states to the teacher's "
        "(`[D_t, D_s]`)."
    )
