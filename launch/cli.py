"""``minimax-launch local|slurm|preflight [options] -- [overrides]``: start a run here or as a job of Slurm, or look
whether the machines are fit for it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from minimax_train.errors import ConfigError, OneLineParser
from minimax_train.launch import preflight, slurm
from minimax_train.launch.options import read_overrides

LOCAL = """usage: minimax-launch local [options of torchrun --] [overrides]

Start a run on this machine with torchrun, one process per visible GPU (one where there is none), which continues from
the newest checkpoint in run_dir if there is one. What comes before `--` goes to torchrun: --max-restarts=3 starts all
processes again when one has failed. --preflight has the machine look at itself first: unfit, it starts nothing."""
PREFLIGHT = "--preflight"
SEPARATED = "options come before --, overrides after it"
_OF_TRAIN = ("--config-dir", "--cfg")
SCRIPT = Path(__file__).with_name("torchrun.sh")


def main(arguments: Sequence[str] | None = None) -> int:
    """Console script. Exit status: of ``local`` torchrun's; of ``slurm`` 0, 1 where Slurm refuses the job; of
    ``preflight`` 0, 1 where a node is unfit; 2 for options or a configuration that cannot run."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _Parser("minimax-launch", description="Start a run.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("local", help="on this machine, with torchrun", add_help=False)
    slurm.add_options(commands.add_parser("slurm", help="as a job of Slurm", allow_abbrev=False))
    preflight.add_options(commands.add_parser("preflight", help="look at the machines", allow_abbrev=False))
    try:
        if given[:1] == ["local"]:
            return _local(given[1:])
        own, overrides = _split(given)
        options = parser.parse_args(own)
        return {"slurm": slurm, "preflight": preflight}[options.command].launch(options, overrides)
    except ConfigError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


class _Parser(OneLineParser):
    def error(self, message: str) -> NoReturn:
        overrides = message.startswith("unrecognized") and re.search(r" [^- ][^ ]*=", message)
        super().error(f"{message}; {SEPARATED}" if overrides else message)


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What comes before ``--``, and after it."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def _local(arguments: list[str]) -> int:
    if arguments[:1] in (["--help"], ["-h"]):
        print(LOCAL)
        return 0
    options, overrides = _split(arguments) if "--" in arguments else ([], arguments)
    foreign = [each for each in overrides if each.startswith("-") and not each.startswith(_OF_TRAIN)]
    if foreign:
        raise ConfigError(f"{foreign[0]}: {SEPARATED}")
    if PREFLIGHT in options:
        options.remove(PREFLIGHT)
        if status := preflight.look_here(read_overrides(overrides), _world_size(options)):
            return status
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    command = ["bash", str(SCRIPT), *options, "--", "checkpoint.resume=auto", *overrides]
    os.execvpe("bash", command, {**os.environ, "PATH": path})


def _world_size(options: list[str]) -> int | None:
    """The run's processes, as ``torchrun.sh`` has torchrun start them; None where options give no numbers."""
    given = f" {' '.join(options)} "
    per_node = re.findall(r" --?nproc[-_]per[-_]node[= ](\S+)", given)[-1:] or [str(max(1, torch.cuda.device_count()))]
    nodes = re.findall(r" --?nnodes[= ](\S+)", given)[-1:] or ["1"]
    return int(per_node[0]) * int(nodes[0]) if (per_node[0] + nodes[0]).isdecimal() else None


if __name__ == "__main__":
    sys.exit(main())
