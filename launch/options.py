"""What the commands of ``minimax-launch`` read from their command lines."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence

from minimax_train.config import Config, load_config
from minimax_train.errors import ConfigError


def read_overrides(arguments: Sequence[str]) -> Config:
    """The configuration that overrides and ``--config-dir`` of minimax-train give.

    Raises:
        ConfigError: naming the key or option, its value and what is accepted.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--config-dir", action="append", default=[])
    known, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        raise ConfigError(
            f"{unknown[0]}: must be an override (key=value) or --config-dir; other options come before --"
        )
    return load_config(known.overrides, config_dirs=known.config_dir)


def integer(least: int, greatest: int) -> Callable[[str], int]:
    """A type of argparse options: integers in a range."""

    def parse(given: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", given) or not least <= int(given) <= greatest:
            raise argparse.ArgumentTypeError(f"{given!r}: must be an integer between {least} and {greatest}")
        return int(given)

    return parse


def text(pattern: str, accepted: str) -> Callable[[str], str]:
    """A type of argparse options: text that matches a pattern."""

    def parse(given: str) -> str:
        if not re.fullmatch(pattern, given):
            raise argparse.ArgumentTypeError(f"{given!r}: {accepted}")
        return given

    return parse
