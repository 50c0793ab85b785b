"""Errors a user can cause, told so that the user can mend them."""

from __future__ import annotations

import argparse
from typing import NoReturn

# Exit status of a process that SIGTERM or SIGUSR1 ended without saving: 128 and SIGTERM, as a shell has it.
LEFT = 143


class ConfigError(ValueError):
    """A configuration that cannot be run: the message names the key, its value and what would be accepted.

    Attributes:
        on_all_ranks: whether every rank raises it, so that one of them telling is enough.
    """

    on_all_ranks = False


class TrainingError(RuntimeError):
    """A run that must stop, on all ranks: the message says at which step and why."""

    on_all_ranks = True


class SuspiciousStep(TrainingError):
    """A step whose loss, gradient or weights are not finite, or an outlier."""


class Interrupted(TrainingError):
    """A run that the user stopped (Ctrl-C, SIGINT): the message says where."""


class Saved(TrainingError):
    """A run that has left before its end, is saved, and goes on when it is started again: the message says why and
    where."""


class GridChange(Saved):
    """The next stage of the run has another process grid: the message says which."""


class OneLineParser(argparse.ArgumentParser):
    """Refuses options and arguments in one line, as everything else that a user can mend is refused. Exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help says what there is\n")


def exit_status(error: BaseException) -> int:
    """Of a process that ends with the error: 2 for a configuration, 3 for a run that is saved and goes on when it is
    started again, 130 for an interruption, else 1."""
    if isinstance(error, (Interrupted, KeyboardInterrupt)):
        return 130
    if isinstance(error, Saved):
        return 3
    return 2 if isinstance(error, ConfigError) else 1


def require(condition: bool, key: str, value: object, accepted: str) -> None:
    """Refuse a configuration value.

    Raises:
        ConfigError: ``key=value: accepted`` unless the condition holds.
    """
    if not condition:
        raise ConfigError(f"{key}={value!r}: {accepted}")


def require_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is not one of the choices."""
    require(value in choices, key, value, f"must be one of {', '.join(choices)}")


def one_line(error: BaseException) -> str:
    """An error of another library's, its kind and what it says, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
