"""Rows of .parquet files and of Hugging Face datasets saved to disk (.arrow), as a stream. pyarrow is imported
when such a file is met: it is the optional extra ``data``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from data_pipeline.errors import DamagedDataError, DataError

ENDINGS = (".parquet", ".arrow")
_ROWS = 256


def rows(path: str, fields: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Each row of `path` with the columns that `fields` (the first is the text's) need; text comes as bytes.

    Raises DataError when pyarrow or the text's column is missing, DamagedDataError for a file that is no such
    file.
    """
    try:
        import pyarrow
    except ImportError:
        raise DataError(f"{path}: needs the package pyarrow; pip install 'moe-train[data]' (or pyarrow)") from None
    wanted = list(dict.fromkeys(fields))
    try:
        for batch in _batches(path, wanted, pyarrow):
            columns = {name: _values(batch.column(name), pyarrow) for name in batch.schema.names}
            for values in zip(*columns.values()):
                yield dict(zip(columns, values))
    except pyarrow.ArrowInvalid as error:
        reason = " ".join(str(error).split())
        raise DamagedDataError(f"{path}: is damaged ({reason}); fetch it again") from None


def _batches(path: str, wanted: list[str], pyarrow: Any) -> Iterator[Any]:
    if path.endswith(".parquet"):
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            columns = _columns(path, wanted, file.schema_arrow.names)
            yield from file.iter_batches(batch_size=_ROWS, columns=columns)
        return
    with pyarrow.memory_map(path) as mapped:
        try:
            reader = pyarrow.ipc.open_stream(mapped)  # what `datasets` writes
            batches: Iterable[Any] = reader
        except pyarrow.ArrowInvalid:
            reader = pyarrow.ipc.open_file(mapped)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        columns = _columns(path, wanted, reader.schema.names)
        for batch in batches:
            for first in range(0, batch.num_rows, _ROWS):
                yield batch.slice(first, _ROWS).select(columns)


def _columns(path: str, wanted: list[str], there: list[str]) -> list[str]:
    """Names of the columns that hold the fields; ``a.b`` may be the column of that name or one called a."""
    found = [name if name in there else name.partition(".")[0] for name in wanted]
    if found[0] not in there:
        raise DataError(f"{path}: has no column {wanted[0]!r}; it has {', '.join(there)}: name one with --text-key")
    for name in found:
        if there.count(name) > 1:
            raise DataError(f"{path}: has {there.count(name)} columns {name!r}; write it anew with one of that name")
    return list(dict.fromkeys(name for name in found if name in there))


def _values(column: Any, pyarrow: Any) -> list[Any]:
    """A column as Python values. Strings stay bytes, in structs too: one that is not UTF-8 must not take its batch
    along. Lists and maps, in which no field is looked for, are None."""
    kind, types = column.type, pyarrow.types
    if types.is_struct(kind):
        parts = {field.name: _values(part, pyarrow) for field, part in zip(kind, column.flatten())}
        return [{name: values[row] for name, values in parts.items()} for row in range(len(column))]
    if types.is_nested(kind):
        return [None] * len(column)
    if (kind.value_type if types.is_dictionary(kind) else kind) in _strings(pyarrow):
        column = column.cast(pyarrow.large_binary())
    return column.to_pylist()


def _strings(pyarrow: Any) -> tuple[Any, ...]:
    views = (pyarrow.string_view(),) if hasattr(pyarrow, "string_view") else ()  # since pyarrow 16
    return pyarrow.string(), pyarrow.large_string(), *views
