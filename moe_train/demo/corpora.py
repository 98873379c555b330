"""The demo's raw text, taken from this machine: no third-party text is shipped, nothing is downloaded.

| source      | what it is                                                                                 |
|-------------|--------------------------------------------------------------------------------------------|
| `code`      | source files of the standard library and of packages this project installs, no docstrings   |
| `prose`     | the docstrings of those and of the scientific packages, without their interactive examples  |
| `reference` | the language reference that `help()` reads (`pydoc_data.topics`), each paragraph once       |
| `math`      | generated exercises with their solutions (`exercises.py`)                                   |

Each becomes a file of JSON lines with the field `text`. The same Python and the same installed packages give
the same bytes: files are taken in the order of a hash of their names (an even sample of all of them, wherever
the cap on size cuts), never in the order of the file system.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from moe_train.demo.exercises import math_documents
from moe_train.errors import UserError

CODE_PACKAGES = ("megatron", "numpy", "pydantic", "rich", "typer")
PROSE_PACKAGES = ("matplotlib", "networkx", "numpy", "pydantic", "rich", "scipy", "typer")

# Folders that hold no library code of their own: tests, other people's copies, tables and generated files.
SKIPPED_FOLDERS = frozenset(
    "__pycache__ _unicode_data _vendor _vendored dist-packages encodings ensurepip idlelib lib2to3 pydoc_data"
    " site-packages test testing tests turtledemo vendor".split()
)
MIN_FILE_BYTES, MAX_FILE_BYTES = 1_000, 64_000  # smaller: empty modules; larger: mostly tables
MIN_DOCUMENT_CHARS = 200

MEGABYTE = 1_000_000
MAX_BYTES = {"code": 5 * MEGABYTE, "prose": 5 * MEGABYTE, "reference": MEGABYTE // 2, "math": 2 * MEGABYTE}


def build_corpora(
    folder: Path, max_bytes: dict[str, int] = MAX_BYTES, done: Callable[[str, int], None] | None = None
) -> dict[str, Path]:
    """Write `folder/NAME.jsonl` for every source and return the paths by name.

    Args:
        folder: made when missing; only the sources' files in it are written, each complete or not at all.
        max_bytes: the cap on each source's text, in bytes of UTF-8.
        done: called with the name and the bytes of text of each source that is written.
    Raises:
        UserError: this Python has too little text of its own (an installation without sources).
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, documents in _documents().items():
        paths[name] = folder / f"{name}.jsonl"
        size = _write_jsonl(paths[name], documents, max_bytes[name])
        if size < max_bytes[name] // 4:
            paths[name].unlink()
            raise UserError(
                f"the demo found only {size} bytes of text for its source {name!r} in"
                f" {sysconfig.get_path('stdlib')} and the installed packages: use a Python whose standard"
                " library is installed as source files"
            )
        if done is not None:
            done(name, size)
    return paths


def _documents() -> dict[str, Iterator[str]]:
    """The documents of each source, lazily: no more files are read than the caps allow."""
    return {
        "code": code_documents(package_files(CODE_PACKAGES)),
        "prose": prose_documents(package_files(PROSE_PACKAGES)),
        "reference": reference_documents(),
        "math": math_documents(seed=1234),
    }


def package_files(packages: Iterable[str]) -> list[tuple[str, Path]]:
    """(name, path) of the Python files of the standard library and of `packages`, in an order that mixes them
    all."""
    roots = {"": Path(sysconfig.get_path("stdlib"))}
    for package in packages:
        spec = importlib.util.find_spec(package)  # finds a top-level package without importing it
        if spec is not None and spec.submodule_search_locations:
            roots[package] = Path(list(spec.submodule_search_locations)[0])
    files = []
    for package, root in roots.items():
        for path in _python_files(root):
            files.append((os.path.join(package, path.relative_to(root).as_posix()), path))
    return sorted(files, key=lambda item: hashlib.blake2b(item[0].encode(), digest_size=8).digest())


def _python_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS and not name.startswith("config-")]
        for name in names:
            path = Path(folder, name)
            if not name.endswith(".py") or name.startswith(("test_", "_sysconfigdata", "sitecustomize")):
                continue
            if not path.is_symlink() and MIN_FILE_BYTES <= path.stat().st_size <= MAX_FILE_BYTES:
                yield path


def code_documents(files: Iterable[tuple[str, Path]]) -> Iterator[str]:
    """One document a file: its path as a comment, then the source without docstrings."""
    for name, path in files:
        parsed = _parse(path)
        if parsed is not None:
            source, tree = parsed
            text = _without_docstrings(source, tree).strip()
            if len(text) >= MIN_DOCUMENT_CHARS:
                yield f"# {name}\n\n{text}\n"


def prose_documents(files: Iterable[tuple[str, Path]]) -> Iterator[str]:
    """One document a module: its docstrings under the names of what they describe, each text once in all."""
    seen: set[str] = set()
    for name, path in files:
        parsed = _parse(path)
        if parsed is None:
            continue
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        parts = []
        for qualified, docstring in _docstrings(parsed[1], module):
            text = _without_examples(docstring)
            if len(text) >= 40 and text not in seen:
                seen.add(text)
                parts.append(f"{qualified}\n\n{text}\n")
        document = "\n".join(parts)
        if len(document) >= MIN_DOCUMENT_CHARS:
            yield document


def reference_documents() -> Iterator[str]:
    """One document a topic of the language reference; a paragraph that an earlier topic holds is left out.

    Topics overlap (a chapter and its sections are topics of their own): without this, held-out text would be
    in the training text too. Short topics come first, so that a chapter loses what its sections already said.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    for _, topic in sorted(topics.items(), key=lambda item: (len(item[1]), item[0])):
        fresh = [paragraph for paragraph in topic.split("\n\n") if paragraph.strip() not in seen]
        seen.update(paragraph.strip() for paragraph in fresh)
        text = "\n\n".join(fresh).strip()
        if len(text) >= MIN_DOCUMENT_CHARS:
            yield text + "\n"


def _parse(path: Path) -> tuple[str, ast.Module] | None:
    """The source and syntax tree of a file; None where either cannot be had (templates, other encodings)."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            return source, ast.parse(source)
    except (SyntaxError, ValueError):
        return None


def _docstring_node(node: ast.AST) -> ast.Expr | None:
    """The statement that is the docstring of a module, class or function; None where there is none."""
    if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        return None
    first = node.body[0] if node.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return first
    return None


def _docstrings(node: ast.AST, qualified: str) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of a module and all that it defines, in the order of the file."""
    if _docstring_node(node) is not None:
        yield qualified, ast.get_docstring(node) or ""
    for child in getattr(node, "body", ()):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _docstrings(child, f"{qualified}.{child.name}")


def _without_docstrings(source: str, tree: ast.Module) -> str:
    """The source with its docstrings cut out, comments and layout kept; `...` stays where nothing else
    would."""
    lines: list[str | None] = list(source.splitlines())
    for node in ast.walk(tree):
        statement = _docstring_node(node)
        if statement is None or (lines[statement.lineno - 1] or "")[: statement.col_offset].strip():
            continue  # none, or on one line with its `def`
        first, last = statement.lineno - 1, statement.end_lineno or statement.lineno
        lines[first:last] = [None] * (last - first)
        if not isinstance(node, ast.Module) and len(node.body) == 1:
            lines[first] = " " * statement.col_offset + "..."
    return "\n".join(line.rstrip() for line in lines if line is not None)


def _without_examples(docstring: str) -> str:
    """A docstring without the paragraphs that are interactive sessions: they are code."""
    paragraphs = docstring.strip().split("\n\n")
    return "\n\n".join(text for text in paragraphs if not text.lstrip().startswith(">>>")).strip()


def _write_jsonl(path: Path, documents: Iterable[str], max_bytes: int) -> int:
    """Write documents until the next would pass `max_bytes` of text; return the bytes of text written."""
    size = 0
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        for document in documents:
            # A docstring may spell half of a surrogate pair, which no file can hold.
            text = document.encode("utf-8", "replace")
            if size + len(text) > max_bytes:
                break
            size += len(text)
            file.write(json.dumps({"text": text.decode()}, ensure_ascii=False).encode() + b"\n")
    os.replace(partial, path)
    return size
