"""``minimax-convert to-hf|from-hf SRC DST``: checkpoints to and from Hugging Face folders."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from minimax_train.convert.from_hf import from_hf
from minimax_train.convert.jobs import WORKERS
from minimax_train.convert.layouts import LAYOUTS, MINIMAX
from minimax_train.convert.shards import parse_size
from minimax_train.convert.to_hf import to_hf
from minimax_train.errors import ConfigError, OneLineParser, require
from minimax_train.files import TOKENIZER

KEEP = "keep"
DTYPES = {KEEP: None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Console script. Exit status 2 for what cannot be converted, 1 for files that cannot be read or written, and for
    logits that ``--verify`` finds apart."""
    options = _parser().parse_args(arguments)
    dtype = DTYPES[options.dtype]
    try:
        for name, path in (("SRC", options.source), ("DST", options.target)):
            require(
                path.isprintable() and path.strip() == path != "", name, path, "must be a path of printable characters"
            )
        workers = options.workers
        fits = workers is None or WORKERS.least <= workers <= WORKERS.greatest
        require(fits, "--workers", workers, str(WORKERS))
        accepted = "is read only with --verify; leave it out here"
        require(options.verify or options.device is None, "--device", options.device, accepted)
        verify_on = (options.device or "cpu") if options.verify else None
        if options.direction == "to-hf":
            size = parse_size(options.max_shard_size)
            same = to_hf(
                options.source,
                options.target,
                layout=options.layout,
                dtype=dtype,
                max_shard_bytes=size,
                workers=workers,
                verify_on=verify_on,
                report=_report,
            )
            print(f"done: {options.target}; {LAYOUTS[options.layout].loading.format(repr(options.target))}")
        else:
            same = from_hf(
                options.source,
                options.target,
                dtype=dtype,
                rotary_dim=options.rotary_dim,
                workers=workers,
                verify_on=verify_on,
                report=_report,
            )
            tokenizer = Path(options.target) / TOKENIZER
            print(
                f"done: {options.target}; train on with minimax-train --config-dir {options.target} model=imported "
                f"checkpoint.initial_weights={options.target}"
                + (f" data.tokenizer={tokenizer}" if tokenizer.is_dir() else "")
            )
    except ConfigError as error:
        _report(f"error: {error}")
        return 2
    except OSError as error:
        # A write that fails names no file, unlike an open.
        _report(f"error: {options.target}: {error}" if error.errno and not error.filename else f"error: {error}")
        return 1
    except KeyboardInterrupt:
        _report(f"interrupted: {options.target} was not written")
        return 130
    return int(not same)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        "minimax-convert",
        description="Convert checkpoints to and from Hugging Face folders: transformers' MiniMaxForCausalLM and the "
        "original layout of MiniMax-Text-01.",
    )
    commands = parser.add_subparsers(dest="direction", required=True)
    to = commands.add_parser("to-hf", help="a run or a checkpoint to a Hugging Face folder")
    back = commands.add_parser("from-hf", help="a Hugging Face folder to a checkpoint")
    to.add_argument("source", metavar="SRC", help="a checkpoint, or a run, whose newest is taken")
    back.add_argument("source", metavar="SRC", help="a folder with config.json and safetensors")
    for command in (to, back):
        command.add_argument("target", metavar="DST", help="a new or empty folder")
        command.add_argument("--dtype", choices=DTYPES, default=KEEP, help="of the weights (default: as they are)")
        command.add_argument(
            "--workers", type=int, metavar="N", help="processes (default: as many as CPU cores and memory allow)"
        )
        command.add_argument(
            "--verify",
            action="store_true",
            help="then load both sides in float32 and print the largest difference of their logits; exit status 1 if "
            "they are not the same model",
        )
        command.add_argument("--device", metavar="D", help="of --verify: cpu (the default), cuda or cuda:N")
    to.add_argument(
        "--layout",
        choices=LAYOUTS,
        default=MINIMAX,
        help="transformers' minimax, or the original one of MiniMax-Text-01, which vLLM reads (default: minimax); "
        "from-hf finds out by itself",
    )
    to.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a safetensors file (default: 5GB)")
    back.add_argument(
        "--rotary-dim",
        type=int,
        metavar="R",
        help="how many leading dimensions of each head the weights were trained to rotate, where config.json names "
        "another number than transformers rotates",
    )
    return parser


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
