"""How a student can be made again: the command, or the call in Python, with what differs from the defaults."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from ..core.options import names_of
from ..models.presets import Preset
from .options import StudentOptions

__all__ = ["command_of"]

# What makes no other student.
_FREE = ("text", "out", "teacher", "overwrite", "quiet", "resume")


def _default(field: Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _plain(value: Any) -> Any:
    """A value as the command line takes it, a group of numbers by their names."""
    if isinstance(value, Mapping):
        return ",".join(f"{name}={json.dumps(item)}" for name, item in value.items())
    if is_dataclass(value) and not isinstance(value, Preset):
        return ",".join(f"{field.name}={getattr(value, field.name)}" for field in fields(value))
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def command_of(command: str, options: StudentOptions, files: Sequence[str] | None) -> tuple[str, str]:
    """The language (``"bash"`` or ``"python"``) and the text of what makes the same student again.

    A call in Python where the command line cannot say it: texts that were in no file, a preset of one's own, lists
    among training arguments.

    Args:
        command: ``"trim"`` or ``"distill"``.
        options: of the run.
        files: the text, if it came from files.
    """
    given: dict[str, Any] = {}
    for field in fields(options):
        value, default = getattr(options, field.name), _default(field)
        if field.name not in _FREE and value != default:
            given[field.name] = _plain(value)
    presets = any(isinstance(value, Preset) for value in given.values())
    mappings = {name: value for name, value in vars(options).items() if name in given and isinstance(value, Mapping)}
    nested = any(isinstance(item, (list, tuple, Mapping)) for value in mappings.values() for item in value.values())
    if nested:  # for which there is no NAME=VALUE
        given |= {name: dict(value) for name, value in mappings.items()}
    if files is None or presets or nested:
        return "python", _call(command, options, files, given, presets)
    parts = [f"vocabdistil {command}"]
    parts += [_option("teacher", teacher) for teacher in names_of(options.teacher)]
    # A file whose name begins with a dash would be an option.
    parts += [f"--text {shlex.join(f'./{name}' if name.startswith('-') else name for name in files)}"]
    parts += [_option("out", options.out)]
    for name, value in given.items():
        if isinstance(value, bool):
            parts.append(f"--{'' if value else 'no-'}{name.replace('_', '-')}")
        else:
            value = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            parts.append(_option(name, value))
    return "bash", " \\\n  ".join(parts)


def _option(name: str, value: str | os.PathLike) -> str:
    value = os.fspath(value)
    return f"--{name.replace('_', '-')}{'=' if value.startswith('-') else ' '}{shlex.quote(value)}"


def _call(
    command: str, options: StudentOptions, files: Sequence[str] | None, given: dict[str, Any], presets: bool
) -> str:
    lines = ["import vocabdistil as vd"]
    if presets:
        lines.append("from vocabdistil.models.students import Preset")
    teachers = names_of(options.teacher)
    teacher = teachers[0] if len(teachers) == 1 else teachers
    text = "texts" if files is None else repr(list(files))
    lines += [
        "",
        f"vd.{command}(",
        f"    teacher={teacher!r},",
        f"    text={text},",
        f"    out={os.fspath(options.out)!r},",
    ]
    lines += [f"    {name}={value!r}," for name, value in given.items()]
    return "\n".join([*lines, ")"])
