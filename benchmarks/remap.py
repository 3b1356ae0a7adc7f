"""The remap table against plain Python: building it, and remapping made-up and Russian ids (on a GPU: and PyTorch)."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from vocabdistil.alignment.remap import RemapOutput, RemapTable

from .harness import Case, Problem, Provider, own_providers

OPERATION = "remap"
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_LETTERS = "etaoinshrdlucmfwypvbgkjqxz"


def wordpiece(size: int) -> tokenizers.Tokenizer:
    """A WordPiece tokenizer of ``size`` tokens: letters first, then all strings of letters by length."""
    tokens = [*SPECIALS, *_LETTERS, *("##" + letter for letter in _LETTERS)]
    longer = ("".join(c) for n in itertools.count(2) for c in itertools.product(_LETTERS, repeat=n))
    for i, text in enumerate(itertools.islice(longer, size - len(tokens))):
        tokens.append(text if i % 2 else "##" + text)
    return tokenizers.Tokenizer(models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]"))


def zipf_ids(batch: int, length: int, vocab: int, seed: int = 0) -> Tensor:
    """int64 [batch, length]: id r about as often as 1 / (r + 1)."""
    uniform = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (vocab**uniform).long().clamp_(max=vocab) - 1


def _data_file(name: str) -> Path | None:
    folder = os.environ.get("VOCABDISTIL_DATA")
    path = Path(folder) / name if folder else None
    return path if path and path.is_file() else None


def russian_file() -> Path | None:
    """The Russian text, if the environment variable VOCABDISTIL_DATA names a folder that holds it."""
    return _data_file("war_and_peace_ru.txt")


def english_file() -> Path | None:
    """The English text, in the same folder."""
    return _data_file("shakespeare_en.txt")


@functools.cache
def russian_tokenizers(path: Path) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
    """WordPiece tokenizers of 30,000 and 5,000 tokens, trained on the text."""
    made = []
    for size in (30_000, 5_000):
        tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        options = {"vocab_size": size, "special_tokens": list(SPECIALS), "show_progress": False}
        tokenizer.train([str(path)], trainers.WordPieceTrainer(**options))
        made.append(tokenizer)
    return made[0], made[1]


def _row(token: str, vocab: dict[str, int]) -> list[int]:
    """Greedy longest match from the left, UNK where a character cannot be covered."""
    row, inside = [], token.startswith("##")
    text = token[2:] if inside else token
    while text:
        lead = "##" if inside else ""
        size = next((n for n in range(len(text), 0, -1) if lead + text[:n] in vocab), 0)
        if not size:
            return [vocab["[UNK]"]]
        row.append(vocab[lead + text[:size]])
        text, inside = text[size:], True
    return row


def _python_table(teacher: tokenizers.Tokenizer, student: tokenizers.Tokenizer) -> list[list[int]]:
    vocab = student.get_vocab()
    ordered = sorted(teacher.get_vocab().items(), key=lambda item: item[1])
    return [[vocab[token]] if token in SPECIALS else _row(token, vocab) for token, _ in ordered]


def _csr(rows: list[list[int]]) -> list[Tensor]:
    sizes = torch.tensor([0, *map(len, rows)])
    return [sizes.cumsum(0), torch.tensor(list(itertools.chain.from_iterable(rows)))]


def _build_table(device: torch.device) -> Problem:
    teacher, student = wordpiece(120_000), wordpiece(5_000)
    truth = _csr(_python_table(teacher, student))
    providers = {
        "python": Provider(lambda: _python_table(teacher, student), _csr),
        "ours": Provider(lambda: RemapTable.from_tokenizers(teacher, student), lambda table: [table.indptr, table.ids]),
    }
    return Problem(providers, lambda: truth, {"run": 4 * sum(x.numel() for x in truth)})


def _padded(rows: list[list[int]], pad_id: int) -> list[Tensor]:
    width = max(map(len, rows))
    return [torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])]


def remap_problem(table: RemapTable, ids: Tensor) -> Problem:
    mask = torch.ones_like(ids)
    by_id, lists = [table.rows(t) for t in range(len(table))], ids.tolist()

    def loop() -> list[list[int]]:
        return [[piece for t in row for piece in by_id[t]] for row in lists]

    def spans(out: RemapOutput) -> list[Tensor]:
        sizes = (out.pairs.student_end - out.pairs.student_start).view(ids.shape)
        return [out.input_ids, sizes.sum(1), out.attention_mask.sum(1)]

    def python_spans(rows: list[list[int]]) -> list[Tensor]:
        lengths = torch.tensor([*map(len, rows)])
        return [*_padded(rows, table.pad_id), lengths, lengths]

    truth = python_spans(loop())
    nbytes = 8 * (ids.numel() + mask.numel() + 2 * truth[0].numel()) + 16 * ids.numel()
    providers = {
        "python": Provider(loop, python_spans),
        "ours": Provider(lambda: table.remap(ids, mask), spans),
    }
    return Problem(providers, lambda: truth, {"run": nbytes}, tokens=ids.numel())


def fixed_problem(table: RemapTable, ids: Tensor, device: torch.device) -> Problem:
    """On a device, with a width that is given: nothing is read back. Plain PyTorch is what to beat."""
    exact = table.remap(ids)
    width = exact.input_ids.shape[1]
    truth = [exact.input_ids, exact.attention_mask, exact.pairs.student_start, exact.pairs.student_end]
    ids = ids.to(device)
    mask = torch.ones_like(ids)

    def provider(backend: str | None) -> Provider:
        return Provider(lambda: table.remap(ids, mask, width, backend), fields)

    def fields(out: RemapOutput) -> list[Tensor]:
        return [x.cpu() for x in (out.input_ids, out.attention_mask, out.pairs.student_start, out.pairs.student_end)]

    nbytes = (8 + 8 + 16) * ids.numel() + 16 * truth[0].numel()
    here, missing = own_providers(OPERATION, device)
    providers = {name: provider(backend) for name, backend in here.items() if backend != "torch"}
    providers["reference"] = provider("torch")
    return Problem(providers, lambda: truth, {"run": nbytes}, missing=missing, tokens=ids.numel())


def _zipf(device: torch.device, batch: int = 1000, length: int = 512) -> Problem:
    table = RemapTable.from_tokenizers(wordpiece(120_000), wordpiece(5_000))
    ids = zipf_ids(batch, length, len(table))
    return remap_problem(table, ids) if device.type == "cpu" else fixed_problem(table, ids, device)


def _russian(device: torch.device, path: Path) -> Problem:
    teacher, student = russian_tokenizers(path)
    ids = teacher.encode(path.read_text(encoding="utf-8"), add_special_tokens=False).ids
    repeated = itertools.islice(itertools.cycle(ids), 1000 * 512)
    return remap_problem(RemapTable.from_tokenizers(teacher, student), torch.tensor([*repeated]).view(1000, 512))


def cases(device: torch.device) -> Iterator[Case]:
    if device.type != "cpu":
        for batch, length in ((32, 256), (2048, 512), (8, 131072)):
            build = functools.partial(_zipf, batch=batch, length=length)
            yield Case(f"zipf-{batch}x{length}", build, torch.int64, ("run",))
        return
    yield Case("build-120000", _build_table, torch.int32, ("run",))
    yield Case("zipf-1000x512", _zipf, torch.int64, ("run",))
    if path := russian_file():
        yield Case("ru-1000x512", functools.partial(_russian, path=path), torch.int64, ("run",))
