"""The error that a user's input can cause."""

from __future__ import annotations

__all__ = ["VocabdistilError"]


class VocabdistilError(ValueError):
    """Bad input: one line that names the file or the argument. The command line prints it and exits with 2."""


def need(ok: bool, name: str, expected: str, value: object) -> None:
    """Raises unless ``ok``: the option ``--name`` was expected to be something else than ``value``."""
    if not ok:
        raise VocabdistilError(f"--{name.replace('_', '-')}: expected {expected}, got {value}")


def need_run_options(config: object) -> None:
    """What every training run asks of its options."""
    for name in ("batch_size", "save_every", "log_every"):
        need(getattr(config, name) > 0, name, "a number above 0", getattr(config, name))
    # Two special tokens and one that can be masked.
    need(config.max_length > 2, "max_length", "a number above 2", config.max_length)
    for name in ("steps", "threads"):
        value = getattr(config, name)
        need(value is None or value > 0, name, "a number above 0", value)
    need(0 < config.lr < float("inf"), "lr", "a number above 0", config.lr)
    need(0 < config.held_out < 1, "held_out", "a share between 0 and 1", config.held_out)
    need(config.unit in ("line", "paragraph"), "unit", "line or paragraph", repr(config.unit))
    need(0 <= config.seed < 2**32, "seed", "a number from 0 to 2^32 - 1", config.seed)
