"""Test tiers: which part of the package a run has proven. The count per tier stands at the end of every run, and a
whole run fails if a tier that could run here ran nothing."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from benchmarks.static import find_tool

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network

HAS_PYBIND = importlib.util.find_spec("pybind11") is not None
HAS_TRITON = importlib.util.find_spec("triton") is not None
# Before 3.3 the compiler took its arguments in another form.
HAS_TRITON_COMPILER = HAS_TRITON and tuple(map(int, version("triton").split(".")[:2])) >= (3, 3)
# tier -> (what the path below tests/ begins with, whether it can run here)
TIERS: dict[str, tuple[tuple[str, ...], bool]] = {
    "reference": (("reference/",), True),
    "C++ on CPU": (("ops/", "alignment/", "test_fuzz"), True),
    "Triton, interpreted": (("test_triton.py", "triton_interpreted/"), HAS_TRITON),
    "Triton, compiled": (("test_triton_compile",), HAS_TRITON_COMPILER),
    "CUDA, on the host": (("test_cuda_host",), HAS_PYBIND and shutil.which("c++") is not None),
    "CUDA, compiled": (
        ("test_cuda_build", "test_cuda_static"),
        all(map(find_tool, ("nvcc", "ptxas"))),
    ),
    "PTX, interpreted": (("test_ptx",), True),
    "GPU": (("test_gpu",), torch.cuda.is_available()),
    "package": (("",), True),
}


def tier_of(path: Path) -> str:
    place = path.relative_to(Path(__file__).parent).as_posix()
    return next(tier for tier, (prefixes, _) in TIERS.items() if place.startswith(prefixes))


# Minutes each. They come first, or a run in several processes ends with one of them in one process alone.
LONG = (
    "test_triton.py", "test_readme.py", "distillation/test_architectures.py", "test_fuzz.py", "test_cuda_host.py",
    "test_ptx_triton.py", "test_ptx.py",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    # Of pytest-xdist, which puts files of few tests last, however long they take.
    config.option.loadscopereorder = False
    config.stash[counts_key] = dict.fromkeys(TIERS, 0)
    config.pluginmanager.register(_Count(config))


counts_key = pytest.StashKey[dict[str, int]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONG))
    for item in items:
        if item.path.name.startswith("test_triton_compile") and not HAS_TRITON_COMPILER:
            item.add_marker(pytest.mark.skip(reason="needs triton 3.3"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="torch finds no CUDA device"))


class _Count:
    """Counts reports rather than tests, as these may run in several processes (``-n 2``), which report to the first."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and not report.skipped:
            path = self.config.rootpath / report.nodeid.split("::")[0]
            # A test that runs others in a process of their own says how many.
            self.config.stash[counts_key][tier_of(path)] += dict(report.user_properties).get("tests", 1)


def _empty_tiers(config: pytest.Config) -> list[str]:
    if hasattr(config, "workerinput"):  # one of several processes
        return []
    whole = not config.option.keyword and not config.option.markexpr and not config.option.collectonly
    whole = whole and config.args_source is pytest.Config.ArgsSource.TESTPATHS
    counts = config.stash[counts_key]
    return [tier for tier, (_, possible) in TIERS.items() if whole and possible and not counts[tier]]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == pytest.ExitCode.OK and _empty_tiers(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    empty = _empty_tiers(config)
    terminalreporter.section("tests run per tier")
    for tier, count in config.stash[counts_key].items():
        possible = TIERS[tier][1]
        note = "  <- could run here and ran nothing" if tier in empty else "" if possible else "  (cannot run here)"
        terminalreporter.write_line(f"{tier:20} {count:5}{note}")


@pytest.fixture(scope="session")
def demo_lines() -> list[str]:
    from vocabdistil.distillation.demo import demo_text

    return demo_text(1200)


@pytest.fixture(scope="session")
def _short_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vocabdistil.distillation import demo

    train, distill = demo.train_teacher, demo.distill
    folder = tmp_path_factory.mktemp("demo") / "vocabdistil-demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "train_teacher", lambda **options: train(**options | {"steps": 2}))
        patch.setattr(demo, "distill", lambda config: distill(dataclasses.replace(config, steps=2)))
        demo.demo(folder, quiet=True)
    return folder


@pytest.fixture
def demo_folder(_short_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where ``vocabdistil demo`` ran, but for the length of its trainings; the current folder."""
    shutil.copytree(_short_demo, tmp_path / _short_demo.name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory, demo_lines: list[str]) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(demo_lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A BERT of two layers and width 48 with 600 tokens, trained for a moment."""
    import vocabdistil as vd

    out = tmp_path_factory.mktemp("teacher") / "teacher"
    options = {"vocab_size": 600, "layers": 2, "dim": 48, "heads": 4, "max_length": 32}
    return vd.train_teacher(text=text_file, out=out, steps=40, lr=2e-3, quiet=True, **options)


@pytest.fixture(scope="session")
def headless_folder(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Path:
    """The same without its MLM head: an embedder."""
    from transformers import AutoModel, AutoTokenizer

    folder = tmp_path_factory.mktemp("headless") / "teacher"
    AutoModel.from_pretrained(teacher_folder).save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(folder)
    return folder
