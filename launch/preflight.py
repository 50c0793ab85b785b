"""``minimax-launch preflight``: every node looks at itself (``node.py``), and what they found is compared.

Nothing is sent between nodes: each writes a file to a folder that all share.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from minimax_train.config import Config
from minimax_train.errors import ConfigError
from minimax_train.files import replace_text
from minimax_train.launch.node import look, name_of_node
from minimax_train.launch.options import integer, read_overrides, text
from minimax_train.model.config import count_parameters
from minimax_train.planner.dry_run import dry_run

FOLDER, UNFIT = "launch/preflight", "unfit"
SRUN_LIMIT_S = 120  # of all nodes' looks, the start of their processes included
_SLOW, _SLOW_DISK = 0.85, 0.25  # a disk that is shared differs more: a quarter of that
_LESS_MEMORY = 0.9  # of the median
_HELD_GIB = 2.0  # of a GPU's memory, by its driver and display
_APART_S = 5.0  # clocks; processes of one step start within less
_NO_STEP = 0xFFFFFFF0  # from here on Slurm numbers shells and batch scripts
_STATE_BYTES = 12  # of a checkpoint, per parameter: weights and two moments


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of ``minimax-launch preflight``."""
    parser.usage = "minimax-launch preflight [options] -- [overrides]"
    parser.description = (
        "Look at this machine, or in an allocation of Slurm at each of its nodes, and compare what they found: "
        "devices, versions, rates of GEMMs, links and disk, data, clocks. Overrides are those of the run."
    )
    slow = f"a device or link is slow below this part of the median, a disk below a quarter of it. Default {_SLOW}"
    parser.add_argument("--slow", type=_fraction, default=_SLOW, metavar="PART", help=slow)
    world = "processes of the run. By default one per GPU of the nodes, one per node without"
    parser.add_argument("--world-size", type=integer(1, 10**7), metavar="N", help=world)
    only = "look at this machine alone, write DIR/NODE.json and compare nothing"
    parser.add_argument("--look", type=Path, metavar="DIR", help=only)
    compare = "compare what nodes wrote to DIR, and look at none"
    parser.add_argument("--compare", type=Path, metavar="DIR", help=compare)
    names = text(r"[\w.,-]+", "must be names of nodes, separated by commas")
    parser.add_argument("--nodes", type=names, metavar="NAMES", help="with --compare: who was to write a file")


def launch(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Exit status: 0 when all nodes are fit, 1 when some are not.

    Raises:
        ConfigError: when the configuration cannot run, on any nodes.
    """
    if options.nodes and not options.compare:
        raise ConfigError(f"--nodes={options.nodes!r}: needs --compare")
    config = read_overrides(arguments)
    if options.look:
        return int(bool(_record(look(config, options.look))["problems"]))
    folder, nodes = options.compare or Path(config.run_dir).absolute() / FOLDER, (options.nodes or "").split(",")
    if not options.compare:
        shutil.rmtree(folder, ignore_errors=True)
        nodes = _look_everywhere(config, arguments, folder)
    return compare(config, folder, [name for name in nodes if name], options.slow, options.world_size)


def look_here(config: Config, world_size: int | None) -> int:
    """``minimax-launch preflight`` of this machine, for a run of ``world_size`` processes."""
    folder = Path(config.run_dir).absolute() / FOLDER
    look(config, folder)
    return compare(config, folder, [name_of_node()], _SLOW, world_size)


def compare(config: Config, folder: Path, nodes: Sequence[str], slow: float, world_size: int | None) -> int:
    """Print a table of the nodes and a line for each fault, and write the names of unfit nodes to ``folder/unfit``.

    Args:
        nodes: that should have written a file; those that have, if empty.

    Returns:
        Exit status: 1 if a node is unfit.

    Raises:
        ConfigError: when the configuration cannot run on any such nodes.
    """
    found = {path.stem: _record(path) for path in sorted(folder.glob("*.json"))}
    records = {name: found[name] for name in (nodes or found) if name in found}
    faults = [(name, f"no answer within {SRUN_LIMIT_S} s") for name in nodes if name not in found]
    faults += list(find_faults(records, slow, _space(config)))
    unfit = sorted({name for name, _ in faults})
    print("\n".join(_table(records, unfit)))
    for name, fault in faults:
        print(f"{name}: {fault}")
    if not records:
        raise ConfigError(f"{folder}: no node has written what it found there")
    replace_text(folder / UNFIT, ",".join(unfit))
    _check_run(config, records, world_size)
    print(
        f"{len(records) - len(set(unfit) & set(records))} of {len(nodes or found)} nodes are fit; {folder}", flush=True
    )
    return int(bool(unfit))


def find_faults(records: dict[str, dict[str, Any]], slow: float, space_gb: float) -> Iterator[tuple[str, str]]:
    """What is wrong with nodes: name, and what was found and expected.

    Args:
        records: that :func:`minimax_train.launch.node.look` wrote, by node.
        slow: a device or link is below this part of the median, a disk below a quarter of it.
        space_gb: that ``run_dir`` must have.
    """
    for name, record in records.items():
        yield from ((name, problem) for problem in record["problems"])
    for what, values in _by_node(records, _alike).items():
        expected, count = Counter(values.values()).most_common(1)[0]
        of = f"as {count} of {len(values)} nodes have"
        yield from (
            (name, f"{what}: {value}, expected {expected}, {of}") for name, value in values.items() if value != expected
        )
    for name, record in records.items():
        for index, device in enumerate(record.get("devices", ())):
            held = device.get("memory_gib", 0) - device.get("free_gib", 0)
            if held > _HELD_GIB:
                yield name, f"GPU {index}: {held:.1f} GiB of memory are in use, expected less than {_HELD_GIB:g}"
    for kind, part, unit, rates in _rates(records, slow):
        if len(rates) > 1:
            median = statistics.median(rates.values())
            for (name, what), rate in rates.items():
                if rate < part * median:
                    least = f"at least {part:g} of the median, {median:.4g}"
                    yield name, f"{what or kind}: {rate:.4g} {unit}, expected {least}"
    starts = {name: record["started"] for name, record in records.items()}
    middle = statistics.median_low(starts.values()) if starts else 0.0
    for name, start in starts.items():
        # A start that is late, as one that pulls an image, is no clock that is wrong.
        if abs(start - middle) > _APART_S and not records[name].get("clock_synchronised", True):
            yield (
                name,
                f"clock: {start - middle:+.1f} s from the others' and not synchronised, expected within {_APART_S:g} s",
            )
    for name, record in records.items():
        free = record.get("disk", {}).get("free_gb", space_gb)
        if free < space_gb:
            yield name, f"run_dir: {free:.1f} GB free, expected {space_gb:.1f}, for the checkpoints that are kept"


def _alike(record: dict[str, Any]) -> dict[str, str]:
    """What must be the same on all nodes."""
    named = record.get("devices", ())
    devices = Counter(f"{d['name']} {d['memory_gib']:.0f} GiB" if "memory_gib" in d else d["name"] for d in named)
    shown = {"devices": ", ".join(f"{n} x {name}" for name, n in sorted(devices.items()))} if devices else {}
    files = {"data: files seen": record["data"]} if "data" in record else {}
    return {**shown, **record.get("software", {}), **files}


def _by_node(records: dict[str, dict[str, Any]], read: Any) -> dict[str, dict[str, str]]:
    """Of every item that ``read`` finds in a record: its values by node."""
    found: dict[str, dict[str, str]] = {}
    for name, record in records.items():
        for what, value in read(record).items():
            found.setdefault(what, {})[name] = value
    return found


def _rates(
    records: dict[str, dict[str, Any]], slow: float
) -> Iterator[tuple[str, float, str, dict[tuple[str, str], float]]]:
    """Kinds of rates that are compared: least part of the median, unit, and the rates by node and what they are of."""
    yield "GEMM", slow, "TFLOP/s", {
        (name, f"{'GPU' if 'memory_gib' in record['devices'][0] else 'CPU'} {index}: GEMM"): rate
        for name, record in records.items()
        for index, rate in enumerate(record.get("gemm_tflops", ()))
    }  # fmt: skip
    for kind in ("GPU", "host"):
        yield f"copies from {kind}", slow, "GB/s", {
            (name, what): rate
            for name, record in records.items()
            for what, rate in record.get("link_gb_per_s", {}).items()
            if what.startswith(kind)
        }  # fmt: skip
    for key, what, part, unit in [
        ("disk", "run_dir", slow * _SLOW_DISK, "MB/s written"),
        ("host_memory_gib", "memory available on the host", _LESS_MEMORY, "GiB"),
    ]:
        values = {(name, ""): record[key] for name, record in records.items() if key in record}
        yield what, part, unit, {at: v["mb_per_s"] if isinstance(v, dict) else v for at, v in values.items()}


def _table(records: dict[str, dict[str, Any]], unfit: Sequence[str]) -> Iterator[str]:
    """A line for each node; of rates the lowest."""
    rows = [("node", "", "devices", "driver", "CUDA", "NCCL", "torch", "TFLOP/s", "copies GB/s", "disk MB/s")]
    for name, record in records.items():
        software, gemms = record.get("software", {}), record.get("gemm_tflops", ())
        links = [rate for what, rate in record.get("link_gb_per_s", {}).items() if what.startswith("GPU")]
        rows.append(
            (
                name,
                "unfit" if name in unfit else "fit",
                _alike(record).get("devices", "?"),
                *(software.get(what, "?") for what in ("driver", "CUDA", "NCCL", "torch")),
                f"{min(gemms):.4g}" if gemms else "?",
                f"{min(links):.4g}" if links else "-",
                f"{record['disk']['mb_per_s']:.0f}" if "disk" in record else "?",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _check_run(config: Config, records: dict[str, dict[str, Any]], world_size: int | None) -> None:
    """Build the run's first rank without memory, as on these nodes."""
    if config.has_other_grids:  # the newest checkpoint says which
        return
    devices = [device for record in records.values() for device in record.get("devices", ())]
    world_size = world_size or max(len(devices), 1)
    try:
        config.check_world_size(world_size)
        _, num_bytes = dry_run(config, world_size)
    except ConfigError as error:
        raise ConfigError(f"{world_size} processes: {error}") from error
    least = min((device["memory_gib"] for device in devices if "memory_gib" in device), default=None)
    if least is not None and num_bytes / 2**30 > least:
        raise ConfigError(
            f"{world_size} processes: weights, gradients and optimizer states take {num_bytes / 2**30:.1f} GiB on a "
            f"rank, and a GPU has {least:.1f}; more ranks, parallel.tp, ep or etp, or engine=fsdp take less"
        )


def _space(config: Config) -> float:
    """GB in ``run_dir`` for the checkpoints that are kept and the one that is written meanwhile."""
    elsewhere = config.checkpoint.folder is not None
    return 0 if elsewhere else (config.checkpoint.keep + 1) * _STATE_BYTES * count_parameters(config.model).total / 1e9


def _look_everywhere(config: Config, arguments: Sequence[str], folder: Path) -> list[str]:
    """Have the nodes of Slurm's allocation, or without one this machine, look at themselves; their names."""
    in_step = int(os.environ.get("SLURM_STEP_ID", _NO_STEP)) < _NO_STEP
    if "SLURM_JOB_ID" not in os.environ or in_step:
        look(config, folder)
        return [name_of_node()]
    count = os.environ["SLURM_NNODES"]
    srun = ["srun", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", "--kill-on-bad-exit=0"]
    own = [sys.executable, "-m", "minimax_train.launch.cli", "preflight", f"--look={folder}", "--", *arguments]
    folder.mkdir(parents=True, exist_ok=True)
    with suppress(subprocess.TimeoutExpired):  # who has written nothing is named
        subprocess.run([*srun, *own], timeout=SRUN_LIMIT_S)
    shown = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
    return subprocess.run(shown, check=True, capture_output=True, text=True).stdout.split()


def _record(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _fraction(given: str) -> float:
    try:
        value = float(given)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{given!r}: must be a number between 0 and 1")
    return value
