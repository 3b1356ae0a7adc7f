"""Files that appear whole: what has their name already."""

from __future__ import annotations

import os

import pytest

from vocabdistil.core.files import whole_file


def test_a_link_is_followed(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder / "file")
    for data in (b"first", b"second"):
        with whole_file(tmp_path / "link") as file:
            file.write(data)
        assert (tmp_path / "link").is_symlink() and (folder / "file").read_bytes() == data
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_what_is_no_file_stays(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for name, reason in (("fifo", "no file that can be replaced"), ("folder", "Is a directory")):
        with pytest.raises(OSError, match=reason), whole_file(tmp_path / name) as file:
            file.write(b"data")
    assert (tmp_path / "fifo").is_fifo() and (tmp_path / "folder").is_dir() and len(list(tmp_path.iterdir())) == 2
