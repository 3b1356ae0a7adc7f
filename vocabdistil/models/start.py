"""The student's start: which of the teacher's rows each row of the student's embedding and output layer begins as."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..alignment.families import TokenizerInfo, pairs_by_role
from ..alignment.remap import RemapTable
from ..alignment.surfaces import UNKNOWN, Known, known, word_form
from ..alignment.vocab import matched_ids
from ..core.errors import need

__all__ = ["COMPOSED", "KINDS", "NONE", "ROLE", "SHARED", "Start", "plan_start"]

KINDS = ("shared", "role", "composed", "none")
SHARED, ROLE, COMPOSED, NONE = range(4)
_BLOCK = 8192  # rows that are widened at a time: a copy of a large table would take longer than the sums


@dataclass(frozen=True)
class Start:
    """For each student token the teacher's tokens whose rows it starts from.

    Attributes:
        kind: uint8 ``[V_s]``, indices into ``KINDS``: the teacher's own token (``SHARED``), the teacher's special or
            added token of the same role or string (``ROLE``), a weighted mean of the teacher's pieces (``COMPOSED``),
            or nothing (``NONE``, ids without a token included).
        indptr, ids: the teacher ids of student token ``s`` are ``ids[indptr[s]:indptr[s + 1]]``; int64 ``[V_s + 1]``
            and ``[nnz]``.
        weights: of each of them in the mean, float32 ``[nnz]``; they add up to 1 for each student token that has any.
        teacher_size: the teacher tokenizer's largest id + 1; rows beyond are padding.
        tokens: how many of the V_s ids stand for a token.
        seed: of the noise.
    """

    kind: Tensor
    indptr: Tensor
    ids: Tensor
    weights: Tensor
    teacher_size: int
    tokens: int
    seed: int

    def __len__(self) -> int:
        return self.kind.numel()

    @torch.no_grad()
    def rows(self, matrix: Tensor) -> Tensor:
        """The student's rows of an embedding, an output weight or an output bias.

        A token without teacher tokens takes the mean of all rows, and in a matrix a tenth of their standard deviation
        as noise, the same for every matrix of a width.

        Args:
            matrix: the teacher's, ``[rows, D]`` or ``[rows]`` of any floating dtype; at least ``teacher_size`` rows.

        Returns:
            float32 ``[V_s, D]`` or ``[V_s]``, on the matrix's device.

        Raises:
            VocabdistilError: fewer rows than the teacher's tokenizer has ids.
        """
        size = self.teacher_size
        need(matrix.shape[0] >= size, "teacher", f"a row for each of its tokenizer's {size} ids", matrix.shape[0])
        table = matrix.detach()[:size]
        flat = table if table.dim() == 2 else table.unsqueeze(1)
        device = matrix.device
        used, at = self.ids.unique(return_inverse=True)
        bags = at.to(device), flat[used.to(device)].float(), self.indptr[:-1].to(device)
        rows = nn.functional.embedding_bag(*bags, mode="sum", per_sample_weights=self.weights.to(device))
        bare = (self.kind == NONE).nonzero()[:, 0]
        if len(bare):
            mean = sum(block.float().sum(0) for block in flat.split(_BLOCK)) / size
            fresh = mean.expand(len(bare), -1)
            if table.dim() == 2:
                squares = sum((block.float() - mean).square().sum(0) for block in flat.split(_BLOCK))
                noise = torch.randn(len(bare), flat.shape[1], generator=torch.Generator().manual_seed(self.seed))
                fresh = fresh + 0.1 * (squares / size).sqrt() * noise.to(device)
            rows[bare.to(device)] = fresh
        return rows if table.dim() == 2 else rows[:, 0]

    def summary(self, counts: Tensor | None = None) -> dict[str, dict[str, float]]:
        """How many tokens start in which way.

        Args:
            counts: how often each student token stands in a text, ``[V_s]``.

        Returns:
            ``tokens``: by kind the number of tokens. With ``counts`` also ``text``: by kind its share of the text's
            tokens, from 0 to 1.
        """
        numbers = torch.bincount(self.kind.long(), minlength=len(KINDS)).tolist()
        numbers[NONE] -= len(self) - self.tokens
        result: dict[str, dict[str, float]] = {"tokens": dict(zip(KINDS, numbers, strict=True))}
        if counts is not None:
            shares = torch.zeros(len(KINDS), dtype=torch.float64)
            shares.index_add_(0, self.kind.long(), counts.to("cpu", torch.float64))
            result["text"] = dict(zip(KINDS, (shares / shares.sum().clamp(min=1)).tolist(), strict=True))
        return result


def _roles(teacher: TokenizerInfo, student: TokenizerInfo) -> dict[int, int]:
    """Student id to teacher id of special and added tokens: by role, else by string."""
    # A token that is the text itself (a byte) may be marked as special, and the teacher's may be an ordinary one.
    ids = teacher.ids()
    found = {i: ids[token] for token, i in (student.added | student.special).items() if token in ids}
    found.update(reversed(pairs_by_role(student, teacher)))
    # One token may hold several roles (``<s>`` is CLS and BOS): its own name for one counts before a substitute.
    found.update({i: teacher.roles[role] for role, i in reversed(student.roles.items()) if role in teacher.roles})
    return found


def _normalised_row(teacher: Known, student: Known, i: int) -> list[int]:
    """The teacher's tokens for a text that they spell in its own normal form only (a cased token, an uncased teacher);
    empty where there are none."""
    form = word_form(student, i)
    normalizer = teacher.info.backend.normalizer
    if form is None or normalizer is None:
        return []
    try:
        text = normalizer.normalize_str(form[1].decode())
    except UnicodeDecodeError:
        return []
    surfaces, prefix = teacher.surfaces, teacher.info.prefix
    text = text.replace(surfaces.mark, " ").strip() if surfaces.mark else text.strip()
    start = surfaces.mark or " " if form[0] and surfaces.marks_words else ""
    ids = [token.id for token in teacher.info.backend.model.tokenize((start if form[0] else prefix) + text)]
    spelled = b"".join(surfaces.texts[j] for j in ids).strip()
    known_only = all(surfaces.kinds[j] != UNKNOWN for j in ids)
    return ids if known_only and text and spelled == text.encode() else []


def _added_row(teacher: Known, token: str) -> list[int]:
    ids = teacher.info.backend.encode(token, add_special_tokens=False).ids
    return ids if all(teacher.surfaces.kinds[j] != UNKNOWN for j in ids) else []


def _shares(teacher: Known, ids: Tensor, indptr: Tensor) -> Tensor:
    """The share of each teacher token in the mean that it is part of: float32 like ``ids``.

    In proportion to the length of its text in bytes: short pieces stand in so many words that their rows say little of
    any.
    """
    texts = teacher.surfaces.texts
    size = torch.tensor([max(len(texts[j].strip()), 1) for j in ids.tolist()], dtype=torch.float64)
    owner = torch.repeat_interleave(torch.arange(len(indptr) - 1), indptr.diff())
    total = torch.zeros(len(indptr) - 1, dtype=torch.float64).index_add_(0, owner, size)
    return (size / total[owner]).float()


def _exact(kept: Tensor, teacher_size: int, student: TokenizerInfo, seed: int) -> Start:
    expected = f"one id of the teacher's {teacher_size} for each of the student's {len(student.tokens)}"
    got = f"{kept.numel()} ids"
    need(kept.dim() == 1 and len(kept) == len(student.tokens), "vocabulary", expected, got)
    kept = kept.to("cpu", torch.int64)
    need(bool(((kept >= -1) & (kept < teacher_size)).all()), "vocabulary", expected, f"{int(kept.max())} among them")
    held = kept >= 0
    kind = torch.where(held, SHARED, NONE).to(torch.uint8)
    indptr = nn.functional.pad(held.cumsum(0), (1, 0))
    tokens = sum(token is not None for token in student.tokens)
    return Start(kind, indptr, kept[held], torch.ones(int(held.sum())), teacher_size, tokens, seed)


def plan_start(teacher_tokenizer: Any, student_tokenizer: Any, kept: Tensor | None = None, seed: int = 0) -> Start:
    """Finds which of the teacher's rows each student token starts from.

    A special token starts as the teacher's token of the same role, an added one as its token of the same string. A
    token that both vocabularies have (the same text, both at the start of a word or both inside one, whatever the
    families) starts as the teacher's. Any other starts as the mean of the teacher's own tokens for its text, as it
    stands at the start of a word or inside one, the longer ones weighing more; if they spell it only in the teacher's
    normal form, of these. What the teacher cannot spell starts as the mean of all rows plus noise.

    Args:
        teacher_tokenizer, student_tokenizer: ``transformers`` fast tokenizers or ``tokenizers.Tokenizer``.
        kept: int64 ``[V_s]``, the teacher id that each student token was (-1 for an id without a token): the student's
            vocabulary is a part of the teacher's, and every token takes its own row.
        seed: of the noise.

    Raises:
        TypeError: not a fast tokenizer.
        ValueError: a teacher's tokenizer without an unknown token that does not spell every byte either.
        VocabdistilError: ``kept`` of another length, or with ids that the teacher does not have.
    """
    teacher, student = known(teacher_tokenizer, "teacher_tokenizer"), known(student_tokenizer, "student_tokenizer")
    teacher_size = len(teacher.info.tokens)
    if kept is not None:
        return _exact(kept, teacher_size, student.info, seed)
    table = RemapTable.from_tokenizers(student_tokenizer, teacher_tokenizer)
    flat, bounds = table.ids.tolist(), table.indptr.tolist()
    shared = {j: i for i, j in matched_ids(teacher, student).tolist()}
    roles = _roles(teacher.info, student.info)
    special = set(student.info.special.values())
    rows, kind = [], torch.full((len(student.info.tokens),), NONE, dtype=torch.uint8)
    for i, token in enumerate(student.info.tokens):
        row = flat[bounds[i] : bounds[i + 1]]
        if i in roles:
            row, kind[i] = [roles[i]], ROLE
        elif i in shared:
            row, kind[i] = [shared[i]], SHARED
        elif token is None or i in special:
            row = []
        elif row == [table.unk_id] or not row:
            added = token in student.info.added
            row = _added_row(teacher, token) if added else _normalised_row(teacher, student, i)
        if row and kind[i] == NONE:
            kind[i] = COMPOSED
        rows.append(row)
    indptr = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    ids = torch.tensor([j for row in rows for j in row], dtype=torch.int64)
    tokens = sum(token is not None for token in student.info.tokens)
    return Start(kind, indptr, ids, _shares(teacher, ids, indptr), teacher_size, tokens, seed)
