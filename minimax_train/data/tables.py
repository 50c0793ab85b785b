"""The rows of a file of columns, or of a part of it: Parquet, Arrow; and of a shard of a data set of ``datasets``.

As in :mod:`minimax_train.data.readers`. Apart from it because this imports pyarrow: a trainer that reads in worker
processes does without.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from minimax_train.data.columns import TextColumns
from minimax_train.data.readers import BadDocument, Part, Row, cut_evenly, least, open_raw
from minimax_train.errors import ConfigError

if TYPE_CHECKING:
    import datasets

_ROWS_PER_READ = 256
_GROUPS_PER_SLICE = 16  # of Parquet, from which on slices of whole row groups are about as large as each other
_ARROW_FILE = b"ARROW1"


def read_parquet(path: str, columns: TextColumns, start_row: int, offset: int, part: Part) -> Iterator[Row]:
    """The rows of a Parquet file; row groups before ``start_row`` are not read."""
    with open_raw(path) as opened:
        file, row = pq.ParquetFile(opened), 0
        for name in columns.names:
            _check_column(columns, name, path, file.schema_arrow)
        first, end = part.begin + start_row, file.metadata.num_rows if part.end is None else part.end
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if row < end and row + rows > first:
                batches = file.iter_batches(_ROWS_PER_READ, row_groups=[group], columns=list(columns.names))
                yield from _from_batches(batches, path, columns, row, Part(first, end), part.begin)
            row += rows


def read_arrow(path: str, columns: TextColumns, start_row: int, offset: int, part: Part) -> Iterator[Row]:
    """The rows of an Arrow IPC file or stream, as ``datasets`` saves it; record batches before are not decoded."""
    with _arrow_batches(path) as batches:
        yield from _from_batches(batches, path, columns, 0, Part(part.begin + start_row, part.end), part.begin)


def read_shard(shard: datasets.IterableDataset, name: str, columns: TextColumns, start_row: int) -> Iterator[Row]:
    """The rows of one shard of a streaming data set in Arrow format."""
    return _from_batches(shard.iter(batch_size=_ROWS_PER_READ), name, columns, 0, Part(start_row, None), 0)


def cut_parquet(path: str, slices: int, smallest: int) -> list[int] | None:
    """Rows at which a file is cut into slices of at least ``smallest`` rows, between row groups if there are many."""
    if not os.path.isfile(path):
        return None
    metadata = pq.read_metadata(path)
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    bounds = [0]
    for rows in groups:
        bounds.append(bounds[-1] + rows)
    edges = cut_evenly(metadata.num_rows, slices)
    if len(groups) >= _GROUPS_PER_SLICE * slices:
        edges = [bounds[len(groups) * i // slices] for i in range(slices + 1)]
    return edges if least(edges) >= max(smallest, 1) else None


def cut_arrow(path: str, slices: int, smallest: int) -> list[int] | None:
    """The same of an Arrow file, at any row."""
    if not os.path.isfile(path):
        return None
    with _arrow_batches(path) as batches:
        edges = cut_evenly(sum(len(batch) for batch in batches), slices)
    return edges if least(edges) >= max(smallest, 1) else None


@contextmanager
def _arrow_batches(path: str) -> Iterator[Iterator[pa.RecordBatch]]:
    is_local = os.path.isfile(path)
    with pa.memory_map(path) if is_local else pa.PythonFile(open_raw(path), mode="r") as file:
        is_file = file.read(len(_ARROW_FILE)) == _ARROW_FILE
        file.seek(0)
        if is_file:
            reader = pa.ipc.open_file(file)
            yield (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            yield iter(pa.ipc.open_stream(file))


def _from_batches(
    batches: Iterable[Any], name: str, columns: TextColumns, row: int, part: Part, base: int
) -> Iterator[Row]:
    """The rows of ``part`` of batches that begin at ``row``, numbered from ``base`` on."""
    for batch in batches:
        if part.end is not None and row >= part.end:
            return
        first, count = max(part.begin - row, 0), len(batch)
        if part.end is not None:
            count = min(count, part.end - row)
        if first < count:
            found = [_values(_column(batch, name, columns, column), first, count) for column in columns.names]
            for i, values in enumerate(zip(*found, strict=True), row + first):
                wrong = next((value for value in values if isinstance(value, UnicodeDecodeError)), None)
                if wrong is not None:
                    yield i - base, 0, BadDocument(name, "row", i + 1, f"not UTF-8: {wrong.reason}")
                else:
                    yield i - base, 0, columns.fill(values)
        row += len(batch)


def _values(texts: Any, first: int, end: int) -> list[Any]:
    texts = texts.slice(first, end - first)
    try:
        return texts.to_pylist()
    except UnicodeDecodeError:
        return [_value(text) for text in texts]


def _value(text: pa.Scalar) -> str | UnicodeDecodeError | None:
    try:
        return text.as_py()
    except UnicodeDecodeError as error:
        return error


def _column(batch: Any, where: str, columns: TextColumns, name: str) -> Any:
    """A column of exactly that name, or what dots lead to, as text."""
    found: Any = None
    for index in _check_column(columns, name, where, batch.schema):
        if found is None:
            found = batch.column(index)
        else:
            found = pa.compute.call_function("struct_field", [found], pa.compute.StructFieldOptions([index]))
    return found.cast(found.type.value_type) if pa.types.is_dictionary(found.type) else found


def _check_column(columns: TextColumns, name: str, where: str, schema: pa.Schema) -> list[int]:
    """Indices of a column and of the fields in it.

    Raises:
        ConfigError: when there is none, or it holds no text.
    """
    try:
        path, kind = _find(list(schema), name)
    except KeyError:
        shown = ", ".join(schema.names) or "none"
        raise ConfigError(f"{columns.of_column(name)}: not in {where!r}; columns are {shown}") from None
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    if not any(is_kind(kind) for is_kind in is_text):
        raise ConfigError(f"{columns.of_column(name)}: holds {kind} in {where!r}, must hold text")
    return path


def _find(fields: list[pa.Field], name: str) -> tuple[list[int], pa.DataType]:
    names = [field.name for field in fields]
    if name in names:
        return [names.index(name)], fields[names.index(name)].type
    outer, dot, inner = name.partition(".")
    if not dot or outer not in names or not pa.types.is_struct(kind := fields[names.index(outer)].type):
        raise KeyError(name)
    path, found = _find([kind.field(i) for i in range(kind.num_fields)], inner)
    return [names.index(outer), *path], found
