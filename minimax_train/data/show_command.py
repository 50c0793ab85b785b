"""``minimax-data show [overrides]``: a mixture looked at without training."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from minimax_train.cache import find_cache
from minimax_train.config import load_config
from minimax_train.data.config import LENGTHS
from minimax_train.data.pictures import plot_lengths, plot_mixture
from minimax_train.data.show import Report, SourceReport, StageReport, show
from minimax_train.data.tokenizer import prepare_tokenizer
from minimax_train.data.windows import WINDOW
from minimax_train.errors import OneLineParser, require
from minimax_train.files import replace_text
from minimax_train.metrics.console import Output

LENGTHS_PICTURE, MIXTURE_PICTURE = "lengths.png", "mixture.png"
_NAME = 22  # columns


def show_mixture(arguments: Sequence[str]) -> None:
    """Print tables and draw pictures.

    Raises:
        ConfigError: when the configuration contradicts itself, or the data cannot be read.
        OSError: when a file cannot be written.
    """
    options = _parser().parse_intermixed_args(arguments)
    require(1 <= options.tokens <= 1e15, "--tokens", options.tokens, "must be between 1 and 1e15")
    config = load_config(options.overrides, config_dirs=options.config_dir)
    folder = Path(options.pictures)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as draft:
        cache = find_cache(config.cache_dir)
        tokenizer = prepare_tokenizer(config.data, config.model.vocab_size, Path(draft) / "tokenizer", cache)
    report = show(config, tokenizer, int(options.tokens))
    Output(sys.stdout).write("".join(f"{line}\n" for line in lines(report)))
    if options.json:
        replace_text(Path(options.json), json.dumps(dataclasses.asdict(report), indent=1) + "\n")
    plot_lengths({name: source.histogram for name, source in report.sources.items()}, folder / LENGTHS_PICTURE)
    plot_mixture(report.schedule, report.realised, folder / MIXTURE_PICTURE)


def _parser() -> argparse.ArgumentParser:
    description = "Look at a mixture without training: what the recipe takes out of the data, and what packing does."
    parser = OneLineParser("minimax-data show", description=description, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, as minimax-train takes them")
    parser.add_argument("--config-dir", action="append", default=[], help="a folder of your own configuration groups")
    tokens = (
        "packed as the recipe asks for them, and as many read to see what the sources hold (default: 5e6); of less "
        "data, all"
    )
    parser.add_argument("--tokens", type=float, default=5e6, metavar="N", help=tokens)
    parser.add_argument("--json", metavar="FILE", help="write what was found to a file")
    pictures = f"where {LENGTHS_PICTURE} and {MIXTURE_PICTURE} are written (default: the working directory)"
    parser.add_argument("--pictures", metavar="FOLDER", default=".", help=pictures)
    return parser


def lines(report: Report) -> Iterator[str]:
    """The report for a person, at most 80 columns wide as long as names are short."""
    yield from _sources(report.sources)
    for stage in report.stages:
        yield from _stage(stage)
    yield ""
    per_second = report.tokens / max(report.seconds, 1e-9)
    yield f"packed {report.tokens:,} tokens in {report.seconds:.1f} s: {per_second:,.0f} tokens/s in one process"
    yield ""
    yield _row("data.packing", "documents", "split", "truncated tokens", width=18)
    for policy, packed in report.packing.items():
        split = f"{packed.split:,} ({_percent(packed.split, packed.documents)})"
        truncated = f"{packed.truncated:,} ({_percent(packed.truncated, packed.tokens)})"
        yield _row(policy, f"{packed.documents:,}", split, truncated, width=18)
    if report.held_out:
        yield ""
        yield _row("held out", "tokens", "documents found", "windows found", width=18)
    for name, found in report.held_out.items():
        documents = f"{found.found:,} of {found.documents:,}"
        yield _row(name, f"{found.tokens:,}", documents, f"{found.windows_found:,} of {found.windows:,}", width=18)
    if report.held_out:
        yield f"(found in what was packed for training; windows of {WINDOW} tokens, there at any position)"
    yield from _warnings(report)


def _sources(sources: dict[str, SourceReport]) -> Iterator[str]:
    yield _row("source", "files", "tokens", "read", *LENGTHS)
    for name, source in sources.items():
        mark = "" if source.part == 1 else "~"
        tokens = "?" if source.epoch_tokens is None else mark + _short(source.epoch_tokens)
        read = _short(source.tokens) if source.part is None else f"{source.part:.1%}"
        shares = (f"{tokens:.1%}" for _, tokens in source.lengths.values())
        yield _row(name, f"{source.files:,}", tokens, read, *shares)
    yield "(tokens of an epoch; ~ estimated from what was read; lengths: shares of the tokens)"


def _stage(stage: StageReport) -> Iterator[str]:
    yield ""
    begin, end = _short(stage.begin), _short(stage.end)
    yield f"stage {stage.name}: tokens {begin} to {end}, sequences of {stage.sequence_length:,}"
    yield _row("", "tokens", "share", "epochs", "packed", "asked")
    total, asked, read = (sum(part.values()) for part in (stage.tokens, stage.asked, stage.read))
    for component in dict.fromkeys([*stage.tokens, *stage.read]):  # also what was drawn in the stage before
        tokens, epochs = stage.tokens.get(component, 0.0), stage.epochs.get(component, 0.0)
        shown = "?" if epochs is None else f"{epochs:,.3g}" if epochs < 100 else f"{epochs:,.0f}"
        shares = _percent(stage.read.get(component, 0), read), _percent(stage.asked.get(component, 0.0), asked)
        yield _row(f"  {component}", _short(tokens), _percent(tokens, total), shown, *shares)


def _warnings(report: Report) -> Iterator[str]:
    warnings = [
        f"{component} runs out in stage {stage}, after about {_short(tokens)} tokens: max_epochs={limit}"
        for component, limit, stage, tokens in report.runs_out
    ]
    for stage in report.stages:
        missing = [name for name, epochs in stage.epochs.items() if epochs is None and stage.tokens[name]]
        warnings += [f"stage {stage.name}: how much there is of {name} is not known" for name in missing]
    if warnings:
        yield ""
    yield from (f"warning: {warning}" for warning in dict.fromkeys(warnings))


def _row(name: str, *cells: str, width: int = 9) -> str:
    """A name and cells aligned to the right."""
    return f"{name:<{_NAME}}" + "".join(f" {cell:>{width}}" for cell in cells)


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.2%}" if whole else "-"


def _short(tokens: float) -> str:
    """1.23 B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if tokens >= size:
            return f"{tokens / size:.4g} {unit}"
    return f"{tokens:.0f}"
