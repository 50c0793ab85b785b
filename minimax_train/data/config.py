"""The ``data`` group of the configuration."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated

from minimax_train.data.columns import TextColumns
from minimax_train.errors import require, require_choice
from minimax_train.fields import PATH, Range, check_fields

MEGATRON = "megatron"
SOURCES = ("stdlib", "files", "hub")
FORMATS = ("text", "json", "parquet", "arrow", MEGATRON)
TRAIN_TOKENIZER = "train"
ERROR, SKIP = "error", "skip"
SPLIT, TRUNCATE, BEST_FIT = "split", "truncate", "best_fit"
LENGTHS = ("short", "medium", "long")
# Stands between a source's name and a length bucket's: ``web/long``.
OF_LENGTH = "/"

# Fields that only one kind of source reads: setting one under another is an error, not silence.
_READ_ONLY_BY = {
    "files": ("format", "train_files", "validation_files"),
    "hub": ("name", "subset", "revision", "train_split", "validation_split"),
}
_MOST_TOKENS = 2**31 - 1


@dataclass
class SourceConfig:
    """Where documents come from.

    Attributes:
        source: ``stdlib`` (the Python standard library's own sources), ``files`` or ``hub``.
        format: files: ``text`` (one document per file), ``json`` (JSON lines, or one list), ``parquet``,
            ``arrow``, or ``megatron`` (tokens in Megatron-Core's ``.bin`` and ``.idx``).
        train_files, validation_files: files: paths or globs, ``**`` crosses folders.
        name, subset, revision: hub: the data set, its configuration and its git revision.
        train_split, validation_split: hub: split names.
        text_column: the column that holds the text (json, parquet, arrow, hub); dots lead into nested objects.
        template: text made of several columns (json, parquet, arrow, hub), as in ``{title}\\n\\n{body.text}``, where
            ``\\n`` stands for a line break; null for ``text_column`` alone.
        held_out: share of the training documents, chosen by a hash of their content, that are kept for evaluation.
        max_epochs: how many times at most the source is read; null for no limit.
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
    template: str | None = None
    held_out: Annotated[float, Range(0.0, 0.5)] = 0.0
    max_epochs: Annotated[int | None, Range(1, 10**9, null="no limit")] = None

    def check_source(self, path: str) -> None:
        """Refuse what cannot be read.

        Args:
            path: dotted, of the group that this source is, for messages.
        """
        require_choice(f"{path}.source", self.source, SOURCES)
        require_choice(f"{path}.format", self.format, FORMATS)
        if self.source == "files":
            accepted = f"{path}.source='files' needs at least one path or glob"
            require(bool(self.train_files), f"{path}.train_files", self.train_files, accepted)
        if self.source == "hub":
            require(bool(self.name), f"{path}.name", self.name, f"{path}.source='hub' needs the name of a data set")
        unread = {
            name: f"{path}.source={source!r}"
            for source, names in _READ_ONLY_BY.items()
            if source != self.source
            for name in names
        }
        if not self.has_columns:
            with_columns = f"{path}.source='hub' or {path}.format='json', 'parquet' or 'arrow'"
            unread |= dict.fromkeys(("text_column", "template"), with_columns)
        self.refuse_set(path, unread)
        if self.template is not None:
            self.refuse_set(path, {"text_column": f"{path}.template=null"})
            TextColumns.of(path, self.text_column, self.template)
        if self.has_validation_files:
            theirs = {"files": "validation_files", "hub": "validation_split"}.get(self.source, "source='stdlib'")
            accepted = f"must be 0 beside {path}.{theirs}, which holds out documents of its own"
            require(self.held_out == 0, f"{path}.held_out", self.held_out, accepted)

    def refuse_set(self, path: str, unread: dict[str, str]) -> None:
        """Refuse values other than the default of fields that nothing reads.

        Args:
            unread: by field, with what it would be read.
        """
        defaults = {f.name: f.default_factory() if callable(f.default_factory) else f.default for f in fields(self)}
        for name, reader in unread.items():
            value = getattr(self, name)
            accepted = f"is read only with {reader}; set that too, or leave this out"
            require(value == defaults[name], f"{path}.{name}", value, accepted)

    @property
    def has_columns(self) -> bool:
        return self.source == "hub" or (self.source == "files" and self.format in ("json", "parquet", "arrow"))

    @property
    def has_validation_files(self) -> bool:
        """Whether its held-out documents are files or a split of their own."""
        if self.source == "files":
            return bool(self.validation_files)
        return self.source == "stdlib" or self.validation_split is not None

    @property
    def is_held_out(self) -> bool:
        """Whether some of its documents are held out for evaluation."""
        return self.held_out > 0 or self.has_validation_files


@dataclass
class MixtureSourceConfig(SourceConfig):
    """One of several sources.

    Attributes:
        weight: its share of the tokens, beside the others' weights, where a stage of the recipe names none.
        lengths: which documents are asked of it where a stage says how long documents are to be: any of ``short``,
            ``medium`` and ``long``.
    """

    source: str = "files"
    weight: Annotated[float, Range(0.0, 10**9)] = 1.0
    lengths: list[str] = field(default_factory=lambda: list(LENGTHS))

    def check_source(self, path: str) -> None:
        super().check_source(path)
        accepted = f"must be some of {', '.join(LENGTHS)}, each once"
        fits = bool(self.lengths) and len(set(self.lengths)) == len(self.lengths) and set(self.lengths) <= set(LENGTHS)
        require(fits, f"{path}.lengths", self.lengths, accepted)


@dataclass
class DataConfig(SourceConfig):
    """Where documents come from and how they become packed sequences; the defaults need no network and no files.

    Attributes:
        sources: several sources by name; empty for the one that this group itself describes.
        bad_documents: what a document that cannot be used does, such as a line that is no JSON: ``error`` ends the run
            and names file, line and reason; ``skip`` passes over it, and the metrics count it.
        exclude_held_out: whether training passes over documents that are held out as well, by a hash of their content.
        tokenizer: ``train`` for a byte-level BPE trained on the training documents, or a Hugging Face name or folder.
        tokenizer_documents: how many documents the BPE is trained on.
        sequence_length: tokens of a packed sequence, where a run begins.
        packing: what becomes of a document that does not fit in what is left of a packed sequence: ``split`` (it goes
            on in the next one), ``truncate`` (its rest is dropped and counted) or ``best_fit`` (documents are picked
            out of the following ones so that fewer are split).
        medium_length, long_length: tokens from which on a document is a medium one, and a long one.
        num_streams: streams the documents are dealt into, a multiple of the data-parallel size. It belongs to the
            run: another number is another order of the data.
        num_workers: processes that read, tokenise and pack for a data-parallel rank, beside the trainer and one step
            ahead of it; its tensor- and context-parallel ranks on one machine share them. Each takes some of the rank's
            streams. 0 for none: the trainer does it between steps. The order of the data does not depend on it.
        shuffle_documents: block size of the shuffle in documents, per stream; 1 switches it off.

    Raises:
        ConfigError: naming the field, its value and what is accepted.
    """

    sources: dict[str, MixtureSourceConfig] = field(default_factory=dict)
    bad_documents: str = ERROR
    exclude_held_out: bool = True
    tokenizer: Annotated[str, PATH] = TRAIN_TOKENIZER
    tokenizer_documents: Annotated[int, Range(1, 10**9)] = 1000
    sequence_length: Annotated[int, Range(1, _MOST_TOKENS)] = 2048
    packing: str = SPLIT
    medium_length: Annotated[int, Range(2, _MOST_TOKENS)] = 32768
    long_length: Annotated[int, Range(2, _MOST_TOKENS)] = 131072
    num_streams: Annotated[int, Range(1, 2**20)] = 8
    num_workers: Annotated[int, Range(0, 2**10)] = 1
    shuffle_documents: Annotated[int, Range(1, 2**24)] = 256

    def __post_init__(self) -> None:
        check_fields("data", self)
        for name, source in self.sources.items():
            check_fields(f"data.sources.{name}", source)
            source.check_source(f"data.sources.{name}")
        if self.sources:
            own = {f.name: "data.sources={}" for f in fields(SourceConfig)}
            self.refuse_set("data", own)
            positive = any(source.weight > 0 for source in self.sources.values())
            weights = {name: source.weight for name, source in self.sources.items()}
            require(positive, "data.sources", weights, "one weight must be above 0")
        else:
            self.check_source("data")
        require_choice("data.bad_documents", self.bad_documents, (ERROR, SKIP))
        if not any(source.has_columns for source in self.named_sources.values()):
            with_columns = "data.source='hub' or data.format='json', 'parquet' or 'arrow'"
            self.refuse_set("data", {"bad_documents": with_columns})
        require_choice("data.packing", self.packing, (SPLIT, TRUNCATE, BEST_FIT))
        accepted = f"must be above data.medium_length={self.medium_length}"
        require(self.medium_length < self.long_length, "data.long_length", self.long_length, accepted)

    @property
    def named_sources(self) -> dict[str, SourceConfig]:
        """The sources by name: the only one is named as its kind."""
        return dict(self.sources) or {self.source: self}

    def path_of(self, name: str) -> str:
        """The dotted group that configures a source, for messages."""
        return f"data.sources.{name}" if self.sources else "data"

    @property
    def origins(self) -> list[str]:
        """What a token's document can be, by source and length: ``web/long``. Losses are told apart by these."""
        return [f"{name}{OF_LENGTH}{length}" for name in self.named_sources for length in LENGTHS]

    @property
    def has_validation(self) -> bool:
        """Whether there are held-out documents to evaluate on."""
        return any(source.is_held_out for source in self.named_sources.values())
