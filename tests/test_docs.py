"""The pages of the documentation: what is made of the package and of the files at the top of the repository."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import vocabdistil as vd

ROOT = Path(__file__).parent.parent
HOOKS = ROOT / "docs/hooks.py"
pytestmark = pytest.mark.skipif(not HOOKS.is_file(), reason="the pages are not beside the tests")


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("hooks", HOOKS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_has_every_public_name(hooks):
    found = []
    for path in re.findall(r"^::: (\S+)$", "\n".join(hooks.api_pages().values()), re.MULTILINE):
        try:
            found.append(import_module(path))
        except ImportError:
            home, _, name = path.rpartition(".")
            found.append(getattr(import_module(home), name))
    wanted = [getattr(vd, name) for name in vd.__all__ if name != "reference"]
    wanted += [getattr(vd.reference, name) for name in vd.reference.__all__]
    assert len(found) == len(wanted) and {id(thing) for thing in found} == {id(thing) for thing in wanted}


def test_every_page_is_in_the_menu(hooks):
    listed = set(re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    written = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert listed == {*written, *hooks.api_pages(), *hooks.TOP}


def test_links_of_files_lead_to_pages_or_to_the_repository(hooks):
    text = "[a](CONTRIBUTING.md) [b](csrc/ops.h) [c](https://x.org/y) [d](#here) [e](docs/glossary.md)"
    assert hooks.top_page(text, "https://g") == (
        "[a](contributing.md) [b](https://g/blob/main/csrc/ops.h) [c](https://x.org/y) [d](#here) [e](glossary.md)"
    )


def test_it_builds_without_warnings(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    page = (tmp_path / "site/api/ops/index.html").read_text(encoding="utf-8")
    assert "span_kl" in page and ":func:" not in page
