"""Rows of tables: bad strings anywhere in them, kinds of strings, columns of one name."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.documents import read_documents
from data_pipeline.errors import DataError
from data_pipeline.filters import parse_filters

pyarrow = pytest.importorskip("pyarrow")


def write(path: Path, table) -> list[str]:
    if path.suffix == ".parquet":
        from pyarrow import parquet

        parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    return [str(path)]


def strings(*values: bytes | None):
    """A column of strings, UTF-8 or not."""
    return pyarrow.array(values, pyarrow.binary()).view(pyarrow.string())


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_a_bad_string_in_a_struct_costs_its_own_row_alone(tmp_path: Path, ending: str) -> None:
    body = strings(b"one", b"\xff\xfe", None, b"four", b"five")
    tags = pyarrow.ListArray.from_arrays([0, 1, 1, 1, 2, 2], strings(b"\xff", b"fine"))
    inner = pyarrow.StructArray.from_arrays([body, tags], ["body", "tags"])
    lang = strings(b"en", b"en", b"en", b"\xff", b"de")
    meta = pyarrow.StructArray.from_arrays(
        [inner, lang], ["inner", "lang"], mask=pyarrow.array([False, False, False, False, True])
    )
    files = write(tmp_path / f"x.{ending}", pyarrow.table({"meta": meta}))
    documents = list(read_documents(files, "meta.inner.body"))
    assert [document.text for document in documents] == ["one", None, None, "four", None]
    missing = "missing field"
    assert [document.problem for document in documents] == [None, "invalid UTF-8", missing, None, missing]


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_every_kind_of_string(tmp_path: Path, kind: str) -> None:
    if kind == "dictionary":
        column = strings(b"one", b"\xff\xfe", b"one").dictionary_encode()
    else:
        column = strings(b"one", b"\xff\xfe", b"one")
        column = column.cast(pyarrow.large_binary()).view(pyarrow.large_string()) if kind == "large_string" else column
        if kind == "string_view":
            column = column.cast(pyarrow.binary()).cast(pyarrow.binary_view()).view(pyarrow.string_view())
    found = list(read_documents(write(tmp_path / "x.arrow", pyarrow.table({"text": column}))))
    assert [document.text for document in found] == ["one", None, "one"] and found[1].problem == "invalid UTF-8"


def test_filters_see_the_fields_of_structs(tmp_path: Path) -> None:
    from data_pipeline import columnar

    rows = [{"lang": "en", "score": 0.5, "sub": {"ok": True}}, {"lang": "de", "score": None, "sub": None}]
    files = write(tmp_path / "x.parquet", pyarrow.table({"text": ["a", "b"], "meta": rows}))
    found = list(columnar.rows(files[0], ["text", "meta.lang"]))
    conditions = parse_filters(["meta.lang=en", "meta.score>=0.5", "meta.sub.ok=true"])
    assert [[condition.accepts(row) for condition in conditions] for row in found] == [[True] * 3, [False] * 3]


def test_a_column_that_is_there_twice_is_one_line(tmp_path: Path) -> None:
    names = ["text", "text", "n", "n"]
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 4, names=names)
    for ending in ("parquet", "arrow"):
        with pytest.raises(DataError, match=f"x.{ending}: has 2 columns 'text'; write it anew with one"):
            list(read_documents(write(tmp_path / f"x.{ending}", table)))
    others = table.select([0, 2, 3])  # two of a name that nobody asks for
    assert [document.text for document in read_documents(write(tmp_path / "y.parquet", others))] == ["a"]
