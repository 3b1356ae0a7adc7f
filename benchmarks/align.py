"""The match alignment (`vocabdistil.match_pairs`) against plain Python and spacy-alignments."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import tokenizers
import torch
from torch import Tensor

import vocabdistil as vd

from .harness import Case, Problem, Provider
from .remap import russian_file, russian_tokenizers, wordpiece, zipf_ids

OPERATION = "align"
Rows = list[list[str]]


def greedy(teacher: Rows, student: Rows) -> list[tuple[int, int, int]]:
    """(sequence, teacher position, student position): for each teacher token the next equal student token."""
    pairs = []
    for b, (left, right) in enumerate(zip(teacher, student, strict=True)):
        last = -1
        for i, token in enumerate(left):
            try:
                last = right.index(token, last + 1)
            except ValueError:
                continue
            pairs.append((b, i, last))
    return pairs


def _pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return ids, torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]


def match_problem(
    teacher: tokenizers.Tokenizer,
    student: tokenizers.Tokenizer,
    teacher_rows: list[list[int]],
    student_rows: list[list[int]],
) -> Problem:
    matched = vd.MatchedVocab.from_tokenizers(teacher, student)
    sides = [_pad(teacher_rows), _pad(student_rows)]
    (teacher_ids, teacher_mask), (student_ids, student_mask) = sides
    left = [[teacher.id_to_token(i) for i in row] for row in teacher_rows]
    right = [[student.id_to_token(i) for i in row] for row in student_rows]

    def flat(found: list[tuple[int, int, int]]) -> list[Tensor]:
        b, i, j = torch.tensor(found).view(-1, 3).unbind(1)
        return [b * teacher_ids.shape[1] + i, b * student_ids.shape[1] + j]

    truth = flat(greedy(left, right))
    providers = {
        "python": Provider(lambda: greedy(left, right), flat),
        "ours": Provider(
            lambda: vd.match_pairs(teacher_ids, student_ids, matched, teacher_mask, student_mask),
            lambda pairs: [pairs.teacher_start, pairs.student_start],
        ),
    }
    missing = {}
    try:
        from spacy_alignments import get_alignments
    except ImportError:
        missing["spacy-alignments"] = "spacy_alignments is not installed"
    else:
        # By characters, so it finds other pairs: timed, not compared.
        providers["spacy-alignments"] = Provider(
            lambda: [get_alignments(a, b) for a, b in zip(left, right, strict=True)], None
        )
    tokens = sum(map(len, teacher_rows)) + sum(map(len, student_rows))
    nbytes = 9 * (teacher_ids.numel() + student_ids.numel()) + 16 * truth[0].numel()
    return Problem(providers, lambda: truth, {"run": nbytes}, missing=missing, tokens=tokens)


def _zipf(device: torch.device) -> Problem:
    teacher, student = wordpiece(120_000), wordpiece(5_000)
    teacher_ids = zipf_ids(1000, 512, 120_000)
    table = vd.RemapTable.from_tokenizers(teacher, student)
    student_rows = [[piece for t in row for piece in table.rows(t)] for row in teacher_ids.tolist()]
    return match_problem(teacher, student, teacher_ids.tolist(), student_rows)


def _russian(device: torch.device, path: Path) -> Problem:
    """1000 stretches of the text of equally many words, about 512 teacher tokens each."""
    teacher, student = russian_tokenizers(path)
    words = path.read_text(encoding="utf-8").split()
    size = len(words) // 1000
    texts = [" ".join(words[i : i + size]) for i in range(0, size * 1000, size)]
    rows = [[e.ids for e in side.encode_batch(texts)] for side in (teacher, student)]
    return match_problem(teacher, student, *rows)


def cases(device: torch.device) -> Iterator[Case]:
    if device.type != "cpu":
        return
    yield Case("zipf-1000x512", _zipf, torch.int64, ("run",), rounds=5)
    if path := russian_file():
        yield Case("ru-1000-texts", functools.partial(_russian, path=path), torch.int64, ("run",), rounds=5)
