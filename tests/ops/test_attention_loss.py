"""attention_loss against the float64 reference: dtypes, layers, heads, memory, compile, bad input."""

from __future__ import annotations

import pytest
import torch

import vocabdistil as vd
from tests.compiling import assert_compiles
from tests.reference_cases import no_pairs
from tests.tolerances import assert_norm_close
from tests.vocabularies import LargestAllocation, randn

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LENGTHS = 11, 8


def maps(heads: int, length: int, seed: int, dtype: torch.dtype = torch.float32, batch: int = 3) -> torch.Tensor:
    return randn(batch, heads, length, length, seed=seed).softmax(-1).to(dtype)


def some_pairs(batch: int = 3, seed: int = 0) -> vd.SpanPairs:
    """Random spans within each text, gaps and empty spans among them."""
    g = torch.Generator().manual_seed(seed)
    sides = [[], [], [], []]
    for b in range(batch):
        count = int(torch.randint(1, 4, (1,), generator=g))
        for side, length in enumerate(LENGTHS):
            cuts = torch.randint(0, length + 1, (2 * count,), generator=g).sort().values + b * length
            sides[2 * side] += cuts[::2].tolist()
            sides[2 * side + 1] += cuts[1::2].tolist()
    return vd.SpanPairs(*sides)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "layers"), [((2, 2), (1, 1)), ((3, 3), (2, 4)), ((1, 4), (1, 3))])
@pytest.mark.parametrize("seed", [0, 1])
def test_against_float64(dtype, heads, layers, seed):
    students = [maps(heads[0], LENGTHS[0], i, dtype) for i in range(layers[0])]
    teachers = [maps(heads[1], LENGTHS[1], 10 + i, dtype) for i in range(layers[1])]
    pairs = some_pairs(seed=seed)
    results = []
    for module, kind in ((vd, dtype), (vd.reference, torch.float64)):
        leaves = [x.to(kind, copy=True).requires_grad_() for x in students]
        wide = [x.to(kind) for x in teachers]
        loss = module.attention_loss(leaves, wide, pairs, average_heads=heads[0] != heads[1])
        (loss * 100).backward()
        results.append((loss.detach(), *(x.grad for x in leaves)))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for got, want, kind in zip(*results, (wide, *[dtype] * layers[0]), strict=True):
        assert got.dtype == kind
        assert_norm_close(got, want, kind, "value", factor=3)


def test_gradcheck():
    teacher = maps(2, LENGTHS[1], 1, torch.float64)
    student = maps(2, LENGTHS[0], 0, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: vd.attention_loss(s, teacher, some_pairs()), student)


def test_by_hand():
    # Two student tokens are one pair: its rows are averaged, its columns added.
    student = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5]])[None, None]
    teacher = torch.tensor([[0.75, 0.25], [1.0, 0.0]])[None, None]
    pairs = vd.SpanPairs([0, 2], [2, 3], [0, 1], [1, 2])
    assert vd.attention_loss(student, teacher, pairs).item() == (0 + 0 + 0.25 + 0.25) / 4


def test_a_strided_map_and_the_reference_backend():
    student, teacher = maps(2, LENGTHS[0], 0), maps(2, LENGTHS[1], 1)
    pairs = some_pairs()
    loss = vd.attention_loss(student, teacher, pairs)
    turned = student.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(vd.attention_loss(turned, teacher, pairs), loss)
    torch.testing.assert_close(vd.attention_loss(student, teacher, pairs, backend="reference"), loss)


def test_no_pairs():
    for batch, pairs in ((3, no_pairs()), (3, vd.SpanPairs([4], [4], [0], [2])), (0, no_pairs())):
        student = maps(2, LENGTHS[0], 0, batch=batch).requires_grad_()
        loss = vd.attention_loss(student, maps(2, LENGTHS[1], 1, batch=batch), pairs)
        loss.backward()
        assert loss.item() == 0 and student.grad.eq(0).all()


def test_nothing_larger_than_a_map_is_allocated():
    at = torch.arange(4 * 30)
    pairs = vd.SpanPairs(at, at + 1, at, at + 1)
    students, teachers = ([maps(3, 30, i + j, batch=4) for i in range(5)] for j in (0, 9))
    for x in students:
        x.requires_grad_()
    with LargestAllocation() as largest:
        vd.attention_loss(students, teachers, pairs).backward()
    assert 0 < largest.nbytes <= students[0].nbytes


def test_compiles_as_one_graph():
    teacher, pairs = maps(2, LENGTHS[1], 1), some_pairs()
    assert_compiles(lambda s: vd.attention_loss(s * 2, teacher, pairs), maps(2, LENGTHS[0], 0))


BAD = [
    ({"student_maps": torch.rand(2, 1, 3)}, ValueError, r"student\[0\]: expected 4 dimensions"),
    ({"student_maps": torch.rand(2, 1, 3, 4)}, ValueError, r"student\[0\]: expected shape \[B, H, L, L\]"),
    ({"teacher_maps": []}, ValueError, "teacher: expected at least one layer"),
    ({"teacher_maps": torch.rand(2, 2, 3, 3)}, ValueError, "teacher: expected maps of shape .* or average_heads"),
    ({"teacher_maps": torch.rand(3, 1, 3, 3)}, ValueError, "teacher: expected maps of 2 texts"),
    ({"pairs": None}, TypeError, "pairs: expected SpanPairs"),
    ({"pairs": vd.SpanPairs([0], [4], [0], [1])}, ValueError, "pairs: expected both spans of a pair within one text"),
    ({"pairs": vd.SpanPairs([0, 1], [1, 2], [0, 3], [1, 4])}, ValueError, "pairs: .* another in pair 1"),
    ({"pairs": vd.SpanPairs([0], [1], [0], [7])}, ValueError, "pairs: expected teacher positions up to 6"),
    ({"backend": "cuda"}, ValueError, "backend"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[f"{list(b[0])[0]}-{i}" for i, b in enumerate(BAD)])
def test_bad_input_is_named(change, error, message):
    options = {"student_maps": torch.rand(2, 1, 3, 3), "teacher_maps": torch.rand(2, 1, 3, 3), "pairs": no_pairs()}
    with pytest.raises(error, match=f"^{message}"):
        vd.attention_loss(**{**options, **change})
