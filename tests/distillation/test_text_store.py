"""The text of a run on disk: whole or not there, the same as what was read, in little memory."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import tracemalloc
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import vocabdistil as vd
from tests.runs import at_step, interrupt
from vocabdistil.core.errors import VocabdistilError
from vocabdistil.distillation import text_store
from vocabdistil.distillation.order import TrainingOrder
from vocabdistil.distillation.run_folder import OtherRun, RunFolder
from vocabdistil.distillation.runs import Interrupted
from vocabdistil.distillation.text import Digested, GivenTexts, TextFiles, open_text
from vocabdistil.distillation.text_store import AllBut, TextStore, split_text, stored

TEXTS = [f"text {i} {'é' * (i % 7)}\u2028" for i in range(100)]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text("aé\n€😀", min_size=1), min_size=1, max_size=30))
def test_a_store_holds_what_was_read(tmp_path_factory, texts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_store, "_CHUNK_TEXTS", 4)
        store = TextStore.write(iter(texts), tmp_path_factory.getbasetemp() / "store")
        assert list(store) == [store[i] for i in range(len(store))] == texts
        again = pickle.loads(pickle.dumps(TextStore(store.folder, "p: ")))
        assert list(again) == [again[i] for i in range(len(again))] == ["p: " + text for text in texts]
    read = Digested(texts)
    assert list(read) == texts
    assert read.digest == store.digest == again.digest and read.seen == len(store)
    assert store[-1] == texts[-1] and store[1:-1:2] == texts[1:-1:2]
    for i in (-len(texts) - 1, len(texts)):
        with pytest.raises(IndexError):
            store[i]


def test_a_digest_tells_where_texts_end():
    def digest(texts):
        read = Digested(texts)
        assert list(read) == texts
        return read.digest

    assert len({digest(texts) for texts in (["ab", "c"], ["a", "bc"], ["abc"], ["c", "ab"], ["ab", "c", "c"])}) == 5


@given(st.integers(1, 30).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_all_but_some(case):
    count, out = case
    texts = [str(i) for i in range(count)]
    kept = AllBut(texts, sorted(out))
    expected = [text for i, text in enumerate(texts) if i not in out]
    assert list(kept) == [kept[i] for i in range(len(kept))] == expected
    assert kept[-3:] == expected[-3:]
    for i in (-len(expected) - 1, len(expected)):
        with pytest.raises(IndexError):
            kept[i]


def test_a_split_of_a_store_is_that_of_a_list(tmp_path):
    texts = [f"text {i % 60}" for i in range(100)] + [f"once {i}" for i in range(300)]
    store = TextStore.write(texts, tmp_path / "store")
    for most in (None, 20):
        ours, theirs = split_text(store, 0.2, 3, most=most), split_text(texts, 0.2, 3, most=most)
        assert list(ours.train) == list(theirs.train) and ours.held_out == theirs.held_out
    # What is repeated among the texts that are held out, and nowhere else, is held out once.
    repeated = [f"a {i % 2}" for i in range(8)] + [f"b {i}" for i in range(40)]
    found = split_text(repeated, 0.5, 1, minimum=1)
    assert len(set(found.held_out)) == len(found.held_out) and not set(found.held_out) & set(found.train)
    assert len(found.train) == 24


def peak(act):
    tracemalloc.start()
    try:
        return act(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_reading_splitting_and_ordering_hold_little(tmp_path):
    """Ten times as much text takes as much memory."""

    def run(lines, name):
        path = tmp_path / f"{name}.gz"
        with gzip.open(path, "wt", compresslevel=1) as file:
            file.writelines(f"a line of a text, number {i} of many others\n" for i in range(lines))

        def read():
            store = TextStore.write(TextFiles([path]), tmp_path / name)
            split = split_text(store, 0.05, 0, most=50)
            order = TrainingOrder(split.train, 16, 500, 0)
            for i in range(0, len(order), 500):
                order[i]
            return len(store)

        return peak(read)

    run(1000, "warm")
    (few, little), (many, much) = run(20_000, "few"), run(200_000, "many")
    assert (few, many) == (20_000, 200_000)
    assert much < 1.5 * little + (1 << 20) and much < os.path.getsize(tmp_path / "many" / "texts") / 2


def test_workers_of_a_loader_map_the_store_for_themselves(tmp_path):
    split = split_text(TextStore.write(TEXTS, tmp_path / "store"), 0.1, 0)
    order = TrainingOrder(split.train, 4, 20, seed=1)
    expected = [order[i]["text"] for i in range(len(order))]
    for context in ("fork", "spawn"):
        loader = DataLoader(order, batch_size=4, num_workers=2, collate_fn=list, multiprocessing_context=context)
        assert [item["text"] for batch in loader for item in batch] == expected


# --- in the folder of a run ---


@pytest.fixture
def run(tmp_path):
    """Opens the folder of the run as the job does, and reads the text into it."""

    def read(text, resume=True, **kwargs):
        folder = RunFolder.open(tmp_path / "out", {}, resume, False)
        with folder.held():
            return stored(open_text(text), folder, quiet=True, **kwargs)

    folder = RunFolder.open(tmp_path / "out", {}, False, False)
    folder._lock.release()
    return read


def watch_reading(monkeypatch):
    read = []
    original = text_store.watched

    def watched(texts, quiet):
        read.append(1)
        return original(texts, quiet)

    monkeypatch.setattr(text_store, "watched", watched)
    return read


def test_text_is_read_once_as_long_as_nobody_touches_it(run, tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(TEXTS), encoding="utf-8")
    expected = list(TextFiles([path]))
    read = watch_reading(monkeypatch)
    assert list(run(path)) == expected and len(read) == 1
    assert list(run(path, prompt="query: ")) == ["query: " + text for text in expected] and len(read) == 1
    os.utime(path)
    assert list(run(path)) == expected and len(read) == 2
    # Other files and texts that are given may say the same.
    copy = tmp_path / "b.txt.gz"
    copy.write_bytes(gzip.compress(path.read_bytes()))
    assert list(run(copy)) == list(run(iter(expected))) == expected and len(read) == 4


def test_another_text_is_refused_and_the_run_stays(run, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(TEXTS), encoding="utf-8")
    expected = list(run(path))
    mine = path.read_text(encoding="utf-8")
    stat = path.stat()
    path.write_text(mine.replace("text 50", "text 5x"), encoding="utf-8")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # of the same size, and as old
    with pytest.raises(OtherRun, match="text: the text has changed since the run that resume=True would continue"):
        run(path)
    (tmp_path / "out.partial" / "text" / "whole.json").unlink()
    with pytest.raises(OtherRun):
        run(path)
    path.write_text(mine, encoding="utf-8")
    assert list(run(path)) == expected


@pytest.mark.parametrize("damage", ["texts", "offsets", "whole.json", "cut", "garbled"])
def test_a_store_that_is_not_whole_is_made_again(damage, run, tmp_path):
    run(TEXTS)
    folder = tmp_path / "out.partial" / "text"
    if damage == "garbled":
        (folder / "whole.json").write_text("{}")
    elif damage == "cut":
        os.truncate(folder / "texts", 10)
    else:
        (folder / damage).unlink()
    assert list(run(TEXTS)) == [text.strip() for text in TEXTS]


_KILLED = """
import os, signal, sys
from pathlib import Path
from vocabdistil.distillation import text_store
def texts():
    for i in range(5000):
        if i == 4000:
            os.kill(os.getpid(), signal.SIGKILL)
        yield f"text {i}"
text_store.TextStore.write(texts(), Path(sys.argv[1]))
"""


def test_a_process_that_is_killed_leaves_no_store(run, tmp_path):
    folder = tmp_path / "out.partial" / "text"
    done = subprocess.run([sys.executable, "-c", _KILLED, folder], check=False)
    assert done.returncode == -signal.SIGKILL
    assert folder.exists() and TextStore.whole(folder) is None
    assert list(run(TEXTS)) == [text.strip() for text in TEXTS]


def test_text_that_cannot_be_read_to_the_end_leaves_no_run(text_file, headless_folder, tmp_path):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(text_file.read_bytes() + b"\xff\n")
    short = tmp_path / "short.txt"
    short.write_text("one\ntwo\n")
    for path, message in ((bad, "is not UTF-8"), (short, "too little text: 2 examples")):
        for teach in (True, False):
            with pytest.raises(VocabdistilError, match=f"text: .*{message}"):
                if teach:
                    vd.train_teacher(text=path, out=tmp_path / "out", quiet=True)
                else:
                    vd.distill(teacher=headless_folder, text=path, out=tmp_path / "out", quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.txt", "short.txt"]


def test_a_run_on_an_iterator_of_rows_is_resumed(demo_lines, tmp_path, monkeypatch):
    def rows():
        return ({"text": text, "n": i} for i, text in enumerate(demo_lines[:400]))

    small = {"vocab_size": 300, "layers": 1, "dim": 16, "heads": 2, "max_length": 24, "batch_size": 8, "quiet": True}
    teacher = tmp_path / "teacher"
    text = tmp_path / "rows.jsonl"
    text.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    vd.train_teacher(text=text, out=teacher, steps=2, **small)
    options = {
        "teacher": teacher, "out": tmp_path / "s", "vocab_size": 200, "recipe": "masked", "steps": 4, "save_every": 2,
        "layers": 1, "batch_size": 8, "time_length": 8, "time_batch": 2, "quiet": True,
    }  # fmt: skip
    at_step(monkeypatch, 2, interrupt)
    with pytest.raises(Interrupted):
        vd.distill(text=rows(), **options)
    with pytest.raises(OtherRun, match="text: the text has changed since"):
        vd.distill(text=islice(rows(), 399), resume=True, **options)
    result = vd.distill(text=rows(), resume=True, **options)
    assert result.metrics["steps"] == 4 and result.metrics["train_texts"] == 380


def test_given_texts_may_be_a_data_set(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": [f" {text}" for text in TEXTS] + [""], "n": list(range(101))})
    expected = [text.strip() for text in TEXTS]
    for given_data in (data, data.to_iterable_dataset(num_shards=3), data.with_format("numpy")):
        assert list(GivenTexts(given_data)) == expected
    streamed = datasets.IterableDataset.from_generator(lambda: ({"text": text} for text in TEXTS))
    assert list(GivenTexts(streamed)) == expected
    with pytest.raises(VocabdistilError, match="text: expected a data set with a column 'text', got sentence, n"):
        list(GivenTexts(data.rename_column("text", "sentence")))
    empty = datasets.Dataset.from_dict({"text": [None]})
    with pytest.raises(VocabdistilError, match="text: expected strings, or rows .* got NoneType at 0"):
        list(GivenTexts(empty))


def test_a_random_place_is_read_as_any(tmp_path):
    store = TextStore.write((f"{i} " * (i % 50 + 1) for i in range(5000)), tmp_path / "store")
    for i in random.Random(0).sample(range(5000), 200):
        assert store[i] == f"{i} " * (i % 50 + 1)
