"""The alignments: match and boundary of ready tokens against plain Python and spacy-alignments, and `vocabdistil.align`
of texts against the two calls of `encode_batch` that it cannot do without (its ``reference``), for every family."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import tokenizers
import torch
from torch import Tensor

import vocabdistil as vd

from .harness import Case, Problem, Provider
from .remap import english_file, russian_file, russian_tokenizers, wordpiece, zipf_ids

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


def add_spacy(
    providers: dict[str, Provider], tokens: Callable[[], Iterable[tuple[list[str], list[str]]]]
) -> dict[str, str]:
    """Adds spacy-alignments, which reads the token strings of both sides, or tells why it is missing."""
    try:
        from spacy_alignments import get_alignments
    except ImportError:
        return {"spacy-alignments": "spacy_alignments is not installed"}
    # By characters of the token strings, so it finds other pairs: timed, not compared.
    providers["spacy-alignments"] = Provider(lambda: [get_alignments(a, b) for a, b in tokens()], None)
    return {}


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
    missing = add_spacy(providers, lambda: zip(left, right, strict=True))
    tokens = sum(map(len, teacher_rows)) + sum(map(len, student_rows))
    nbytes = 9 * (teacher_ids.numel() + student_ids.numel()) + 16 * truth[0].numel()
    return Problem(providers, lambda: truth, {"run": nbytes}, missing=missing, tokens=tokens)


def random_offsets(batch: int, length: int, longest: int, seed: int) -> Tensor:
    """int64 [batch, length, 2]: tokens of 1 to ``longest`` bytes without gaps, the last one up to byte 4096."""
    sizes = torch.randint(1, longest + 1, (batch, length), generator=torch.Generator().manual_seed(seed))
    end = sizes.cumsum(1)
    start = end - sizes
    end[:, -1] = 4096
    return torch.stack([start, end], 2)


def refinement(teacher: list[list[int]], student: list[list[int]]) -> list[tuple[int, int, int, int]]:
    """Student start and end, teacher start and end of the pieces between common ends of gapless tokens."""
    pieces, i, j, first, second = [], 0, 0, 0, 0
    while i < len(teacher) and j < len(student):
        if teacher[i][1] == student[j][1]:
            pieces.append((second, j + 1, first, i + 1))
            i, j = i + 1, j + 1
            first, second = i, j
        elif teacher[i][1] < student[j][1]:
            i += 1
        else:
            j += 1
    return pieces


def boundary_problem(teacher: Tensor, student: Tensor) -> Problem:
    widths = torch.tensor([student.shape[1], student.shape[1], teacher.shape[1], teacher.shape[1]])

    def python() -> list[list[tuple[int, int, int, int]]]:
        return [refinement(a, b) for a, b in zip(teacher.tolist(), student.tolist(), strict=True)]

    def flat(rows: list[list[tuple[int, int, int, int]]]) -> list[Tensor]:
        return [torch.cat([torch.tensor(row).view(-1, 4) + b * widths for b, row in enumerate(rows)])]

    def ours(pairs: vd.SpanPairs) -> list[Tensor]:
        fields = pairs.student_start, pairs.student_end, pairs.teacher_start, pairs.teacher_end
        return [torch.stack(fields, 1).long()]

    truth = flat(python())
    providers = {
        "python": Provider(python, flat),
        "ours": Provider(lambda: vd.boundary_pairs(teacher, student), ours),
    }
    tokens = teacher.shape[:2].numel() + student.shape[:2].numel()
    return Problem(providers, lambda: truth, {"run": 16 * tokens + 16 * len(truth[0])}, tokens=tokens)


def _boundary(device: torch.device) -> Problem:
    return boundary_problem(random_offsets(1000, 512, 8, seed=0), random_offsets(1000, 650, 6, seed=1))


LINES = 600


@functools.cache
def _lines(path: Path) -> list[str]:
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if len(line) > 20][: 5 * LINES]


@functools.cache
def _trained(name: str, path: Path) -> tokenizers.Tokenizer:
    from tests._families import FAMILIES, trained_on

    with trained_on(_lines(path)):
        return FAMILIES[name](300 if name == "byte-level small" else 4000)


def align_problem(
    teacher: tokenizers.Tokenizer, student: tokenizers.Tokenizer, texts: list[str], method: str
) -> Problem:
    def encode() -> list[list[tokenizers.Encoding]]:
        return [side.encode_batch(texts) for side in (teacher, student)]

    encodings = encode()
    truth = [_pad([e.ids for e in side])[1].long() for side in encodings]

    def ours(batch: vd.AlignedBatch) -> list[Tensor]:
        return [batch.teacher.attention_mask, batch.student.attention_mask]

    providers = {
        "reference": Provider(encode, None),
        "ours": Provider(lambda: vd.align(texts, teacher, student, method), ours),
    }
    missing = add_spacy(providers, lambda: ((a.tokens, b.tokens) for a, b in zip(*encode(), strict=True)))
    tokens = sum(int(mask.sum()) for mask in truth)
    nbytes = sum(len(text.encode()) for text in texts) + 16 * tokens
    return Problem(providers, lambda: truth, {"run": nbytes}, missing=missing, tokens=tokens)


def _texts(device: torch.device, path: Path, names: tuple[str, str], method: str) -> Problem:
    # Not the lines that the tokenizers have seen most.
    return align_problem(*(_trained(name, path) for name in names), _lines(path)[-LINES:], method)


def _text_cases() -> Iterator[Case]:
    """Each family once on either side: the costs of the sides add up."""
    from tests._families import FAMILIES

    names = list(FAMILIES)
    for language, path in (("en", english_file()), ("ru", russian_file())):
        for pair in zip(names, names[1:] + names[:1], strict=True) if path else ():
            for method in ("boundary", "word", "match"):
                build = functools.partial(_texts, path=path, names=pair, method=method)
                name = f"{method}-{language}-{'-'.join(pair).replace(' ', '_')}"
                yield Case(name, build, torch.int64, ("run",), rounds=7, seconds=0.5)


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
    yield Case("boundary-1000x512", _boundary, torch.int64, ("run",), rounds=5)
    yield Case("zipf-1000x512", _zipf, torch.int64, ("run",), rounds=5)
    if path := russian_file():
        yield Case("ru-1000-texts", functools.partial(_russian, path=path), torch.int64, ("run",), rounds=5)
    yield from _text_cases()
