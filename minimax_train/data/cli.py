"""``minimax-data COMMAND [overrides]``: what is done with data without training."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence

from minimax_train.config import Config, load_config
from minimax_train.data.show_command import show_mixture
from minimax_train.data.tokenize import tokenize
from minimax_train.errors import ConfigError, OneLineParser, TrainingError, exit_status, require
from minimax_train.metrics.console import Output, to_stderr

_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # of what is read, none of these is told
_EPILOG = "Overrides are those of minimax-train, such as data=files; --help behind a command says what it takes."


def main(arguments: Sequence[str] | None = None) -> int:
    """Console script. Exit status 2 for what cannot be done as it was asked for, 1 for what had to stop."""
    commands = "; ".join(f"{name}: {command.__doc__}" for name, command in COMMANDS.items())
    parser = OneLineParser("minimax-data", description="Data without training.", epilog=_EPILOG)
    parser.add_argument("command", choices=COMMANDS, help=commands)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="overrides and options")
    options = parser.parse_args(arguments)
    try:
        COMMANDS[options.command](options.arguments)
    except (ConfigError, TrainingError) as error:
        to_stderr(f"error: {' '.join(str(error).split())}")
        return exit_status(error)
    except OSError as error:
        to_stderr(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        to_stderr("error: interrupted; the same command goes on")
        return 130
    return 0


def _tokenize(arguments: Sequence[str]) -> None:
    """writes the documents as tokens to output=PREFIX"""
    parser = _parser("tokenize", "Write the training and held-out documents as tokens, once.")
    parser.add_argument("--num-workers", default=_cores(), metavar="N", help="processes (default: %(default)s)")
    config, output, options = _configured(parser, arguments)
    number = options.num_workers
    fits = str(number).isdecimal() and 1 <= int(number) <= 2**10
    require(fits, "--num-workers", number, "must be between 1 and 1024")
    try:
        tokenize(config.data, config.model.vocab_size, output, num_workers=int(number), report=to_stderr)
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        raise TrainingError(f"output={output!r}: cannot be written: {error}") from error
    Output(sys.stdout).write(
        f"done: train with data.format=megatron and data.tokenizer={output}-tokenizer on the .bin files\n"
    )


def _show(arguments: Sequence[str]) -> None:
    """shows what the recipe takes out of the data"""
    show_mixture(arguments)


# By name. A command parses its own arguments; the first line of its docstring is its help.
COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"show": _show, "tokenize": _tokenize}


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = OneLineParser(f"minimax-data {command}", description=description, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, and output=PREFIX")
    parser.add_argument("--config-dir", action="append", default=[], help="a folder of your own configuration groups")
    return parser


def _configured(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[Config, str, argparse.Namespace]:
    """The configuration that the overrides give, ``output``, and the options."""
    options = parser.parse_intermixed_args(arguments)
    named = [override for override in options.overrides if override.startswith("output=")]
    config = load_config([each for each in options.overrides if each not in named], config_dirs=options.config_dir)
    output = os.path.abspath(os.path.expanduser(named[-1].partition("=")[2])) if named else ""
    accepted = "must name where the files go: output=PREFIX"
    fits = bool(named) and output.isprintable() and not named[-1].endswith(("/", "="))
    require(fits, "output", named[-1].partition("=")[2] if named else "", accepted)
    return config, output, options


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
