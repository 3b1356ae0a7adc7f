"""The folder of a run while it lasts, ``out.partial``, held by one process; ``out`` appears when it is whole."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..core.errors import VocabdistilError, need, spell
from ..core.files import files_in, finish_folder, make_folder, remove_folders, told, write_json

__all__ = [
    "METRICS",
    "Diverged",
    "Interrupted",
    "OtherRun",
    "RunFolder",
    "check_out",
    "checkpoint_step",
    "is_whole",
    "last_checkpoint",
    "look_at_run",
    "need_makeable",
    "partial_of",
    "seal",
]

METRICS = "metrics.json"
_RECORD, _LOCK, _SEAL = "run.json", ".lock", "whole.json"
# Of the record and of what makes a run go on as if it had not stopped: the order of its texts, what a checkpoint is.
_FORMAT = 4


class Interrupted(KeyboardInterrupt):
    """Training stopped on a signal after it saved a checkpoint; the text says how to go on."""


class OtherRun(VocabdistilError):
    """What was to be continued is another run, which is left as it is."""


class Diverged(VocabdistilError):
    """The losses are not finite: going on would end the same way."""


def seal(checkpoint: Path) -> None:
    """Says of a checkpoint that it is whole; for when all of its files are written."""
    finish_folder(checkpoint)
    (checkpoint / _SEAL).unlink(missing_ok=True)
    write_json(checkpoint / _SEAL, files_in(checkpoint))


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was sealed, and has the files that it had then."""
    try:
        sizes = json.loads((checkpoint / _SEAL).read_text(encoding="utf-8"))
        found = files_in(checkpoint)
        return all(found[name] == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole."""
    return max(filter(is_whole, folder.glob("checkpoint-*")), key=checkpoint_step, default=None)


def checkpoint_step(checkpoint: Path | None) -> int:
    """The step of a checkpoint; 0 without one."""
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


def _foreign(folder: Path) -> str | None:
    """A file of a finished folder that no run wrote, if there is one."""
    try:
        ours = set(json.loads((folder / METRICS).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    return next((name for name in files_in(folder) if name not in ours), None)


def partial_of(out: Path) -> Path:
    """Where a run is while it lasts."""
    return Path(f"{out}.partial")


def check_out(out: Path, overwrite: bool, inputs: Sequence[str] = (), resume: bool | None = None) -> None:
    """Raises unless a run may write ``out``: nothing is there, or with ``overwrite`` what a run wrote, or an empty
    folder; and where it would be while it lasts is a run or nothing.

    Args:
        inputs: the files and folders that the run reads, which must stay.
        resume: there must be a run to go on with.
    """
    for name in inputs:
        path = Path(os.path.realpath(name))
        for place in (out, partial_of(out)):
            if Path(os.path.realpath(place)) in (path, *path.parents):
                raise VocabdistilError.of("out", f"{place} holds {name}, which the run reads")
    need(out.name not in ("", ".."), "out", "the name of a folder", out)
    # These cannot be renamed, and a link would be replaced instead of what it leads to.
    need(not out.is_symlink(), "out", "a folder by its own name", f"{out}, a symbolic link to {os.path.realpath(out)}")
    need(not os.path.ismount(out), "out", "a folder that can be replaced", f"{out}, where something is mounted")
    path = partial_of(out)
    if os.path.lexists(path):
        if not _is_run(path):
            raise VocabdistilError.of("out", f"{path}, where the run would be while it lasts, holds something else")
    elif resume:
        raise VocabdistilError.of("resume", f"no interrupted run at {path}")
    above = next(folder for folder in out.absolute().parents if os.path.lexists(folder))
    if not above.is_dir():
        raise VocabdistilError.of("out", f"cannot make {out}: {above} is not a folder")
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise VocabdistilError.of("out", f"{out} exists; {spell('overwrite', True)} replaces it")
    if not out.is_dir():
        raise VocabdistilError.of("out", f"{out} is not a folder")
    if (foreign := _foreign(out)) is not None:
        problem = f"{out} holds {foreign}, which no run wrote there; {spell('overwrite', True)} leaves it alone"
        raise VocabdistilError.of("out", problem)


def need_makeable(folder: Path) -> None:
    """Raises VocabdistilError where a folder cannot be made: it is, and what was not there is removed again."""
    try:
        remove_folders(make_folder(folder))
    except OSError as error:
        raise VocabdistilError.of("out", f"cannot make {folder}: {error.strerror}") from None


def look_at_run(out: Path, overwrite: bool, inputs: Sequence[str] = (), resume: bool | None = None) -> None:
    """:func:`check_out`, and of a run that was interrupted there whether it may be continued or replaced, as far as
    its folder tells; what another process holds, or held when it was killed, is for :meth:`RunFolder.open`."""
    check_out(out, overwrite, inputs, resume)
    path = partial_of(out)
    if os.path.lexists(path) and not (path / _LOCK).exists():
        _earlier(path, resume, overwrite)


@dataclass
class RunFolder:
    """``out.partial``, and what the stages of a run stored there.

    Attributes:
        out: what the run is to write.
        path: its folder until then.
        record: what its stages found.
        replaces: whether there is an ``out`` that it takes the place of.
    """

    out: Path
    path: Path
    record: dict[str, Any]
    replaces: bool
    _lock: FileLock | None
    # The folders that were made for it, the innermost first.
    _made: list[Path] = field(default_factory=list)

    @classmethod
    def open(
        cls, out: str | os.PathLike[str], identity: dict[str, Any], resume: bool | None, overwrite: bool
    ) -> RunFolder:
        """Makes the folder or, to resume, checks that it belongs to the same run; :meth:`held` gives it free again.

        Args:
            identity: what must not change between an interrupted run and its continuation, by the name of its option.
            resume: continue; None: this kind of run cannot be.

        Raises:
            VocabdistilError: ``out`` is not to be replaced, another process writes it, there is an interrupted run that
                was neither to be resumed nor overwritten, or the run to resume is another one.
        """
        out = Path(out)
        check_out(out, overwrite, resume=resume)
        path = partial_of(out)
        fresh = not os.path.lexists(path)
        lock = FileLock(str(path / _LOCK))
        self = cls(out, path, {}, False, lock)
        identity = json.loads(json.dumps(identity))
        if not fresh and not (path / _LOCK).exists():
            # Nobody writes there, and what is refused stays as it is, without a lock.
            self._record(identity, resume, overwrite)
        try:
            self._made = make_folder(path)
            lock.acquire(timeout=0)
        except Timeout:
            raise VocabdistilError.of("out", f"{out} is being written by {_holder(path)}") from None
        except OSError as error:
            raise VocabdistilError.of("out", f"cannot make {path}: {error.strerror}") from None
        try:
            self._restore()
            check_out(out, overwrite)
            self.replaces = out.exists()
            self._begin(identity, resume, overwrite)
        except BaseException:
            if fresh:
                self._remove()
            lock.release()
            raise
        return self

    @classmethod
    def follow(cls, out: str | os.PathLike[str], record: dict[str, Any]) -> RunFolder:
        """The folder of a run that another process has opened, which stored ``record``; only read."""
        return cls(Path(out), partial_of(Path(out)), record, False, None)

    def _remove(self) -> None:
        """The folder, and those made for it."""
        shutil.rmtree(self.path, ignore_errors=True)
        remove_folders(self._made)

    @property
    def _aside(self) -> Path:
        """Where an earlier ``out`` is while the new one takes its name."""
        return self.path / "replaced"

    def _restore(self) -> None:
        if self._aside.exists() and not self.out.exists():
            os.rename(self._aside, self.out)

    def _record(self, identity: dict[str, Any], resume: bool | None, overwrite: bool) -> dict[str, Any]:
        """What the run begins with, or goes on from."""
        record = _earlier(self.path, resume, overwrite)
        if record is None:
            return {"format": _FORMAT, "identity": identity}
        for name, value in identity.items():
            before = record["identity"].get(name)
            if before != value:
                what = f"{value} differs from ({before}) of the run that {spell('resume', True)} would continue"
                raise VocabdistilError.of(name, what)
        return record

    def _begin(self, identity: dict[str, Any], resume: bool | None, overwrite: bool) -> None:
        self.record = self._record(identity, resume, overwrite)
        if resume:
            for checkpoint in self.path.glob("checkpoint-*"):
                if not is_whole(checkpoint):
                    # It would count as one of those that are kept.
                    shutil.rmtree(checkpoint)
        else:
            for left_over in self.path.iterdir():
                if left_over.is_dir() and not left_over.is_symlink():
                    shutil.rmtree(left_over)
                elif left_over.name != _LOCK:
                    left_over.unlink()
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        with told("out", self.path):
            self.store(holder=f"process {os.getpid()} on {socket.gethostname()} since {since}")

    def store(self, **found: Any) -> None:
        """What a later stage, or a run that is resumed, needs of this one."""
        self.record.update(found)
        write_json(self.path / _RECORD, self.record)

    @contextmanager
    def held(self) -> Iterator[None]:
        """While the run writes to its folder; after an error the folder stays only if the run can be resumed.

        Raises:
            VocabdistilError: the disk is full.
        """
        if self._lock is None:
            yield
            return
        try:
            with told("out", self.path):
                yield
        except BaseException as error:
            hopeless = isinstance(error, Diverged) or last_checkpoint(self.path) is None
            if hopeless and not isinstance(error, (Interrupted, OtherRun)):
                self._remove()
            raise
        finally:
            self._lock.release()

    def begin_result(self) -> Path:
        """An empty folder for what ``out`` is to hold."""
        final = self.path / "final"
        shutil.rmtree(final, ignore_errors=True)
        final.mkdir()
        return final

    def publish(self, final: Path, metrics: dict[str, Any]) -> Path:
        """The last of a run: ``final`` gets ``metrics.json`` and its name; the folder of the run is removed.

        Args:
            metrics: gets ``"files"``, the files of the folder, by which a later run knows what it may replace.

        Returns:
            ``out``.
        """
        metrics["files"] = sorted([*files_in(final), METRICS])
        write_json(final / METRICS, metrics)
        finish_folder(final)
        try:
            if self.out.exists():
                os.rename(self.out, self._aside)
            os.rename(final, self.out)
        finally:
            self._restore()
        shutil.rmtree(self.path)
        return self.out

    @property
    def place(self) -> str:
        """Where the result is, in words."""
        return f"in {self.out}" + (", in place of what was there" if self.replaces else "")


def _earlier(path: Path, resume: bool | None, overwrite: bool) -> dict[str, Any] | None:
    """The record of the run to continue, if one is to be.

    Raises:
        VocabdistilError: there is none of this version; or there is a run that is neither to be continued nor replaced.
    """
    if not resume:
        if (path / _RECORD).exists() and not overwrite:
            again = "" if resume is None else f"{spell('resume', True)} continues it, "
            problem = f"{path} holds an interrupted run; {again}{spell('overwrite', True)} starts anew"
            raise VocabdistilError.of("out", problem)
        return None
    try:
        record = json.loads((path / _RECORD).read_text(encoding="utf-8"))
        record["identity"] = dict(record["identity"])
    except (OSError, ValueError, TypeError, KeyError):
        raise VocabdistilError.of("resume", f"{path} holds no run to continue") from None
    if record.get("format") != _FORMAT:
        anew = f"{spell('overwrite', True)} starts anew"
        raise VocabdistilError.of("resume", f"{path} holds a run of another version; {anew}")
    return record


def _is_run(path: Path) -> bool:
    """Whether it is the folder of a run, or an empty one."""
    if path.is_symlink() or not path.is_dir():
        return False
    names = {file.name for file in path.iterdir()}
    return _RECORD in names or names <= {_LOCK}


def _holder(path: Path) -> str:
    try:
        return json.loads((path / _RECORD).read_text(encoding="utf-8"))["holder"]
    except (OSError, ValueError, TypeError, KeyError):
        return "another process"
