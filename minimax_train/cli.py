"""``minimax-train [overrides]``: one process of a training run."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from minimax_train.compose import PACKAGED
from minimax_train.config import Config, load_config, to_yaml
from minimax_train.deterministic import use_deterministic_algorithms
from minimax_train.errors import ConfigError, Interrupted, OneLineParser, Saved, TrainingError, exit_status, require
from minimax_train.first_rank import on_first_rank
from minimax_train.hints import meant_by_option
from minimax_train.leave import Leave
from minimax_train.metrics.console import Output, to_stderr
from minimax_train.parallel.environment import ProcessEnvironment, end_with_parent, share_processors
from minimax_train.parallel.grid import ProcessGrid
from minimax_train.phases import Phases
from minimax_train.run_lock import release_lock
from minimax_train.startup import Startup, no_collection

SETTINGS = "settings are written without dashes, as recipe.steps=1000 (docs/cluster.md has Megatron-LM's names)"
USAGE = """
Overrides are Hydra's: `model=small` picks a group's file, `recipe.steps=1000` sets a value, `experiment=demo` a whole
experiment. Run by itself it is a run of one process; under torchrun or srun, one process per device. Groups with
several files: {groups}. --cfg shows every key; docs/cluster.md (Settings) says where each is explained.
"""


class _Parser(OneLineParser):
    """Tells those who come from Megatron-LM or torchtitan that settings are no options."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized"):
            meant = [meant_by_option(Config, word) for word in message.split() if word.startswith("--")]
            keys = " and ".join(filter(None, meant))
            message = f"{message}; {SETTINGS}{f'; here {keys}' if keys else ''}"
        super().error(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Console script. Exit status 2 for a configuration that cannot run, 1 for a run that had to stop, 3 for one that
    is saved and goes on when it is started again (on its next stage's process grid, or after a signal), 130 and 143 for
    one that a signal ended without."""
    usage = USAGE.format(groups="; ".join(_choices()))
    parser = _Parser("minimax-train", description="Pretrain a hybrid model.", epilog=usage, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides")
    own = "a folder of your own configuration groups; several are searched in this order, the package's own last"
    parser.add_argument("--config-dir", action="append", default=[], help=own)
    parser.add_argument("--cfg", action="store_true", help="print the resolved configuration and stop")
    options = parser.parse_intermixed_args(arguments)
    environment = ProcessEnvironment()
    try:
        environment = _environment()
        config = load_config(options.overrides, config_dirs=options.config_dir)
        launched = environment.init_method is not None
        # With other grids, its newest checkpoint says which: in run.
        if (launched or not options.cfg) and not config.has_other_grids:
            config.check_world_size(environment.world_size)
        if options.cfg:
            Output(sys.stdout).write(to_yaml(config))
            return 0
    except ConfigError as error:
        error.on_all_ranks = True
        return _fail(error, environment.rank)
    leave = Leave(environment.rank)
    try:
        with leave.watch():
            run(config, environment, leave)
    except (ConfigError, TrainingError) as error:
        return _fail(error, environment.rank)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        return _fail(_out_of_memory(error), environment.rank)
    except KeyboardInterrupt:
        return _fail(Interrupted("interrupted before the first step"), environment.rank)
    return 0


def _choices() -> Iterator[str]:
    """The packaged groups of which a run picks one of several files: ``model=medium|proxy|...``."""
    for folder in sorted(PACKAGED.iterdir()):
        files = sorted(path.stem for path in folder.glob("*.yaml"))
        if len(files) > 1:
            yield f"{folder.name}={'|'.join(files)}"


def _environment() -> ProcessEnvironment:
    try:
        return ProcessEnvironment.detect()
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "DefaultCPUAllocator" in str(error)  # which raises a plain RuntimeError


def _out_of_memory(error: RuntimeError | MemoryError) -> TrainingError:
    told = TrainingError(
        f"out of memory: {str(error).partition('. Of the allocated')[0] or 'of the host'}; a smaller model, "
        "recipe.micro_batch_size or data.sequence_length, recipe.activation_checkpointing=full, or more ranks take less"
    )
    told.__cause__, told.on_all_ranks = error, False
    return told


def _fail(error: ConfigError | TrainingError, rank: int) -> int:
    if rank == 0 or not error.on_all_ranks:
        lines = str(error).splitlines()
        # Libraries write essays; only a worker's traceback keeps its lines.
        told = " ".join(map(str.strip, lines)) if isinstance(error, ConfigError) else "\n".join(lines)
        kind = "stopped" if isinstance(error, Saved) else "error"
        to_stderr(f"{f'rank {rank}: ' if rank else ''}{kind}: {told}")
    status = exit_status(error)
    if dist.is_initialized():
        # Taking the process groups down could wait for ranks that are stuck in a collective, or abort.
        Output(sys.stdout).flush()
        os._exit(status)
    return status


def run(config: Config, environment: ProcessEnvironment, leave: Leave) -> None:
    """Join the process group, train, leave."""
    share_processors()
    _end_with_torchrun()
    # After the configuration is checked: they take seconds to import.
    with no_collection():
        from minimax_train.checkpoint.store import CheckpointStore
        from minimax_train.run_dir import on_grid_of_stage
        from minimax_train.trainer import Trainer
        from minimax_train.watchdog import BACKSTOP, Watchdog

    startup = Startup()
    device_type = config.device
    if device_type == "auto":
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    available = device_type == "cpu" or torch.cuda.is_available()
    require(available, "device", config.device, "this machine has no GPU; use cpu or auto")
    config.kernels.check_device(device_type)
    config.engine.check_device(device_type)
    if config.deterministic and device_type == "cuda":
        use_deterministic_algorithms()
    timeout = timedelta(seconds=config.parallel.timeout_s)
    try:
        device = environment.init_process_group(device_type, timeout)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except ConnectionError as error:  # of a node that hangs, as of a peer that is lost later
        told = TrainingError(f"{error} (parallel.timeout_s={config.parallel.timeout_s:g})")
        told.on_all_ranks = False
        raise told from error
    phases = Phases(device)
    try:
        store = CheckpointStore(Path(config.run_dir), folder=config.checkpoint.folder)
        with Watchdog(environment, phases, store, config.parallel.timeout_s) as watchdog:
            _set_pg_timeout(timeout + BACKSTOP)
            if config.has_other_grids:
                config = on_first_rank(lambda: on_grid_of_stage(config, environment.world_size))
            grid = ProcessGrid.create(device_type, timeout + BACKSTOP, **config.parallel.grid)
            startup.mark("process groups")
            trainer = Trainer(config, grid, device, startup, leave, phases)
            if grid.is_first:
                watchdog.tell = trainer.log.stall
            try:
                trainer.train()
            except KeyboardInterrupt:
                line = f"interrupted after step {trainer.progress.step}; {trainer.store.to_go_on()}"
                raise Interrupted(line) from None
            except Saved:
                # The first rank closes its logs; a launcher ends the others as soon as one has left.
                on_first_rank(lambda: None)
                raise
    finally:
        release_lock(Path(config.run_dir))
    # NCCL's communicators are not taken down before the CUDA graphs that were captured with them.
    del trainer
    gc.collect()
    dist.destroy_process_group()


def _end_with_torchrun() -> None:
    """If torchrun is killed: this process would go on, and keep the run's folder, unseen."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(os.getppid())


if __name__ == "__main__":
    sys.exit(main())
