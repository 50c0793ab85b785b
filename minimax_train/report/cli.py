"""``minimax-report RUN...``: one HTML page of some runs. ``minimax-report --wandb``: a workspace of a project."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from minimax_train.errors import ConfigError, OneLineParser
from minimax_train.files import replace_text
from minimax_train.metrics.console import Output, to_stderr
from minimax_train.report.page import page
from minimax_train.report.run import Run
from minimax_train.report.workspace import save


def main(arguments: Sequence[str] | None = None) -> int:
    """Console script. Exit status 2 for a folder that is no run, or a page or a workspace that cannot be written."""
    parser = OneLineParser(
        "minimax-report", description="Draw runs side by side, while they train or after, as one HTML page."
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run_dir of a run")
    parser.add_argument("-o", "--output", default="report.html", help="the page (default: %(default)s)")
    parser.add_argument(
        "--wandb", metavar="ENTITY/PROJECT", help="instead: save a workspace of this project in Weights & Biases"
    )
    options = parser.parse_args(arguments)
    if bool(options.runs) == (options.wandb is not None):
        parser.error("give either RUN... or --wandb ENTITY/PROJECT")
    folders, output = [Path(run) for run in options.runs], Path(options.output)
    try:
        if options.wandb is not None:
            Output(sys.stdout).write(f"{save(options.wandb)}\n")
            return 0
        runs = [Run.read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
        try:
            replace_text(output, page(runs))
        except OSError as error:
            raise ConfigError(f"--output={options.output}: cannot be written: {error.strerror}") from error
    except ConfigError as error:
        to_stderr(f"error: {' '.join(str(error).split())}")
        return 2
    Output(sys.stdout).write(f"{output}: {len(runs)} {'run' if len(runs) == 1 else 'runs'}\n")
    return 0


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names; where two are called alike, the paths."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


if __name__ == "__main__":
    sys.exit(main())
