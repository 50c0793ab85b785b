"""``minimax-launch slurm``: a batch script from ``job.sbatch``, checked, submitted, and how to follow it."""

from __future__ import annotations

import argparse
import itertools
import math
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from minimax_train.config import Config
from minimax_train.errors import ConfigError, require
from minimax_train.launch.options import integer, read_overrides, text

TEMPLATE = Path(__file__).with_name("job.sbatch")
# Seconds from Slurm's warning to the end of the job, and from it to that of a process that has not left.
WARNING_S, LEAVE_WITHIN_S = 120, 110
MOST_POINTS = 1000  # of a sweep; Slurm's MaxArraySize is 1001 unless a cluster sets it
_TIME = r"(\d+-)?\d+(:\d\d?){0,2}"
_NAME = r"[\w.+-]+"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of ``minimax-launch slurm``."""
    parser.usage = "minimax-launch slurm [options] -- [overrides]"
    parser.description = (
        "Submit a run to Slurm. Overrides are those of minimax-train; run_dir must be shared by all nodes."
    )
    add = parser.add_argument
    add("--nodes", type=integer(1, 10**5), default=1, metavar="N", help="default 1")
    processes = "GPUs of each node, and processes on it; 0: one process on its CPUs. Default 8"
    add("--gpus-per-node", type=integer(0, 1000), default=8, metavar="N", help=processes)
    cores = "CPU cores of each process; default 8"
    add("--cpus-per-task", type=integer(1, 10**4), default=8, metavar="N", help=cores)
    limit = "limit of one start, such as 90 (minutes), 12:00:00, 2-00 (days-hours); by default the partition's"
    add("--time", type=text(_TIME, "must be minutes, HH:MM:SS or days-hours"), help=limit)
    name = "must be a name without spaces"
    add("--partition", type=text(r"[\w.+,-]+", name), help="by default the cluster's")
    add("--account", type=text(_NAME, name), help="by default the user's")
    add("--job-name", type=text(_NAME, name), default="minimax-train", help="default minimax-train")
    nodes = text(r"[][\w.,-]+", "must be names of nodes as Slurm lists them, such as gpu[007-012],gpu020")
    add("--exclude", type=nodes, metavar="NODES", help="that the job must not have, as nodes that preflight names")
    look = "have the nodes look at themselves before each start, and leave out those that are not fit"
    add("--preflight", action="store_true", help=look)
    spares = "nodes of the job beside --nodes, for those that --preflight leaves out; default 0"
    add("--spares", type=integer(0, 10**5), default=0, metavar="N", help=spares)
    image = (
        "an image with minimax-train and bash in it: a .sif file or a URL (docker://) for apptainer exec, any other "
        "for srun --container-image, an option that NVIDIA's pyxis adds; run_dir is mounted"
    )
    add("--container", metavar="IMAGE", help=image)
    mounts = "mounted beside run_dir, as apptainer's --bind and pyxis' --container-mounts take them"
    add("--container-mounts", metavar="FROM:TO,...", help=mounts)
    variable = text(r"(?s)[A-Za-z_]\w*=.*", "must be NAME=VALUE")
    add("--env", type=variable, action="append", default=[], metavar="NAME=VALUE", help="of the run; repeatable")
    option = text(r"--?[a-zA-Z][^\n]*", "must be an option of sbatch, such as --sbatch=--qos=high")
    more = "another option of sbatch; repeatable: --sbatch=--qos=high"
    add("--sbatch", type=option, action="append", default=[], metavar="=OPTION", help=more)
    restarts = "starts after failures; those after pre-emption and time limits are not counted. Default 3"
    add("--max-restarts", type=integer(0, 10**6), default=3, metavar="N", help=restarts)
    sweep = "a job for each combination of values that overrides give separated by commas, each in a folder of run_dir"
    add("--multirun", action="store_true", help=sweep)
    add("--dry-run", action="store_true", help="print the batch script and submit nothing")


def launch(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Submit a job. Nothing is written before options and configurations are checked.

    Returns:
        Exit status: 0, 1 where Slurm refuses the job.

    Raises:
        ConfigError: naming the option or key, its value and what is accepted.
    """
    if options.container_mounts and not options.container:
        raise ConfigError(f"--container-mounts={options.container_mounts!r}: needs --container")
    if options.spares and not options.preflight:
        raise ConfigError(f"--spares={options.spares}: needs --preflight, which says whose place they take")
    fixed, points = _points(arguments) if options.multirun else (list(arguments), [[]])
    configs = [_checked([*fixed, *point], options) for point in points]
    run_dir = Path(configs[0].run_dir).absolute()
    fixed = [argument for argument in fixed if not argument.startswith("run_dir=")]
    # Slurm reads these in the name of the output, quoted or not.
    require(not re.search(r'["\\\n]', str(run_dir)), "run_dir", str(run_dir), "must not hold quotes, \\ or line ends")
    folder = run_dir / "launch"
    output = folder / f"{options.job_name}-{'%A_%a' if options.multirun else '%j'}.out"
    script = _script(options, fixed, points, run_dir, output)
    if options.dry_run:
        print(script, end="")
        return 0
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch is not on the PATH: this machine belongs to no Slurm cluster; --dry-run prints the job"
        )
    path = folder / f"{options.job_name}.sbatch"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(script)
    except OSError as error:
        raise ConfigError(f"run_dir={str(run_dir)!r}: must be a folder that can be written: {error}") from error
    submitted = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True)
    if submitted.returncode:
        print(f"error: Slurm refuses {path}: {' '.join(submitted.stderr.split())}", file=sys.stderr)
        return 1
    job = submitted.stdout.strip().partition(";")[0]
    shown = str(output).replace("%A_%a", f"{job}_0").replace("%j", job)
    print(f"job {job}{f', an array of {len(points)} runs' if options.multirun else ''}: {path}")
    print(f"  its place in the queue   squeue --job={job}")
    print(f"  its output               tail -F {shlex.quote(shown)}")
    print(f"  save, and queue again    scancel --signal=USR1 {job}")
    print(f"  end                      scancel {job}")
    return 0


def _checked(arguments: Sequence[str], options: argparse.Namespace) -> Config:
    """The configuration of a run, which the job's processes can run."""
    config = read_overrides(arguments)
    resume = any(argument.startswith("checkpoint.resume=") for argument in arguments)
    accepted = "must be auto, so that a job that is started again continues"
    require(not resume or config.checkpoint.resume == "auto", "checkpoint.resume", config.checkpoint.resume, accepted)
    if not config.has_other_grids:
        processes = options.nodes * max(1, options.gpus_per_node)
        try:
            config.check_world_size(processes)
        except ConfigError as error:
            told = f"--nodes={options.nodes} --gpus-per-node={options.gpus_per_node}: {processes} processes: {error}"
            raise ConfigError(told) from error
    return config


def _points(arguments: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """The overrides that have one value, and a sweep's combinations of those with several, the last fastest."""
    fixed, swept = [], []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        values = _split(value)
        if equals and key != "run_dir" and not key.startswith("-") and len(values) > 1:
            swept.append([f"{key}={value}" for value in values])
        else:
            fixed.append(argument)
    if not swept:
        raise ConfigError("--multirun: needs an override with several values, such as recipe.learning_rate=1e-3,3e-4")
    count = math.prod(map(len, swept))
    if count > MOST_POINTS:
        raise ConfigError(f"--multirun: {count} combinations of values; at most {MOST_POINTS} make a job array")
    return fixed, [list(point) for point in itertools.product(*swept)]


def _split(value: str) -> list[str]:
    """At commas that are not within quotes or brackets."""
    parts, depth, quote = [""], 0, ""
    for character in value:
        if character == "," and not depth and not quote:
            parts.append("")
            continue
        parts[-1] += character
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            depth += (character in "[{(") - (character in ")}]")
    return parts


def _script(options: argparse.Namespace, fixed: list[str], points: list[list[str]], run_dir: Path, output: Path) -> str:
    """The batch script."""
    given = {
        "job-name": options.job_name,
        "nodes": options.nodes + options.spares,
        "ntasks-per-node": max(1, options.gpus_per_node),
        "gpus-per-node": options.gpus_per_node or None,
        "cpus-per-task": options.cpus_per_task,
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "exclude": options.exclude,
        "array": f"0-{len(points) - 1}" if options.multirun else None,
        "signal": f"USR1@{WARNING_S}",
        "output": _pattern(output),
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in given.items() if value is not None]
    lines += [f"#SBATCH {option}" for option in options.sbatch]
    environment, container = [], ""
    if options.container:
        mounts = ",".join(filter(None, [f"{run_dir}:{run_dir}", options.container_mounts]))
        if re.search(r"\.sif$|^\w+://", options.container):
            gpus = "--nv " if options.gpus_per_node else ""
            container = f"apptainer exec {gpus}{_flag('bind', mounts)} {shlex.quote(options.container)} "
        else:
            container = f"{_flag('container-image', options.container)} {_flag('container-mounts', mounts)} "
    else:  # an image has its own
        environment.append(f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH")
    for name, _, value in (variable.partition("=") for variable in options.env):
        environment.append(f"export {name}={shlex.quote(value)}")
    run = [f"run_dir={shlex.quote(str(run_dir))}", "overrides=(", *(f"  {shlex.quote(x)}" for x in fixed), ")"]
    if options.multirun:
        run.append("case $SLURM_ARRAY_TASK_ID in")
        for i, point in enumerate(points):
            name = re.sub(r"[^\w.,=+-]", "_", f"{i}_{','.join(point)}")[:200]
            run.append(f"  {i}) run_dir=$run_dir/{name} overrides+=({shlex.join(point)}) ;;")
        run.append("esac")
    values = {
        "OPTIONS": "\n".join(lines),
        "ENVIRONMENT": "\n".join(environment),
        "NODES": str(options.nodes),
        "PREFLIGHT": "preflight" if options.preflight else ":",
        "MAX_RESTARTS": str(options.max_restarts),
        "LEAVE_WITHIN_S": str(LEAVE_WITHIN_S),
        "RUN": "\n".join(run),
        "CONTAINER": container,
    }
    return re.sub(r"@([A-Z_]+)@", lambda match: values[match[1]], TEMPLATE.read_text())


def _pattern(output: Path) -> str:
    """The path of the output as sbatch reads it: only the job's number in its name is to be filled in."""
    path = f"{str(output.parent).replace('%', '%%')}/{output.name}"
    return f'"{path}"' if re.search(r"\s|#", path) else path


def _flag(name: str, value: str) -> str:
    return f"--{name}={shlex.quote(value)}"
