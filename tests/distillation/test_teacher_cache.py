"""The cache of a teacher: read once, whatever is beside a text, and never another number in silence."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import vocabdistil as vd
from tests.models.tiny_teachers import tiny_teacher
from vocabdistil.core.errors import VocabdistilError
from vocabdistil.distillation.teacher_cache import TeacherCache
from vocabdistil.models.teachers import Teacher, load_teacher

pytest.importorskip("pyarrow")
TEXTS = [f"walk {chr(97 + n % 20)} king {chr(104 + n // 20) * (1 + n % 5)}" + " the" * (n % 4) for n in range(40)]


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_teacher(tiny_teacher("bert"), head=False)


def batch(teacher: Teacher, texts: list[str], side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    encoded = teacher.tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
    return encoded["input_ids"], encoded["attention_mask"]


def counted(teacher: Teacher) -> tuple[Teacher, list[int]]:
    """A teacher that notes the sizes of the batches that it reads."""
    sizes: list[int] = []

    class Counted(Teacher):
        def read(self, input_ids, attention_mask, **options):
            sizes.append(len(input_ids))
            return super().read(input_ids, attention_mask, **options)

    return Counted(teacher.name, teacher.model, teacher.tokenizer), sizes


def rounded(x: torch.Tensor) -> torch.Tensor:
    return x.half().float()


def shards(folder: Path) -> list[dict]:
    return json.loads((folder / "manifest.json").read_text())["shards"]


def test_equals_the_teacher_rounded_and_reads_it_once(teacher, tmp_path) -> None:
    spy, sizes = counted(teacher)
    ids, mask = batch(teacher, TEXTS[:12])
    want = torch.where(mask[..., None] == 1, teacher.read(ids, mask).layers[-1], 0.0)
    with TeacherCache.open(tmp_path / "new" / "cache", spy) as cache:
        first = cache.read(ids, mask)
        again = cache.read(ids, mask)
        assert cache.computed == cache.known == 12
    (first,), (again,) = first.layers, again.layers
    assert first.dtype == torch.float32 and torch.equal(first, rounded(first)) and torch.equal(first, again)
    torch.testing.assert_close(first, want, rtol=2**-10, atol=2**-24)
    with TeacherCache.open(tmp_path / "new" / "cache", spy) as cache:
        assert cache.known == 12 and torch.equal(cache.read(ids, mask).layers[0], first) and cache.computed == 0
    assert sizes == [12]


def test_neither_batch_nor_padding_matters(teacher, tmp_path) -> None:
    spy, sizes = counted(teacher)
    with TeacherCache.open(tmp_path, spy) as cache:
        ids, mask = batch(teacher, TEXTS[:10])
        states = cache.read(ids, mask).layers[0]
        want = [row[keep == 1] for row, keep in zip(states, mask, strict=True)]
        for side in ("left", "right"):
            order = [7, 2, 30, 2, 31, 9]  # two that are new, and one twice
            ids, mask = batch(teacher, [TEXTS[i] for i in order], side)
            ids = torch.nn.functional.pad(ids, (3, 2), value=5)
            mask = torch.nn.functional.pad(mask, (3, 2))
            states = cache.read(ids.int(), mask.bool()).layers[0]
            assert states[mask == 0].eq(0).all()
            for b, i in enumerate(order):
                if i < 10:
                    assert torch.equal(states[b][mask[b] == 1], want[i])
        assert sizes == [10, 2]
        ids, mask = batch(teacher, [TEXTS[35], TEXTS[35]])
        states = cache.read(ids, mask).layers[0]
        assert torch.equal(states[0], states[1]) and sizes == [10, 2, 1]


def test_pooled_and_hidden_in_one_folder(teacher, tmp_path) -> None:
    spy, sizes = counted(teacher)
    ids, mask = batch(teacher, TEXTS[:9], "left")
    for _ in range(2):
        with TeacherCache.open(tmp_path, spy) as hidden, TeacherCache.open(tmp_path, spy, "pooled") as pooled:
            states, means = hidden.read(ids, mask).layers[0], pooled.read(ids, mask).layers[0]
            assert means.shape == (9, 1, teacher.width) and torch.equal(means, rounded(means))
            want = states.sum(1, keepdim=True) / mask.sum(1)[:, None, None]
            torch.testing.assert_close(means, want, rtol=2**-9, atol=1e-3)
            # A student is compared with it as with hidden states.
            student = torch.randn(9, 4, teacher.width)
            ones = torch.ones(9, 4, dtype=torch.int64)
            losses = (vd.pooled_loss(student, x, ones, keep) for x, keep in ((states, mask), (means, ones[:, :1])))
            torch.testing.assert_close(*losses, rtol=1e-2, atol=1e-3)
    assert sizes == [9, 9] and sorted(shard["what"] for shard in shards(tmp_path)) == ["hidden", "pooled"]


def test_texts_without_tokens_and_no_texts(teacher, tmp_path) -> None:
    spy, sizes = counted(teacher)
    for what, length in (("hidden", 3), ("pooled", 1)):
        with TeacherCache.open(tmp_path, spy, what) as cache:
            for rows in (2, 0):
                ids = torch.ones(rows, 3, dtype=torch.int64)
                states = cache.read(ids, torch.zeros_like(ids)).layers[0]
                assert states.shape == (rows, length, teacher.width) and states.eq(0).all()
            assert cache.read(torch.ones(1, 0, dtype=torch.int64), torch.ones(1, 0, dtype=torch.int64)).layers
    assert not sizes and not shards(tmp_path)


def test_shards_are_bounded_and_read_by_others(teacher, tmp_path) -> None:
    bound = 2000
    with TeacherCache.open(tmp_path, teacher, shard_bytes=bound) as cache:
        for start in range(0, 40, 7):
            ids, mask = batch(teacher, TEXTS[start : start + 7])
            cache.read(ids, mask)
    records = shards(tmp_path)
    row = 2 * teacher.width
    assert sum(record["rows"] for record in records) == 40 and len(records) > 5
    assert all(0 < record["tokens"] * row <= bound for record in records)
    ids, mask = batch(teacher, TEXTS)
    with TeacherCache.open(tmp_path, teacher) as cache:
        states = cache.read(ids, mask).layers[0]
        assert cache.computed == 0
    # The files are what other readers of Arrow expect.
    import pyarrow as pa

    with pa.ipc.open_stream(tmp_path / "hidden-00001.arrow") as stream:
        table = stream.read_all()
    first = records[0]["rows"]
    got = np.array(table["states"][0].as_py(), dtype=np.float32)
    assert np.array_equal(got, states[first][mask[first] == 1].numpy())


def test_autocast_changes_nothing(teacher, tmp_path) -> None:
    ids, mask = batch(teacher, TEXTS[:5])
    results = []
    for name, enabled in (("a", False), ("b", True)):
        with TeacherCache.open(tmp_path / name, teacher) as cache, torch.autocast("cpu", torch.bfloat16, enabled):
            results.append(cache.read(ids, mask).layers[0])
    assert torch.equal(*results)


def test_the_same_teacher_from_elsewhere_with_a_head_is_the_same(tmp_path) -> None:
    path = tiny_teacher("bert")
    with_head, body = load_teacher(path), load_teacher(path, head=False)
    assert with_head.masked_lm is not None and body.masked_lm is None
    copy = tmp_path / "copy"
    body.model.save_pretrained(copy)
    body.tokenizer.save_pretrained(copy)
    ids, mask = batch(body, TEXTS[:5])
    for teacher, computed in ((with_head, 5), (body, 0), (load_teacher(copy, head=False), 0)):
        with TeacherCache.open(tmp_path / "cache", teacher) as cache:
            cache.read(ids, mask)
            assert cache.computed == computed


@pytest.mark.parametrize("field", ["weights", "configuration", "tokenizer", "dtype", "whitening"])
def test_another_teacher_is_refused(teacher, tmp_path, field) -> None:
    with TeacherCache.open(tmp_path, teacher) as cache:
        cache.read(*batch(teacher, TEXTS[:3]))
    other = load_teacher(tiny_teacher("bert"), head=False)
    message, whitening = f"of other {field}", "none"
    if field == "weights":
        with torch.no_grad():
            other.model.get_input_embeddings().weight[7, 3] += 1e-6
    elif field == "configuration":
        other.model.config.layer_norm_eps = 1e-6
    elif field == "tokenizer":
        other = replace(other, tokenizer=load_teacher(tiny_teacher("modernbert"), head=False).tokenizer)
    elif field == "dtype":
        other.model.half()
        message = "of other (weights|dtype)"
    else:
        whitening = "0.3 on something"
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(VocabdistilError, match="^cache_teacher: .* holds the states of another teacher") as raised:
        TeacherCache.open(tmp_path, other, whitening=whitening)
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)
    raised.match(message)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_does_not_fit_float16_is_noticed(tmp_path) -> None:
    teacher = load_teacher(tiny_teacher("bert"), head=False)
    ids, mask = batch(teacher, TEXTS[:4])
    norm = [module for module in teacher.model.modules() if isinstance(module, torch.nn.LayerNorm)][-1]
    with torch.no_grad():
        norm.weight[2] = 1e6
    for what in ("hidden", "pooled"):
        with TeacherCache.open(tmp_path, teacher, what) as cache:
            with pytest.raises(VocabdistilError, match="^cache_teacher: .*up to .*; float16, .* ends at 65504$"):
                cache.read(ids, mask)
            assert cache.known == cache.computed == 0
        assert not shards(tmp_path)
    with torch.no_grad():
        norm.weight[2] = float("nan")
    with TeacherCache.open(tmp_path / "nan", teacher) as cache, pytest.raises(VocabdistilError, match="gives NaN"):
        cache.read(ids, mask)


def elsewhere(folder: Path, last: int) -> subprocess.Popen:
    """Another process that reads the texts up to ``last`` one by one."""
    code = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parents[2])!r}]
from pathlib import Path
from tests.distillation.test_teacher_cache import *
teacher = load_teacher({str(tiny_teacher("bert"))!r}, head=False)
with TeacherCache.open({str(folder)!r}, teacher, shard_bytes=1000) as cache:
    for text in TEXTS[:{last}]:
        cache.read(*batch(teacher, [text]))
        time.sleep(0.02)
"""
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)


def wait_for(run: subprocess.Popen, folder: Path, count: int) -> None:
    while not (folder / "manifest.json").exists() or len(shards(folder)) < count:
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.005)


def test_killed_in_the_middle(teacher, tmp_path) -> None:
    run = elsewhere(tmp_path, 40)
    wait_for(run, tmp_path, 3)
    run.send_signal(signal.SIGKILL)
    run.wait(timeout=60)
    run.stderr.close()
    known = sum(record["rows"] for record in shards(tmp_path))
    assert 0 < known < 40
    # What kills leave: a part of a shard, a shard that no manifest names, a part of a manifest.
    left_overs = [f"hidden-{len(shards(tmp_path)):05d}.arrow", ".hidden-00009.arrow.x", ".manifest.json.y"]
    for name in left_overs:
        (tmp_path / name).write_bytes(b"half")
    ids, mask = batch(teacher, TEXTS)
    with TeacherCache.open(tmp_path, teacher) as cache:
        assert cache.known == known
        states = cache.read(ids, mask).layers[0]
        assert cache.computed == 40 - known
    assert not any((tmp_path / name).exists() for name in left_overs[1:])
    want = torch.where(mask[..., None] == 1, teacher.read(ids, mask).layers[-1], 0.0)
    torch.testing.assert_close(states, want, rtol=2**-10, atol=1e-5)
    with TeacherCache.open(tmp_path, teacher) as cache:
        assert torch.equal(cache.read(ids, mask).layers[0], states) and cache.computed == 0


def test_two_processes_share_a_folder(teacher, tmp_path) -> None:
    run = elsewhere(tmp_path, 30)
    wait_for(run, tmp_path, 1)
    with TeacherCache.open(tmp_path, teacher, shard_bytes=1000) as cache:
        for text in reversed(TEXTS):
            cache.read(*batch(teacher, [text]))
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 0, errors
    # No text stands there twice, and all are there.
    assert sum(record["rows"] for record in shards(tmp_path)) == 40
    with TeacherCache.open(tmp_path, teacher) as cache:
        ids, mask = batch(teacher, TEXTS)
        want = torch.where(mask[..., None] == 1, teacher.read(ids, mask).layers[-1], 0.0)
        torch.testing.assert_close(cache.read(ids, mask).layers[0], want, rtol=2**-10, atol=1e-5)
        assert cache.known == 40 and cache.computed == 0


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing", "foreign", "manifest", "manifest cut", "tokens"])
def test_damage_is_noticed(teacher, tmp_path, damage: str) -> None:
    ids, mask = batch(teacher, TEXTS[:20])
    with TeacherCache.open(tmp_path, teacher, shard_bytes=2000) as cache:
        cache.read(ids, mask)
    shard, manifest = tmp_path / "hidden-00001.arrow", tmp_path / "manifest.json"
    data = shard.read_bytes()
    if damage == "truncated":
        shard.write_bytes(data[:-100])
        message = f"hidden-00001.arrow is damaged: expected {len(data)} bytes, got {len(data) - 100}"
    elif damage == "changed":
        middle = len(data) // 2
        shard.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
        message = "hidden-00001.arrow is damaged: expected checksum"
    elif damage == "missing":
        shard.unlink()
        message = "hidden-00001.arrow is missing"
    elif damage == "foreign":
        shard.write_bytes(b"\xff" * len(data))
        message = "hidden-00001.arrow is damaged"
    elif damage == "tokens":
        values = json.loads(manifest.read_text())
        values["shards"][1]["tokens"] += 1
        manifest.write_text(json.dumps(values))
        message = "hidden-00001.arrow is damaged: expected .* vectors"
    else:
        manifest.write_text("{}" if damage == "manifest" else manifest.read_text()[:50])
        message = "manifest.json is damaged"
    with pytest.raises(VocabdistilError, match=f"^cache_teacher: .*{message}") as raised:
        with TeacherCache.open(tmp_path, teacher) as cache:
            cache.read(ids, mask)
    assert "\n" not in str(raised.value)


def test_every_field_of_the_manifest_is_checked(teacher, tmp_path) -> None:
    with TeacherCache.open(tmp_path, teacher) as cache:
        cache.read(*batch(teacher, TEXTS[:3]))
    path = tmp_path / "manifest.json"
    good = path.read_text()
    for keys, value, message in (
        (("format",), 1, "format: expected 2, got 1"),
        (("name",), None, "name: expected a string, got None"),
        (("weights",), 3, "weights: expected a string, got 3"),
        (("shards",), {}, "shards: expected a list"),
        (("shards", 0), 1, r"shards\[0\]: expected an object, got 1"),
        (("shards", 0, "what"), ["x"], r"shards\[0\]: what: expected 'hidden' or 'pooled', got \['x'\]"),
        (("shards", 0, "rows"), 0, r"shards\[0\]: rows: expected a number of at least 1, got 0"),
        (("shards", 0, "tokens"), -1, r"shards\[0\]: tokens: expected a number, got -1"),
        (("shards", 0, "rows"), 7, "hidden-00000.arrow is damaged: expected 7 rows, got 3"),
    ):
        manifest = json.loads(good)
        place = manifest
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        path.write_text(json.dumps(manifest))
        with pytest.raises(VocabdistilError, match=f"^cache_teacher: .*{message}"):
            TeacherCache.open(tmp_path, teacher)
    path.write_text("[" * 100_000)
    with pytest.raises(VocabdistilError, match="manifest.json is damaged"):
        TeacherCache.open(tmp_path, teacher)


def test_a_folder_that_goes_while_it_is_open(teacher, tmp_path) -> None:
    cache = TeacherCache.open(tmp_path / "cache", teacher)
    cache.read(*batch(teacher, TEXTS[:3]))
    cache.flush()
    cache.read(*batch(teacher, TEXTS[3:6]))
    (tmp_path / "cache").rename(tmp_path / "moved")
    with pytest.raises(VocabdistilError, match="^cache_teacher: "):
        cache.flush()
    with TeacherCache.open(tmp_path / "cache", teacher):
        pass
    with pytest.raises(VocabdistilError, match="was made anew while it was open"):
        cache.flush()


def test_bad_input(teacher, tmp_path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(VocabdistilError, match="^cache_teacher: .* has other files and no manifest.json"):
        TeacherCache.open(tmp_path, teacher)
    with pytest.raises(VocabdistilError, match="^cache_teacher: .* is not a folder"):
        TeacherCache.open(tmp_path / "file", teacher)
    with pytest.raises(VocabdistilError, match="^cache_teacher: "):
        TeacherCache.open(tmp_path / "file" / "below", teacher)
    with pytest.raises(VocabdistilError, match="^cache_teacher: expected a folder, got int"):
        TeacherCache.open(3, teacher)
    with pytest.raises(ValueError, match="^what: expected one of 'hidden', 'pooled', got 'logits'"):
        TeacherCache.open(tmp_path / "new", teacher, "logits")
    with pytest.raises(ValueError, match="^shard_bytes: expected a number of at least 1, got 0"):
        TeacherCache.open(tmp_path / "new", teacher, shard_bytes=0)
    ids = torch.ones(2, 3, dtype=torch.int64)
    with TeacherCache.open(tmp_path / "new", teacher) as cache:
        for arguments, error, message in (
            ((ids.float(), ids), TypeError, "input_ids: expected a tensor of int64 or int32, got torch.float32"),
            ((ids, ids.float()), TypeError, "attention_mask: expected bool or integers"),
            ((ids, ids[:, :2]), ValueError, r"attention_mask: expected shape \(2, 3\), got \(2, 2\)"),
            ((ids, torch.tensor([[1, 1, 1], [1, 0, 1]])), ValueError, "attention_mask: expected attended tokens"),
        ):
            with pytest.raises(error, match=f"^{message}"):
                cache.read(*arguments)
