"""Tests of remap where the host does not wait, against the native code on the CPU: imported by the tests of each
backend, which say on which ``device`` and ``backend`` they run."""

from __future__ import annotations

import pytest
import torch

from vocabdistil.alignment.remap import RemapOutput, RemapTable

FIELDS = ("student_start", "student_end", "teacher_start", "teacher_end")


def make_table(rows: int = 50, seed: int = 0, empty: bool = False, longest: int = 5) -> RemapTable:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0 if empty else 1, longest + 1, (rows,), generator=generator)
    indptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    ids = torch.randint(0, 90, (int(indptr[-1]),), generator=generator)
    return RemapTable(indptr, ids, student_vocab_size=99, unk_id=97, pad_id=98)


def make_batch(table: RemapTable, batch: int, length: int, mask: str, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, len(table), (batch, length), generator=generator)
    if mask == "none":
        return ids, None
    if mask == "padding":
        sizes = torch.randint(0, length + 1, (batch, 1), generator=generator)
        return ids, (torch.arange(length) < sizes).long()
    return ids, torch.rand(batch, length, generator=generator) < 0.7


def fixed(out: RemapOutput, ids: torch.Tensor, mask: torch.Tensor | None, table: RemapTable, width: int):
    """The result of the CPU in the form of a fixed width: (input_ids, attention_mask, spans [4, B * L], nonempty)."""
    batch, length = ids.shape
    old = out.input_ids.shape[1]
    spare = torch.full((batch, width - old), table.pad_id)
    input_ids, attention = torch.cat([out.input_ids, spare], 1), torch.cat([out.attention_mask, spare * 0], 1)
    start, end, teacher, _ = (getattr(out.pairs, name).long() for name in FIELDS)
    rows = teacher // max(length, 1)
    spans = torch.empty(4, batch * length, dtype=torch.int64)
    spans[2] = spans[3] = torch.arange(batch * length)
    spans[3, teacher] += 1
    counts = table.indptr.diff()[ids].long()
    room = (counts if mask is None else counts * mask.ne(0)).cumsum(1)
    before = (room - (counts if mask is None else counts * mask.ne(0))).clamp(max=width)
    spans[0] = spans[1] = (torch.arange(batch)[:, None] * width + before).flatten()
    # Of what is kept, the place is that of the CPU.
    assert torch.equal(spans[0, teacher], start + rows * (width - old))
    spans[1, teacher] += end - start
    return input_ids, attention, spans, int((end > start).sum())


def assert_same(got: RemapOutput, want, device: str) -> None:
    input_ids, attention, spans, nonempty = want
    assert got.input_ids.device.type == got.pairs.device.type == device
    assert got.input_ids.dtype == got.attention_mask.dtype == torch.int64
    assert torch.equal(got.input_ids.cpu(), input_ids)
    assert torch.equal(got.attention_mask.cpu(), attention)
    for name, expected in zip(FIELDS, spans, strict=True):
        field = getattr(got.pairs, name)
        assert field.dtype == torch.int32 and torch.equal(field.cpu().long(), expected.long()), name
    assert int(got.pairs.num_nonempty) == nonempty


SHAPES = [(3, 7), (1, 128), (5, 131), (2, 2500), (0, 4), (4, 0), (1, 1)]


@pytest.mark.parametrize("mask", ["none", "padding", "holes"])
@pytest.mark.parametrize(("batch", "length"), SHAPES)
@pytest.mark.parametrize("empty", [False, True])
def test_equals_the_native_code(batch, length, empty, mask, device, backend):
    table = make_table(empty=empty, seed=length)
    ids, keep = make_batch(table, batch, length, mask, seed=batch)
    moved = ids.to(device), None if keep is None else keep.to(device)
    got, want = table.remap(*moved, backend=backend), table.remap(ids, keep)
    spans = torch.stack([getattr(want.pairs, name) for name in FIELDS])
    assert_same(got, (want.input_ids, want.attention_mask, spans, want.pairs.num_nonempty), device)
    assert isinstance(got.pairs.num_nonempty, int)
    assert (got.pairs.student_tokens, got.pairs.teacher_tokens) == (
        want.pairs.student_tokens,
        want.pairs.teacher_tokens,
    )
    for width in {1, 2, max(want.input_ids.shape[1] // 2, 1), want.input_ids.shape[1] + 300}:
        got = table.remap(*moved, max_length=width, backend=backend)
        assert isinstance(got.pairs.num_nonempty, torch.Tensor)
        assert got.pairs.student_tokens == batch * width
        assert_same(got, fixed(table.remap(ids, keep, width), ids, keep, table, width), device)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8, torch.int32, torch.int64])
def test_dtypes_and_strides(dtype, mask_dtype, device, backend):
    table = make_table()
    ids, keep = make_batch(table, 6, 40, "holes")
    ids, keep = ids.to(dtype), keep.to(mask_dtype)
    for a, b in ((ids[::2, 3:], keep[::2, 3:]), (ids[:, ::3], keep[:, ::3]), (ids[:1].expand(4, 40), keep[:4])):
        want = fixed(table.remap(a, b, 50), a, b, table, 50)
        assert_same(table.remap(a.to(device), b.to(device), 50, backend), want, device)


def test_ids_outside_the_table(device, backend):
    table = make_table()
    ids = torch.tensor([[3, -1, 5], [len(table), 2**40, -(2**62)], [1, 2, 3]], device=device)
    got = table.remap(ids, max_length=40, backend=backend)
    rows = [table.rows(3) + [97] + table.rows(5), [97] * 3, table.rows(1) + table.rows(2) + table.rows(3)]
    assert got.input_ids.tolist() == [row + [98] * (40 - len(row)) for row in rows]
    with pytest.raises(ValueError, match=r"teacher_ids.*got -1 at \[0, 1\]"):
        table.remap(ids, backend=backend)
    mask = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]], device=device)
    assert table.remap(ids, mask, backend=backend).attention_mask.sum() == len(rows[0]) - 1 + len(rows[2])


def test_a_table_without_rows_and_a_long_row(device, backend):
    nothing = RemapTable([0], [], student_vocab_size=5, unk_id=1, pad_id=0)
    ids = torch.tensor([[0, 7]], device=device)
    assert nothing.remap(ids, max_length=3, backend=backend).input_ids.tolist() == [[1, 1, 0]]
    assert nothing.remap(ids, ids * 0, backend=backend).input_ids.shape == (1, 0)
    long = RemapTable([0, 700, 701], [*range(1, 701), 3], student_vocab_size=999, unk_id=1, pad_id=0)
    ids = torch.tensor([[1, 0, 1], [0, 0, 0]])
    want = fixed(long.remap(ids, None, 1400), ids, None, long, 1400)
    assert_same(long.remap(ids.to(device), None, 1400, backend), want, device)


def test_what_the_table_shows_may_be_changed(device, backend):
    table = make_table()
    ids, _ = make_batch(table, 3, 9, "none")
    want = table.remap(ids).input_ids
    table.indptr.fill_(2**30)
    table.ids.fill_(-1)
    assert torch.equal(table.remap(ids.to(device), backend=backend).input_ids.cpu(), want)
