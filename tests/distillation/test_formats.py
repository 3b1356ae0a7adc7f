"""Files of text in every format: recognised by how they begin, read as a stream, named where they are no text."""

from __future__ import annotations

import bz2
import gzip
import json
import subprocess
import sys

import pytest

from vocabdistil.core.errors import VocabdistilError
from vocabdistil.distillation import formats
from vocabdistil.distillation.text import TextFiles, read_text

TEXTS = ["one", "два", "three\u2028and a half", "four {", '{"five": 5}']


def plain(texts):
    return "\n".join(texts).encode()


def rows(texts, **others):
    return b"\n".join(json.dumps({"n": 1, "text": text, **others}, ensure_ascii=False).encode() for text in texts)


def parquet(texts, column="text"):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    out = pa.BufferOutputStream()
    parquet.write_table(pa.table({"n": list(range(len(texts))), column: texts}), out)
    return out.getvalue().to_pybytes()


def zst(data):
    zstandard = pytest.importorskip("zstandard")
    half = len(data) // 2
    return zstandard.compress(data[:half]) + zstandard.compress(data[half:])  # two frames are one file too


def pzst(data):
    """As pzstd writes: before each frame one to be skipped, with its size."""
    frames = [pytest.importorskip("zstandard").compress(part) for part in (data[:9], data[9:])]
    return b"".join(b"\x50\x2a\x4d\x18\x04\0\0\0" + len(frame).to_bytes(4, "little") + frame for frame in frames)


def written(folder, data, name="text.txt"):
    path = folder / name
    path.write_bytes(data)
    return path


def problem(path, unit="line"):
    with pytest.raises(VocabdistilError) as caught:
        read_text([path], unit)
    found = str(caught.value)
    assert found.startswith("text: ") and str(path) in found and "\n" not in found
    return found


def gz(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)  # of all processes of a run of the tests the same


def same(data):
    return data


@pytest.mark.parametrize("pack", [same, gz, zst, pzst])
@pytest.mark.parametrize("make", [rows, lambda texts: b"\xef\xbb\xbf\n\n" + rows(texts).replace(b"\n", b"\r\n\n")])
def test_rows_are_told_by_the_first(tmp_path, pack, make):
    assert read_text([written(tmp_path, pack(make(TEXTS)))]) == TEXTS


@pytest.mark.parametrize("pack", [same, gz, zst])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_plain_text_in_every_encoding(tmp_path, pack, encoding):
    path = written(tmp_path, pack("  one\r\nдва\n\n{three\n".encode(encoding)), "rows.bin")
    assert read_text([path]) == ["one", "два", "{three"]
    assert read_text([path], "paragraph") == ["one два", "{three"]


def test_a_big_endian_mark_is_one_too(tmp_path):
    path = written(tmp_path, b"\xfe\xff" + "one\nдва".encode("utf-16-be"))
    assert read_text([path]) == ["one", "два"]
    assert read_text([written(tmp_path, rows(TEXTS).decode().encode("utf-16"))]) == TEXTS


def test_columns_of_parquet(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "_ROWS", 2)
    path = written(tmp_path, parquet([*TEXTS, " ", ""]), "data.bin")
    assert read_text([path]) == TEXTS
    assert "expected a column 'text', got n, sentence" in problem(written(tmp_path, parquet(TEXTS, "sentence")))
    found = problem(written(tmp_path, parquet(["a", "b", None])))
    assert "row 3: expected a string in column 'text', got None" in found
    assert "is damaged" in problem(written(tmp_path, parquet(TEXTS)[:-20]))
    assert "is compressed Parquet, no text" in problem(written(tmp_path, gz(parquet(TEXTS))))


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson.gz", "a.JSONL.zst", "a.json"])
@pytest.mark.parametrize(
    ("line", "got"),
    [(b'{"texts": "x"}', '{"texts": "x"}'), (b'{"text": 5}', '{"text": 5}'), (b'{"text": "cut', '{"text": "cut'),
     (b'["text"]', '["text"]'), (b"[" * 100_000, "[["), (b"plain", "plain")],
)
def test_a_bad_row_is_told_with_its_line(tmp_path, name, line, got):
    assert read_text([written(tmp_path, rows(TEXTS), name)]) == TEXTS
    for data, number in ((line, 1), (b"\n" + line, 2), (rows(TEXTS) + b"\n\n" + line, len(TEXTS) + 2)):
        found = problem(written(tmp_path, data, name))
        assert f'{name}:{number}: expected a JSON object with a string "text", got {got}' in found


def test_what_begins_as_rows_goes_on_as_rows(tmp_path):
    assert ":6: expected a JSON object" in problem(written(tmp_path, rows(TEXTS) + b"\nand plain text"))
    assert "line 1: expected text that UTF-8 can hold" in problem(written(tmp_path, b'{"text": "\\ud800"}'))
    # Objects without the column are text like any other, unless the name says what they are.
    path = written(tmp_path, b'{"five": 5}\nsix')
    assert read_text([path]) == ['{"five": 5}', "six"]


def test_only_line_feeds_end_rows(tmp_path):
    """Other ends of lines may stand in the strings of JSON."""
    texts = ["a\u2028b", "c\x85d", "e\x1cf".replace("\x1c", "\u2029")]
    assert read_text([written(tmp_path, rows(texts))]) == texts


@pytest.mark.parametrize("pack", [gz, zst])
@pytest.mark.parametrize("make", [plain, rows])
def test_damaged_compression(tmp_path, pack, make):
    data = pack(make([f"{text} {i}" for i in range(5000) for text in TEXTS]))
    path = written(tmp_path, data[:-7])
    TextFiles([path]).look()  # begins well
    assert "is damaged: " in problem(path)
    assert "is damaged: " in problem(written(tmp_path, data[:5]))
    assert "is damaged: " in problem(written(tmp_path, data + b"and more"))
    # What is unpacked of other damage may be found to be no text first.
    middle = len(data) // 2
    problem(written(tmp_path, data[:middle] + bytes(50) + data[middle + 50 :]))


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"PK\x03\x04\x14\0\0\0\x08\0", "is a zip archive, no text"),
        (bz2.compress(b"text"), "is compressed by bzip2, no text"),
        (gz(gz(b"text")), "is compressed twice, no text"),
        (b"\xff\xff\xff\xff\x10\0\0\0", "is an Arrow stream, no text"),
        ("plain".encode("utf-16-le"), "is binary (a zero byte at offset 1), or UTF-16 without a byte order mark"),
        ("plain".encode("utf-16") + b"\n", "is not UTF-16: truncated data"),
        (b"Gr\xfc\xdfe", "is not UTF-8: byte 0xfc at offset 2"),
        (gz(b"x\n" * 5000 + b"Gr\xfc\xdfe"), "is not UTF-8: byte 0xfc at offset 10002"),
        (gz(b""), "is empty"),
        (b"", "is empty"),
        ("\ufeff\n".encode("utf-16-le"), "is empty"),
    ],
)
def test_what_is_no_text_is_named(tmp_path, data, what):
    assert what in problem(written(tmp_path, data))


@pytest.mark.parametrize("pack", [zst, pzst], ids=["zst", "pzst"])
def test_what_is_packed_twice_is_named(tmp_path, pack):
    assert "is compressed twice, no text" in problem(written(tmp_path, gz(pack(b"some text\n" * 9))))


def test_text_that_begins_like_a_format_is_text(tmp_path):
    assert read_text([written(tmp_path, b"%PDF- is how a PDF begins,\nBZh what bzip2 wrote")])[0][:5] == "%PDF-"


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    packed, table = written(tmp_path, zst(b"text"), "a.zst"), written(tmp_path, parquet(TEXTS), "a.parquet")
    for module in ("zstandard", "compression", "compression.zstd", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    assert "is compressed by zstd, for which a package is missing: pip install zstandard" in problem(packed)
    assert "is Parquet, for which a package is missing: pip install pyarrow" in problem(table)


def test_looking_at_text_imports_nothing_heavy(tmp_path):
    files = [written(tmp_path, data, f"{i}.txt") for i, data in enumerate([plain(TEXTS), gz(rows(TEXTS))])]
    code = (
        "import sys; from vocabdistil.distillation.text import TextFiles; TextFiles(sys.argv[1:]).look(); "
        "print([name for name in ('torch', 'pyarrow', 'datasets', 'zstandard', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
