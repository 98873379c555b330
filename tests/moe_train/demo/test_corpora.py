"""The demo's raw text: from this machine alone, the same bytes every time, within its bounds."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from moe_train.demo import corpora
from moe_train.errors import UserError

CAPS = {"code": 300_000, "prose": 300_000, "reference": 200_000, "math": 100_000}


def read_documents(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return corpora.build_corpora(tmp_path_factory.mktemp("raw"), CAPS)


def test_two_builds_give_the_same_bytes(built: dict[str, Path], tmp_path: Path) -> None:
    again = corpora.build_corpora(tmp_path / "again", CAPS)
    assert {name: path.read_bytes() for name, path in again.items()} == {
        name: path.read_bytes() for name, path in built.items()
    }


def test_writes_the_four_sources_and_nothing_else(tmp_path: Path) -> None:
    built = corpora.build_corpora(tmp_path / "inside", CAPS)
    names = {"code.jsonl", "prose.jsonl", "reference.jsonl", "math.jsonl"}
    assert {path.name for path in built.values()} == names
    assert {path.name for path in (tmp_path / "inside").iterdir()} == names
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]


@pytest.mark.parametrize("name", CAPS)
def test_sizes_and_documents(built: dict[str, Path], name: str) -> None:
    documents = read_documents(built[name])
    size = sum(len(text.encode()) for text in documents)
    assert CAPS[name] // 4 < size <= CAPS[name]
    assert all(len(text) >= 200 for text in documents)
    assert len(set(documents)) == len(documents) > 5


def test_a_larger_cap_continues_the_same_documents(built: dict[str, Path], tmp_path: Path) -> None:
    larger = corpora.build_corpora(tmp_path, {**CAPS, "prose": 2 * CAPS["prose"]})
    shorter, longer = read_documents(built["prose"]), read_documents(larger["prose"])
    assert longer[: len(shorter)] == shorter and len(longer) > len(shorter)


def test_code_is_whole_python_without_docstrings(built: dict[str, Path]) -> None:
    for text in read_documents(built["code"]):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.ClassDef, ast.Module)) and ast.get_docstring(node):
                # One on the line of its `class` stays; what stood on lines of its own must not.
                assert node.body[0].lineno == getattr(node, "lineno", None), text[:200]


def test_docstrings_are_cut_and_comments_stay() -> None:
    source = '''"""Module."""
import os  # kept


class A:
    """Only this."""


def f(x):
    """Two
    lines."""
    # why
    return """not a docstring"""


def g(): "inline"
'''
    expected = '''import os  # kept


class A:
    ...


def f(x):
    # why
    return """not a docstring"""


def g(): "inline"'''
    assert corpora._without_docstrings(source, ast.parse(source)) == expected


def test_prose_names_what_it_describes_and_drops_sessions(tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    long = "It explains at length what the module is for, " * 5
    path.write_text(f'"""{long}\n\n>>> 1 + 1\n2\n\nThe end."""\n\n\ndef f():\n    """{long}Really."""\n')
    (document,) = corpora.prose_documents([("pkg/m.py", path)])
    assert document.startswith(f"pkg.m\n\n{long}\n\nThe end.\n\npkg.m.f\n\n")
    assert ">>>" not in document


def test_no_paragraph_of_the_reference_is_given_twice(built: dict[str, Path]) -> None:
    paragraphs = [part.strip() for text in read_documents(built["reference"]) for part in text.split("\n\n")]
    long = [text for text in paragraphs if len(text) > 100]
    assert len(long) - len(set(long)) < 0.01 * len(long)


def test_files_that_cannot_be_read_as_python_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "template.py").write_text("class {{ name }}:\n" * 50)
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n" * 50)
    files = [(path.name, path) for path in sorted(tmp_path.iterdir())]
    assert list(corpora.code_documents(files)) == [] == list(corpora.prose_documents(files))


def test_a_python_without_sources_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "package_files", lambda packages: [])
    with pytest.raises(UserError, match="'code'.*standard library") as error:
        corpora.build_corpora(tmp_path, CAPS)
    assert error.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []
