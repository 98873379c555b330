"""From a run file to one document: sections in files of their own, presets by name, relative paths,
overrides.

What a file may hold and how a mistake is told is `data_pipeline.yaml_marks`' business; here files and
overrides become one document whose every key still knows where it came from.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path

from data_pipeline.yaml_marks import (
    Document,
    KeyPath,
    Mark,
    YamlError,
    dotted,
    parse_yaml,
    read_yaml,
    suggestion,
)
from moe_train.errors import UserError

SECTIONS = (
    "model",
    "data",
    "parallel",
    "training",
    "optimizer",
    "schedule",
    "checkpoint",
    "faults",
    "logging",
    "launch",
)
"""Top-level keys that hold a mapping, or the path of a YAML file with that mapping."""

FILE_KEYS: dict[KeyPath, str] = {("data", "mixture"): "data", ("launch", "cluster"): "cluster"}
"""Keys that name a YAML file, which may be a preset: the kind (subfolder of configs/) that its name is looked
up in."""

PATH_KEYS: tuple[KeyPath, ...] = (("checkpoint", "initialize_from"), ("checkpoint", "copy_to"))
"""Other keys that name a path, relative to the file that names them, or a URL."""


def load_document(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Document:
    """The run file at `path` (or the preset of that name) with `overrides` applied and its paths made
    absolute.

    Overrides are ``a.b=c`` or ``--a.b=c``; c is read as YAML, and what it names is relative to the working
    folder.

    Raises YamlError or UserError, one line that names the file and line, or the override.
    """
    document = _Assembler(find_config(path, "run", Path.cwd()))
    for override in overrides:
        document.override(override)
    return document.finished()


def load_part(path: str | os.PathLike[str], kind: str, overrides: Iterable[str] = ()) -> Document:
    """One section's own file, such as a model's (kind ``model``), with overrides of its keys
    (``num_layers=2``)."""
    document = read_yaml(shown(find_config(path, kind, Path.cwd())))
    for override in overrides:
        keys, value = parse_override(override)
        document.set(keys, value)
    return document


def parse_override(text: str) -> tuple[KeyPath, Document]:
    """``a.b=c`` or ``--a.b=c`` -> (("a", "b"), the value read as YAML)."""
    key, equals, value = text.removeprefix("--").partition("=")
    keys = tuple(key.split("."))
    if not equals or not all(keys):
        raise UserError(f"override {text!r}: not of the form a.b=c; write for example training.max_steps=100")
    if not value.strip():
        raise UserError(f"override {text!r}: has no value; write {key}=null to leave the key empty")
    return keys, parse_yaml(value, f"override {text.removeprefix('--')}", lines=False)


class _Assembler:
    """A run file on its way to one document; remembers the folder that each file's paths are relative to."""

    def __init__(self, path: Path) -> None:
        self.file = shown(path)
        self.folders: dict[str, Path] = {self.file: path.resolve().parent}
        self.document = read_yaml(self.file)
        if not isinstance(self.document.data, dict):
            raise YamlError(f"{self.file}:1: is not a run file; it should have the keys output_dir, model and data")

    def override(self, text: str) -> None:
        keys, value = parse_override(text)
        if len(keys) > 1:
            self._open_section(keys[0])
            if keys[0] in SECTIONS and self.document.data.get(keys[0]) is None:
                self.document.set(keys[:1], Document({}, {(): value.mark(())}))
        elif keys[0] not in (*SECTIONS, "output_dir"):
            raise value.error(keys, f"unknown key; {suggestion(keys[0], (*SECTIONS, 'output_dir'))}")
        self.document.set(keys, value)

    def finished(self) -> Document:
        for section in SECTIONS:
            self._open_section(section)
        for keys, kind in FILE_KEYS.items():
            self._replace_path(keys, kind)
        for keys in PATH_KEYS:
            self._replace_path(keys, None)
        self._replace_output_dir()
        return self.document

    def _open_section(self, section: str) -> None:
        """Put the file that `section` names in its place, where it names one."""
        named = self.document.data.get(section)
        if section not in SECTIONS or not isinstance(named, str):
            return
        mark = self.document.mark((section,))
        path = self._find(named, section, mark, (section,))
        self.folders[shown(path)] = path.parent
        part = read_yaml(shown(path))
        if not isinstance(part.data, dict):
            raise YamlError(f"{shown(path)}:1: is not a mapping of the keys of {section}; see {mark}")
        self.document.set((section,), part)

    def _replace_path(self, keys: KeyPath, kind: str | None) -> None:
        parent = self.document.data
        for key in keys[:-1]:
            parent = parent.get(key) if isinstance(parent, dict) else None
        named = parent.get(keys[-1]) if isinstance(parent, dict) else None
        if not isinstance(named, str):
            return  # absent, or of a wrong type, which validation tells
        mark = self.document.mark(keys)
        if kind is not None:
            parent[keys[-1]] = str(self._find(named, kind, mark, keys))
        elif "://" not in named:
            parent[keys[-1]] = str(_absolute(named, self._folder(mark)))

    def _replace_output_dir(self) -> None:
        """The one path that is relative to where the command runs."""
        named = self.document.data.get("output_dir")
        if isinstance(named, str) and named:
            self.document.data["output_dir"] = str(_absolute(named, Path.cwd()))

    def _folder(self, mark: Mark) -> Path:
        return self.folders.get(mark.file, Path.cwd())

    def _find(self, named: str, kind: str, mark: Mark, keys: KeyPath) -> Path:
        try:
            return find_config(named, kind, self._folder(mark)).resolve()
        except UserError as error:
            raise YamlError(f"{mark}: {dotted(keys)}: {error}") from None


# --- files and presets --------------------------------------------------------------------------------------


def find_config(named: str | os.PathLike[str], kind: str, folder: Path) -> Path:
    """The YAML file that `named` means: a path relative to `folder`, else a preset that comes with the
    package.

    ``demo``, ``run/demo.yaml`` and ``configs/run/demo.yaml`` all name the preset `demo` of the kind ``run``.

    Raises UserError when there is neither.
    """
    path = _absolute(named, folder)
    if path.is_file():
        return path
    wanted = Path(named)
    if not wanted.is_absolute() and ".." not in wanted.parts:
        parts = wanted.parts[1:] if wanted.parts[:1] == ("configs",) else wanted.parts
        parts = (kind, *parts) if len(parts) == 1 else parts
        preset = presets_folder().joinpath(*parts)
        for candidate in (preset, preset.with_name(preset.name + ".yaml")):
            if len(parts) > 1 and candidate.is_file():
                return candidate
    if path.is_dir():
        raise UserError(f"{os.fspath(named)} is a folder; name the YAML file in it")
    raise UserError(
        f"there is no file {shown(path)}; {suggestion(wanted.stem, preset_names(kind), f'presets of {kind}')}"
    )


def presets_folder() -> Path:
    """The folder with model/, data/, cluster/ and run/: in the installed package, or beside it in a
    checkout."""
    installed = Path(str(resources.files("moe_train"))) / "configs"
    return installed if installed.is_dir() else installed.parent.parent / "configs"


def preset_names(kind: str) -> list[str]:
    """Names of the presets of one kind, sorted."""
    return sorted(path.stem for path in presets_folder().joinpath(kind).glob("*.yaml"))


def all_presets() -> Iterator[tuple[str, Path]]:
    """(kind, path) of every preset."""
    for kind in ("model", "data", "cluster", "run"):
        for path in sorted(presets_folder().joinpath(kind).glob("*.yaml")):
            yield kind, path


def _absolute(named: str | os.PathLike[str], folder: Path) -> Path:
    return Path(os.path.normpath(folder / Path(named).expanduser()))


def shown(path: str | os.PathLike[str]) -> str:
    """`path` as errors show it: relative to the working folder where it lies below."""
    try:
        return str(Path(path).resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
