"""What is printed: nothing that happens to the output ends a job, and nothing that is printed steers a terminal."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from rich.table import Table

from vocabdistil.core import clock, console
from vocabdistil.core.console import LastingStream, Reporter
from vocabdistil.core.errors import VocabdistilError, one_line, printable

# Prints more than a pipe holds, with a bar and with tables, and says on another file that it came to its end.
_JOB = """
import os, sys, time
from rich.table import Table
from vocabdistil.core.console import Reporter
from vocabdistil.core.progress import counting
say = Reporter()
table = Table("name")
table.add_row("x" * 100)
for _ in range(2000):
    say.print("a line", "another")
    say.print(table)
with counting("Reading", 3) as advance:
    advance(3)
os.write(int(sys.argv[1]), b"done")
"""


def run(stdout, code=_JOB, **options):
    read, write = os.pipe()
    job = subprocess.Popen([sys.executable, "-c", code, str(write)], stdout=stdout, pass_fds=[write], **options)
    os.close(write)
    return job, read


def test_a_pipe_that_nobody_reads_ends_nothing():
    job, read = run(subprocess.PIPE, stderr=subprocess.PIPE)
    job.stdout.readline()
    job.stdout.close()
    assert job.stderr.read() == b""
    assert job.wait() == 0 and os.read(read, 10) == b"done"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_under_the_output_ends_nothing():
    with open("/dev/full", "wb") as full:
        job, read = run(full, stderr=subprocess.PIPE)
        job.stderr.read()
        job.wait()
    assert os.read(read, 10) == b"done"


def test_no_output_at_all_ends_nothing():
    code = f"import sys; sys.stdout = sys.stderr = None\n{_JOB}"
    job, read = run(subprocess.DEVNULL, code)
    assert job.wait() == 0 and os.read(read, 10) == b"done"


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("ascii", "f\\xe9 \\u20ac \\udc80"), ("utf-8", "fé € \\udc80"), ("latin-1", "fé \\u20ac \\udc80")],
)
def test_what_an_encoding_lacks_is_escaped(encoding, shown):
    raw = io.BytesIO()
    stream = LastingStream(io.TextIOWrapper(raw, encoding=encoding))
    stream.write("fé € \udc80")
    stream.flush()
    assert raw.getvalue().decode(encoding) == shown


def test_control_characters_are_escaped(capsys):
    name = "a\x1b[2Jb\x07\x9bc\u202ed\x7f\rz"
    assert printable(name) == "a\\x1b[2Jb\\x07\\x9bc\\u202ed\\x7f\\rz"
    assert one_line(f"{name}\nend") == str(VocabdistilError(f"{name}\nend"))
    assert one_line(f"{name}\nend").isprintable()
    table = Table("name", title=name)
    table.add_row(name)
    say = Reporter()
    say.print(f"the student is in {name}")
    say.print(table)
    say.status(name)
    shown = capsys.readouterr().out
    assert shown.replace("\n", "").isprintable() and shown.count("\\x1b[2Jb\\x07") == 4


def test_names_are_no_markup(capsys):
    name = "[bold]a[/b] [/] :smile:"
    Reporter().print(f"in {name}")
    assert capsys.readouterr().out == f"in {name}\n"


def test_a_stage_says_when_it_begins(monkeypatch, capsys):
    now = 100.0
    for module in (console, clock):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    say = Reporter()
    say.status("Reading")
    now = 162.7
    say.status("Counting")
    Reporter(quiet=True).status("Nothing")
    assert capsys.readouterr().out == "[0 s] Reading ...\n[63 s] Counting ...\n"
    with clock.one_clock():
        now = 170.0
        with clock.one_clock():
            Reporter().status("A second job")
    Reporter().status("Another")
    assert capsys.readouterr().out == "[7 s] A second job ...\n[0 s] Another ...\n"
    Reporter().print()
    assert capsys.readouterr().out == ""
