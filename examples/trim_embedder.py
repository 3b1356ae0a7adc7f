"""A sentence-transformers model becomes smaller without training, and stays one.

    python examples/trim_embedder.py sentence-transformers/all-MiniLM-L6-v2 my-texts.txt small

Its vocabulary shrinks to the tokens that the texts need, half of its layers are left out, and the others are fitted
to the whole model. The result loads with ``SentenceTransformer``, pooling, prompts and normalisation included.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sentence_transformers import SentenceTransformer
from torch import Tensor

import vocabdistil as vd


def parameters(model: SentenceTransformer) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def main(teacher: str, texts: str, out: str, vocab_size: int = 2000, layers: int = 3) -> tuple[float, float]:
    """Returns how much of the parameters is left, and the mean cosine between vectors of both models."""
    vd.trim(teacher=teacher, text=texts, out=out, vocab_size=vocab_size, layers=layers, quiet=True)
    large, small = SentenceTransformer(teacher, device="cpu"), SentenceTransformer(out, device="cpu")
    lines = Path(texts).read_text(encoding="utf-8").splitlines()[:64]
    theirs, ours = (model.encode(lines, convert_to_tensor=True, normalize_embeddings=True) for model in (large, small))
    assert isinstance(theirs, Tensor) and isinstance(ours, Tensor)
    return parameters(small) / parameters(large), float((theirs * ours).sum(-1).mean())


if __name__ == "__main__":
    left, cosine = main(*sys.argv[1:4])
    print(f"{left:.0%} of the parameters, mean cosine to the whole model's vectors {cosine:.3f}")
