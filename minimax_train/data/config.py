"""The ``data`` group of the configuration."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated

from minimax_train.errors import require, require_choice
from minimax_train.fields import PATH, Range, check_fields

SOURCES = ("stdlib", "files", "hub")
FORMATS = ("text", "json", "parquet")
TRAIN_TOKENIZER = "train"
ERROR, SKIP = "error", "skip"

# Fields that only one source reads: setting one under another source is an error, not silence.
_READ_ONLY_BY = {
    "files": ("format", "train_files", "validation_files"),
    "hub": ("name", "subset", "revision", "train_split", "validation_split"),
}


@dataclass
class DataConfig:
    """Where documents come from and how they become packed sequences; the defaults need no network and no files.

    Attributes:
        source: ``stdlib`` (the Python standard library's own sources), ``files`` or ``hub``.
        format: files: ``text`` (one document per file), ``json`` (JSON lines, or one list) or ``parquet``.
        train_files, validation_files: files: paths or globs, ``**`` crosses folders; without validation
            files there is no evaluation.
        name, subset, revision: hub: the data set, its configuration and its git revision.
        train_split, validation_split: hub: split names; without a validation split there is no evaluation.
        text_column: the column that holds the text (json, parquet, hub).
        bad_documents: what a document that cannot be used does, such as a line that is no JSON: ``error`` ends the run
            and names file, line and reason; ``skip`` passes over it, and the metrics count it.
        tokenizer: ``train`` for a byte-level BPE trained on the training documents, or a Hugging Face name or folder.
        tokenizer_documents: how many documents the BPE is trained on.
        sequence_length: tokens of a packed sequence, where a run begins.
        num_streams: streams the documents are dealt into, a multiple of the data-parallel size. It belongs to the
            run: another number is another order of the data.
        shuffle_documents: block size of the shuffle in documents, per stream; 1 switches it off.

    Raises:
        ConfigError: naming the field, its value and what is accepted.
    """

    source: str = "stdlib"
    format: str = "text"
    train_files: Annotated[list[str], PATH] = field(default_factory=list)
    validation_files: Annotated[list[str], PATH] = field(default_factory=list)
    name: str | None = None
    subset: str | None = None
    revision: str | None = None
    train_split: str = "train"
    validation_split: str | None = None
    text_column: str = "text"
    bad_documents: str = ERROR
    tokenizer: Annotated[str, PATH] = TRAIN_TOKENIZER
    tokenizer_documents: Annotated[int, Range(1, 10**9)] = 1000
    sequence_length: Annotated[int, Range(1, 2**31 - 1)] = 2048
    num_streams: Annotated[int, Range(1, 2**20)] = 8
    shuffle_documents: Annotated[int, Range(1, 2**24)] = 256

    def __post_init__(self) -> None:
        check_fields("data", self)
        require_choice("data.source", self.source, SOURCES)
        require_choice("data.format", self.format, FORMATS)
        require_choice("data.bad_documents", self.bad_documents, (ERROR, SKIP))
        if self.source == "files":
            accepted = "data.source='files' needs at least one path or glob"
            require(bool(self.train_files), "data.train_files", self.train_files, accepted)
        if self.source == "hub":
            require(bool(self.name), "data.name", self.name, "data.source='hub' needs the name of a data set")
        self._refuse_unread()

    def _refuse_unread(self) -> None:
        defaults = {f.name: f.default_factory() if callable(f.default_factory) else f.default for f in fields(self)}
        unread = {
            name: f"data.source={source!r}"
            for source, names in _READ_ONLY_BY.items()
            if source != self.source
            for name in names
        }
        if self.source == "stdlib" or (self.source == "files" and self.format == "text"):
            with_columns = "data.source='hub', data.format='json' or data.format='parquet'"
            unread |= dict.fromkeys(("text_column", "bad_documents"), with_columns)
        for name, reader in unread.items():
            value = getattr(self, name)
            require(value == defaults[name], f"data.{name}", value, f"is read only with {reader}; leave it out here")

    @property
    def has_validation(self) -> bool:
        """Whether there are held-out documents to evaluate on."""
        if self.source == "files":
            return bool(self.validation_files)
        return self.source == "stdlib" or self.validation_split is not None
