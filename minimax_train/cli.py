"""``minimax-train [overrides]``: one process of a training run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from minimax_train.config import Config, load_config, to_yaml
from minimax_train.errors import ConfigError, TrainingError, require
from minimax_train.parallel.environment import ProcessEnvironment, share_processors
from minimax_train.parallel.grid import ProcessGrid

USAGE = """
Overrides are Hydra's: `model=small` picks a group's file, `recipe.steps=100` sets a value, `experiment=demo` a whole
experiment. Run by itself it is a run of one process; under torchrun or srun, one process per device.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Console script. Exit status 2 for a configuration that cannot run, 1 for a run that had to stop."""
    parser = _Parser("minimax-train", description="Pretrain a hybrid model.", epilog=USAGE, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides")
    own = "a folder of your own configuration groups; several are searched in this order, the package's own last"
    parser.add_argument("--config-dir", action="append", default=[], help=own)
    parser.add_argument("--cfg", action="store_true", help="print the resolved configuration and stop")
    options = parser.parse_intermixed_args(arguments)
    environment = ProcessEnvironment()
    try:
        environment = _environment()
        config = load_config(options.overrides, config_dirs=options.config_dir)
        if options.cfg:
            print(to_yaml(config), end="")
            return 0
        config.check_world_size(environment.world_size)
    except ConfigError as error:
        error.on_all_ranks = True
        return _fail(error, environment.rank)
    try:
        run(config, environment)
    except (ConfigError, TrainingError) as error:
        return _fail(error, environment.rank)
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help says what there is\n")


def _environment() -> ProcessEnvironment:
    try:
        return ProcessEnvironment.detect()
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _fail(error: ConfigError | TrainingError, rank: int) -> int:
    if rank == 0 or not error.on_all_ranks:
        print(f"{f'rank {rank}: ' if rank else ''}error: {error}", file=sys.stderr)
    status = 2 if isinstance(error, ConfigError) else 1
    if dist.is_initialized():
        # Taking the process groups down could wait for ranks that are stuck in a collective, or abort.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def run(config: Config, environment: ProcessEnvironment) -> None:
    """Join the process group, train, leave."""
    share_processors()
    from minimax_train.trainer import Trainer  # after the configuration is checked: it takes seconds to import

    device_type = config.device
    if device_type == "auto":
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    available = device_type == "cpu" or torch.cuda.is_available()
    require(available, "device", config.device, "this machine has no GPU; use cpu or auto")
    config.kernels.check_device(device_type)
    timeout = timedelta(seconds=config.parallel.timeout_s)
    try:
        device = environment.init_process_group(device_type, timeout)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    Trainer(config, ProcessGrid.create(device_type, timeout, **config.parallel.sizes), device).train()
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
