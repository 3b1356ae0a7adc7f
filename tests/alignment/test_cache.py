"""The cache of aligned texts: the same batches as on the fly, however often its writing was stopped."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import vocabdistil as vd
from tests._families import FAMILIES, SCRIPTS, family
from tests._wordpiece import small_text
from tests.alignment.test_collator import METHODS, same
from vocabdistil.alignment.cache import AlignedDataset, cache_aligned
from vocabdistil.core.errors import VocabdistilError

pytest.importorskip("pyarrow")
TEXTS = [*SCRIPTS, "", " ", *small_text(40)]


def cache(folder: Path, texts=TEXTS, teacher="byte-level", student="wordpiece", **options) -> AlignedDataset:
    options = {"max_length": 24, "shard_size": 16, "quiet": True} | options
    return cache_aligned(texts, family(teacher), family(student), folder, **options)


def slowly():
    for text in TEXTS:
        time.sleep(0.01)
        yield text


def elsewhere(folder: Path, **options) -> subprocess.Popen:
    """The same in a process of its own, which reads the tokenizers from files: training gives others each time."""
    paths = [folder.with_suffix(f".{side}.json") for side in ("teacher", "student")]
    for path, name in zip(paths, ("byte-level", "wordpiece"), strict=True):
        family(name).save(str(path))
    code = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parents[2])!r}]
from tokenizers import Tokenizer
from tests.alignment import test_cache
test_cache.family = Tokenizer.from_file
test_cache.cache({str(folder)!r}, test_cache.slowly(), *{[str(path) for path in paths]}, **{options})
"""
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("other", FAMILIES)
def test_batches_are_those_of_texts(tmp_path, other: str, method: str) -> None:
    # Every family once on each side.
    names = list(FAMILIES)
    teacher, student = other, names[(names.index(other) + 5) % len(names)]
    rows = cache(tmp_path, teacher=teacher, student=student, method=method)
    assert len(rows) == len(TEXTS) and rows.method == method and rows.max_length == (24, 24)
    collator = vd.AlignmentCollator(family(teacher), family(student), method, 24, pad_to_multiple_of=8)
    order = torch.randperm(len(TEXTS), generator=torch.Generator().manual_seed(1)).tolist()
    for start in range(0, len(order), 13):
        chosen = order[start : start + 13]
        assert same(collator([rows[i] for i in chosen]), collator([TEXTS[i] for i in chosen]))


def test_rows(tmp_path) -> None:
    rows = cache(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix) == [
        "manifest.json",
        *(f"shard-{k:05d}.arrow" for k in range(-(-len(TEXTS) // 16))),
    ]
    row = rows[-1]
    assert all(value.dtype == np.int32 and value.ndim == 1 for value in row.values())
    assert row["teacher_ids"].tolist() == family("byte-level").encode(TEXTS[-1]).ids[:24]
    assert rows[np.int64(17)]["student_ids"].tolist() == rows[17 - len(rows)]["student_ids"].tolist()
    assert sum(1 for _ in rows) == len(rows)
    with pytest.raises(IndexError, match=f"to {len(TEXTS) - 1}, got {len(TEXTS)}"):
        rows[len(TEXTS)]
    again = pickle.loads(pickle.dumps(rows))
    assert len(pickle.dumps(rows)) < 5000 and again[3]["student_ids"].tolist() == rows[3]["student_ids"].tolist()
    with pytest.raises(ValueError, match="read-only"):
        row["teacher_ids"][0] = 1
    # The files are what other readers of Arrow expect.
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_file(str(tmp_path / "shard-00001.arrow"))
    assert table[1]["student_start"] == rows[17]["student_start"].tolist()


def test_read_in_workers_and_by_the_trainer_s_loader(tmp_path) -> None:
    rows = cache(tmp_path, method="reduce")
    collator = vd.AlignmentCollator(family("byte-level"), family("wordpiece"), "reduce", 24)
    want = list(DataLoader(TEXTS, batch_size=10, collate_fn=collator))
    got = list(DataLoader(rows, batch_size=10, collate_fn=collator, num_workers=2))
    assert len(got) == len(want) and all(same(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("kind", ["mappings", "generator", "dataset", "streaming", "processes"])
def test_the_same_files_whatever_the_texts_come_in(tmp_path, kind: str) -> None:
    mappings = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
    options = {}
    texts = mappings
    if kind == "generator":
        texts = (text for text in TEXTS)
    elif kind in ("dataset", "streaming"):
        texts = pytest.importorskip("datasets").Dataset.from_list(mappings)
        texts = texts.to_iterable_dataset(num_shards=3) if kind == "streaming" else texts
    elif kind == "processes":
        texts, options = TEXTS, {"num_proc": 2}
    cache(tmp_path / "plain")
    cache(tmp_path / "other", texts, **options)
    assert contents(tmp_path / "plain") == contents(tmp_path / "other")


def wait_for(run: subprocess.Popen, folder: Path, shards: int) -> list[dict]:
    """The shards that the manifest names once there are so many."""
    done: list[dict] = []
    while len(done) < shards:
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.005)
        path = folder / "manifest.json"
        done = json.loads(path.read_text())["shards"] if path.exists() else []
    return done


def test_continues_after_it_was_killed_and_waits_for_others(tmp_path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    cache(whole, shard_size=4)
    run = elsewhere(folder, shard_size=4, num_proc=1)
    done = wait_for(run, folder, 2)
    run.send_signal(signal.SIGKILL)
    run.wait(timeout=60)
    run.stderr.close()
    assert len(done) < len(TEXTS) // 4 - 4
    with pytest.raises(VocabdistilError, match=r"is not finished \(\d+ texts so far\); cache_aligned continues it"):
        AlignedDataset(folder)
    # What a kill in the middle of a shard leaves.
    (folder / ".shard-00009.arrow.x").write_bytes(b"half")
    before = {path: path.stat().st_mtime_ns for path in folder.glob("shard-*")}
    run = elsewhere(folder, shard_size=4)
    wait_for(run, folder, len(before) + 1)
    rows = cache(folder, shard_size=4)
    # The other one had finished before this one was let in.
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 0, errors
    kept = [path for path, when in before.items() if path.stat().st_mtime_ns == when]
    assert len(kept) >= len(done)
    assert contents(folder) == contents(whole) and len(rows) == len(TEXTS)


def test_stopped_by_an_error_in_the_texts(tmp_path) -> None:
    def broken():
        yield from TEXTS[:20]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        cache(tmp_path, broken())
    assert sorted(contents(tmp_path)) == ["manifest.json", "shard-00000.arrow"]
    with pytest.raises(TypeError, match=r"texts\[18\]: expected a string or a mapping with 'text', got int"):
        cache(tmp_path, [*TEXTS[:18], 4])
    with pytest.raises(ValueError, match=r"texts\[17\]: expected text that UTF-8 can hold"):
        cache(tmp_path, [*TEXTS[:17], "\ud800"])
    assert len(cache(tmp_path)) == len(TEXTS)


def test_a_finished_folder_is_checked_and_left_alone(tmp_path) -> None:
    cache(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name != ".lock"}
    assert len(cache(tmp_path)) == len(TEXTS)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "match"}, r"another method \(boundary, now match\)"),
        ({"max_length": 25}, r"another max_length \(\[24, 24\], now \[25, 25\]\)"),
        ({"max_length": (24, None)}, r"now \[24, None\]\)"),
        ({"shard_size": 8}, r"another shard_size \(16, now 8\)"),
        ({"teacher": "byte-level small"}, "another teacher's tokenizer"),
        ({"student": "wordpiece uncased"}, "another student's tokenizer"),
        ({"texts": [*TEXTS[:20], "other", *TEXTS[21:]]}, "other texts: they differ among the texts 16 to 31"),
        ({"texts": TEXTS[:-1]}, "other texts: they differ among the texts 48 to"),
        ({"texts": [*TEXTS, "more"]}, f"was made of the first {len(TEXTS)} of these texts"),
    ],
)
def test_refuses_a_folder_made_otherwise(tmp_path_factory, options, message: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "made"
    if not folder.exists():
        cache(folder)
    before = contents(folder)
    with pytest.raises(VocabdistilError, match=message) as caught:
        cache(folder, **options)
    assert str(folder) in str(caught.value) and contents(folder) == before


def test_other_tables_make_another_cache(tmp_path) -> None:
    table = vd.RemapTable.from_tokenizers(family("byte-level"), family("wordpiece"))
    cache(tmp_path, method="reduce", table=table)
    with pytest.raises(VocabdistilError, match="another table"):
        cache(tmp_path, method="reduce")


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing", "manifest", "manifest cut"])
def test_damage_is_noticed(tmp_path, damage: str) -> None:
    cache(tmp_path)
    shard = tmp_path / "shard-00001.arrow"
    data = shard.read_bytes()
    if damage == "truncated":
        shard.write_bytes(data[:-100])
        message = f"shard-00001.arrow is damaged: expected {len(data)} bytes, got {len(data) - 100}"
    elif damage == "changed":
        middle = len(data) // 2
        shard.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
        message = "shard-00001.arrow is damaged: expected checksum"
    elif damage == "missing":
        shard.unlink()
        message = "shard-00001.arrow is missing"
    else:
        path = tmp_path / "manifest.json"
        path.write_text("{}" if damage == "manifest" else path.read_text()[:50])
        message = "manifest.json is damaged"
    for reopen in (lambda: AlignedDataset(tmp_path), lambda: cache(tmp_path)):
        with pytest.raises(VocabdistilError, match=message):
            reopen()
    if damage == "changed":
        # Without the checksum, what Arrow can see of it: its frame.
        shard.write_bytes(b"\xff" * len(data))
        rows = AlignedDataset(tmp_path, verify=False)
        assert len(rows[0]["teacher_ids"])
        with pytest.raises(VocabdistilError, match="shard-00001.arrow is damaged"):
            rows[20]


def test_every_field_of_the_manifest_is_checked(tmp_path) -> None:
    cache(tmp_path)
    path = tmp_path / "manifest.json"
    good = path.read_text()
    assert len(json.loads(good)["shards"]) > 1
    gone = object()
    for keys, value, message in (
        (("format",), gone, "format: expected a number, got nothing"),
        (("format",), "1", "format: expected a number, got '1'"),
        (("format",), 2, "format: expected 1, got 2"),
        (("method",), "words", "method: expected .* got 'words'"),
        (("method",), ["word"], "method: expected"),
        (("max_length",), 5, "max_length: expected two numbers of at least 1, or null, got 5"),
        (("max_length",), [4, 0], "max_length: expected"),
        (("max_length",), gone, "max_length: expected .* got nothing"),
        (("shard_size",), 0, "shard_size: expected a number of at least 1, got 0"),
        (("shard_size",), True, "shard_size: expected a number of at least 1, got True"),
        (("shard_size",), 15, r"shards\[0\]: rows: expected 15, as shard_size, got 16"),
        (("teacher",), None, "teacher: expected a string, got None"),
        (("table",), 3, "table: expected a string or null, got 3"),
        (("matched",), gone, "matched: expected a string or null, got nothing"),
        (("complete",), 1, "complete: expected true or false, got 1"),
        (("shards",), {}, "shards: expected a list"),
        (("shards", 1), 7, r"shards\[1\]: expected an object, got 7"),
        (("shards", 1, "rows"), -5, r"shards\[1\]: rows: expected a number of at least 1, got -5"),
        (("shards", 0, "rows"), 3, r"shards\[0\]: rows: expected 16, as shard_size, got 3"),
        (("shards", 0, "bytes"), 1.5, r"shards\[0\]: bytes: expected a number, got 1.5"),
        (("shards", 0, "crc32"), None, r"shards\[0\]: crc32: expected a number, got None"),
        (("shards", 0, "texts"), gone, r"shards\[0\]: texts: expected a string, got nothing"),
    ):
        manifest = json.loads(good)
        place = manifest
        for key in keys[:-1]:
            place = place[key]
        if value is gone:
            del place[keys[-1]]
        else:
            place[keys[-1]] = value
        path.write_text(json.dumps(manifest))
        for reopen in (lambda: AlignedDataset(tmp_path), lambda: cache(tmp_path)):
            with pytest.raises(VocabdistilError, match=f"manifest.json.*{message}"):
                reopen()
    path.write_text("[" * 100_000)
    with pytest.raises(VocabdistilError, match="manifest.json is damaged"):
        AlignedDataset(tmp_path)
    path.write_text(good)
    assert len(cache(tmp_path)) == len(TEXTS)


def test_nothing_follows_a_short_shard(tmp_path) -> None:
    cache(tmp_path)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    assert 0 < manifest["shards"][-1]["rows"] < manifest["shard_size"]
    # As if the job had been killed between its last shard and its end.
    path.write_text(json.dumps({**manifest, "complete": False}))
    with pytest.raises(VocabdistilError, match=f"was made of the first {len(TEXTS)} of these texts"):
        cache(tmp_path, [*TEXTS, "one more"])
    assert len(cache(tmp_path)) == len(TEXTS) and json.loads(path.read_text()) == manifest


def test_other_folders(tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(VocabdistilError, match="has other files and no manifest.json"):
        cache(tmp_path)
    with pytest.raises(VocabdistilError, match="is not a folder"):
        cache(tmp_path / "notes.txt")
    with pytest.raises(VocabdistilError, match="holds no aligned texts"):
        AlignedDataset(tmp_path / "nowhere")
    assert len(cache(tmp_path / "empty", [])) == 0
    assert len(AlignedDataset(tmp_path / "empty")) == 0


def test_bad_arguments(tmp_path) -> None:
    for options, kind, message in (
        ({"texts": "one text"}, TypeError, "texts: expected strings or mappings with 'text', got str"),
        ({"shard_size": 0}, ValueError, "shard_size: expected an integer of at least 1, got 0"),
        ({"num_proc": -1}, ValueError, "num_proc: expected an integer of at least 0"),
        ({"method": "words"}, ValueError, "method: expected one of"),
        ({"max_length": 0}, ValueError, "max_length: expected at least 1"),
        ({"method": "reduce", "table": 3}, TypeError, "table: expected a RemapTable, got int"),
    ):
        with pytest.raises(kind, match=message):
            cache(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_cache_without_pyarrow(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        cache(tmp_path)
