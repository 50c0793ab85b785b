"""Text to token files, once, for those who train many times: what ``minimax-data tokenize`` does.

Documents are encoded in parts by several processes. A part is there whole or not at all, and is kept when the command
is killed; started again, it goes on with the parts that are missing. At the end parts become one pair of files.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimax_train.data.config import DataConfig
from minimax_train.data.readers import BadDocument
from minimax_train.data.shuffle import stable_hash
from minimax_train.data.sources import TRAIN, VALIDATION, Source, open_sources
from minimax_train.data.token_files import ABOUT, BIN, TokenWriter, index_of, merge, read_about, write_about
from minimax_train.data.tokenizer import LONG_DOCUMENT, Tokenizer, prepare_tokenizer
from minimax_train.errors import ConfigError, TrainingError, require
from minimax_train.files import LOCK, TOKENIZER, UNFINISHED, replace_text
from minimax_train.parallel.environment import end_with_parent
from minimax_train.run_lock import release_lock, take_lock

_PLAN = "plan.json"
_PART_BYTES, _MOST_PARTS = 1 << 28, 4096
_ENCODED_TOGETHER, _CHARACTERS_TOGETHER = 64, 1 << 20
_SAID = 3  # bad documents that are named
_REPORT_S = 5.0


@dataclass(frozen=True)
class _Target:
    """A pair of files to write, ``path`` the ``.bin``, and in how many parts."""

    path: str
    source: Source
    num_parts: int

    def part(self, folder: Path, i: int) -> str:
        return str(folder / f"{os.path.basename(self.path).removesuffix(BIN)}-{i:05d}{BIN}")

    def shards(self, i: int) -> range:
        """Of the source, those that make a part."""
        count = len(self.source.shards)
        return range(count * i // self.num_parts, count * (i + 1) // self.num_parts)


@dataclass(frozen=True)
class _Work:
    """What a worker process is sent."""

    targets: list[_Target]
    folder: Path
    tokenizer: Tokenizer

    def encode(self, target: int, part: int, is_stopped: Callable[[], bool] = lambda: False) -> int:
        """Writes a part; returns its tokens."""
        path, source = self.targets[target].part(self.folder, part), self.targets[target].source
        writer, bad, skipped = TokenWriter(path, self.tokenizer.vocab_size), [], 0
        texts: list[str] = []
        characters = 0
        for shard in self.targets[target].shards(part):
            for _, _, content in source.read(shard):
                if isinstance(content, BadDocument):
                    skipped += 1
                    bad += [str(content)] if len(bad) < _SAID else []
                    continue
                assert isinstance(content, str)
                is_long = len(content) > LONG_DOCUMENT
                if not is_long:
                    texts.append(content)
                    characters += len(content)
                if is_long or len(texts) == _ENCODED_TOGETHER or characters > _CHARACTERS_TOGETHER:
                    if is_stopped():
                        raise TrainingError("stopped")
                    self._write(writer, texts)
                    characters = 0
                if is_long:
                    writer.add(self.tokenizer.encode_in_pieces(content))
        self._write(writer, texts)
        tokens = writer.finish()
        write_about(path, {"skipped_documents": skipped, "bad": bad})
        return tokens

    def _write(self, writer: TokenWriter, texts: list[str]) -> None:
        for ids in self.tokenizer.encode_documents(texts):
            writer.add([ids])
        texts.clear()


def tokenize(
    config: DataConfig, vocab_size: int, output: str, *, num_workers: int, report: Callable[[str], None]
) -> None:
    """Writes ``output-train.bin`` and ``.idx`` (``output-NAME-train.bin`` of each of several sources), the same of
    ``validation`` where documents are held out by files, and ``output-tokenizer``.

    What a killed call finished is kept and used by the next one. Nothing is done where everything is there already.

    Args:
        vocab_size: ``model.vocab_size``: of a tokenizer that is trained; any other must fit in it.
        num_workers: processes, each of one thread; with 1, this process does it.
        report: is told the progress, a line at a time.

    Raises:
        ConfigError: when the documents cannot be read, or there are other files in place of the output.
        TrainingError: when a process was killed.
        OSError: when files cannot be written.
    """
    opened = [(name, split, source) for split in (TRAIN, VALIDATION) for name, source in _open(config, split)]
    named = {_path(output, name if config.sources else "", split): source for name, split, source in opened}
    made_from = _made_from(config, vocab_size, named)
    folder = Path(f"{output}-parts")
    if all(_is_finished(path, made_from) for path in named):
        report(f"{', '.join(named)}: made of these documents already")
        shutil.rmtree(folder, ignore_errors=True)
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    plan = folder / _PLAN
    begun = json.loads(plan.read_text(encoding="utf-8")) if plan.is_file() else None
    if begun is None:
        _refuse_others(output, named, folder)
        folder.mkdir(exist_ok=True)
    elif begun["made_from"] != made_from:
        raise ConfigError(
            f"output={output!r}: {str(folder)!r} is unfinished work on other documents, or with another tokenizer; "
            "finish it with the same command, remove it, or name another output"
        )
    take_lock(folder, "output")
    try:
        if begun is None:
            # As at the first start, also where another number of processes goes on.
            num_parts = {path: _num_parts(source, num_workers) for path, source in named.items()}
            replace_text(plan, json.dumps({"made_from": made_from, "parts": num_parts}))
        else:
            num_parts = begun["parts"]
        tokenizer = prepare_tokenizer(config, vocab_size, f"{output}-{TOKENIZER}")
        targets = []
        for path, source in named.items():
            cut = source.split(num_parts[path])
            targets.append(_Target(path, cut, min(num_parts[path], len(cut.shards))))
        _encode_all(_Work(targets, folder, tokenizer), num_workers, report)
        for target in targets:
            if not _is_finished(target.path, made_from):
                _finish(target, folder, tokenizer, made_from, report)
    finally:
        release_lock(folder)
    shutil.rmtree(folder)


def _open(config: DataConfig, split: str) -> Iterator[tuple[str, Source]]:
    for name, source in open_sources(config, split).items():
        require(not source.is_tokens, source.description, "format=megatron", "these are tokens already")
        yield name, source


def _path(output: str, name: str, split: str) -> str:
    return f"{output}-{f'{name}-' if name else ''}{split}{BIN}"


def _made_from(config: DataConfig, vocab_size: int, named: dict[str, Source]) -> str:
    """A hash of all that the tokens depend on."""
    sources = [[path, dict(source.identity), source.digests()] for path, source in named.items()]
    settings = [config.tokenizer, config.tokenizer_documents, vocab_size, config.bad_documents]
    return f"{stable_hash(json.dumps([settings, sources])):016x}"


def _is_finished(path: str, made_from: str) -> bool:
    try:
        return read_about(path).get("made_from") == made_from
    except ValueError:
        return False


def _refuse_others(output: str, paths: Sequence[str] | dict[str, Source], folder: Path) -> None:
    files = [file for path in paths for file in (path, index_of(path), path.removesuffix(BIN) + ABOUT)]
    for file in [*files, f"{output}-{TOKENIZER}"]:
        require(not os.path.lexists(file), "output", output, f"{file!r} is there already, and was not made of this")
    begun = {LOCK, _PLAN + UNFINISHED}  # killed before the plan was written
    empty = not folder.exists() or (folder.is_dir() and set(os.listdir(folder)) <= begun)
    require(empty, "output", output, f"{str(folder)!r} is there already, and not of an unfinished tokenize")


def _num_parts(source: Source, num_workers: int) -> int:
    """Of at most 256 MiB where files can be cut, and several for each process."""
    size = sum(os.path.getsize(file) if os.path.isfile(file) else _PART_BYTES for file in source.files)
    return min(max(4 * num_workers, -(-size // _PART_BYTES)), _MOST_PARTS)


def _encode_all(work: _Work, num_workers: int, report: Callable[[str], None]) -> None:
    parts = [(t, i) for t, target in enumerate(work.targets) for i in range(target.num_parts)]
    missing = [(t, i) for t, i in parts if not read_about(work.targets[t].part(work.folder, i))]
    if len(missing) < len(parts):
        report(f"{len(parts) - len(missing)} of {len(parts)} parts are there already")
    done, tokens, started = len(parts) - len(missing), 0, time.monotonic()
    reported = started
    here = (work.encode(*part) for part in missing)
    for found in here if num_workers == 1 else _on_processes(work, missing, num_workers):
        done, tokens, now = done + 1, tokens + found, time.monotonic()
        if now - reported > _REPORT_S or done == len(parts):
            report(
                f"{done} of {len(parts)} parts, {tokens:,} tokens, {tokens / max(now - started, 1e-9):,.0f} a second"
            )
            reported = now


def _on_processes(work: _Work, parts: Sequence[tuple[int, int]], num_workers: int) -> Iterator[int]:
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    initial = (os.getpid(), stop, work)
    with ProcessPoolExecutor(min(num_workers, len(parts) or 1), context, _begin_process, initial) as pool:
        try:
            futures = [pool.submit(_encode_here, *part) for part in parts]
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            told = "a process that tokenises was killed (out of memory?); the same command goes on"
            raise TrainingError(told) from error
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


_process: dict[str, Any] = {}  # of a worker process: what it works on


def _begin_process(parent: int, stop: Any, work: _Work) -> None:
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is told to the parent, which tells us
    os.environ["RAYON_NUM_THREADS"] = "1"
    _process.update(stop=stop, work=work)


def _encode_here(target: int, part: int) -> int:
    return _process["work"].encode(target, part, _process["stop"].is_set)


def _finish(target: _Target, folder: Path, tokenizer: Tokenizer, made_from: str, report: Callable[[str], None]) -> None:
    parts = [target.part(folder, i) for i in range(target.num_parts)]
    abouts = [read_about(part) for part in parts]
    documents, tokens = merge(parts, target.path)
    if not documents:
        raise ConfigError(f"{target.source.description}: holds no document")
    skipped = sum(about["skipped_documents"] for about in abouts)
    about = {
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "documents": documents,
        "tokens": tokens,
        "skipped_documents": skipped,
        "made_from": made_from,
    }
    write_about(target.path, about)
    report(
        f"{target.path}: {documents:,} documents, {tokens:,} tokens{f', {skipped:,} passed over' if skipped else ''}"
    )
    for bad in [bad for about in abouts for bad in about["bad"]][:_SAID]:
        report(f"passed over: {bad}")
