"""``minimax-train [overrides]``: one process of a training run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from minimax_train.config import Config, load_config, to_yaml
from minimax_train.errors import ConfigError, TrainingError, require
from minimax_train.parallel.environment import ProcessEnvironment
from minimax_train.parallel.grid import ProcessGrid

USAGE = """
Overrides are Hydra's: `model=small` picks a group's file, `recipe.steps=100` sets a value, `experiment=demo` a whole
experiment. Run by itself it is a run of one process; under torchrun or srun, one process per device.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Console script. Exit status 2 for a configuration that cannot run, 1 for a run that had to stop."""
    parser = argparse.ArgumentParser("minimax-train", description="Pretrain a hybrid model.", epilog=USAGE)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides")
    parser.add_argument("--config-dir", help="a folder of your own configuration groups")
    parser.add_argument("--cfg", action="store_true", help="print the resolved configuration and stop")
    options = parser.parse_args(arguments)
    try:
        environment = ProcessEnvironment.detect()
        config = load_config(options.overrides, config_dir=options.config_dir)
        if options.cfg:
            print(to_yaml(config), end="")
            return 0
        config.check_world_size(environment.world_size)
        run(config, environment)
    except (ConfigError, TrainingError) as error:
        if ProcessEnvironment.detect().rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def run(config: Config, environment: ProcessEnvironment) -> None:
    """Join the process group, train, leave."""
    from minimax_train.trainer import Trainer  # after the configuration is checked: it takes seconds to import

    device_type = config.device
    if device_type == "auto":
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    require(
        device_type == "cpu" or torch.cuda.is_available(), "device", config.device, "this machine has no GPU; use cpu"
    )
    device = environment.init_process_group(device_type, timedelta(seconds=config.parallel.timeout_s))
    try:
        Trainer(config, ProcessGrid.create(device_type), device).train()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
