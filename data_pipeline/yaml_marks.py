"""YAML whose every key remembers its file and line, so that an error can say where it is and how to mend it.

The reader follows YAML 1.2's core schema, not PyYAML's 1.1: ``5e-4`` is a number, ``on``, ``yes`` and
``12:30`` are strings, and a number with a leading zero is refused. Duplicate keys, merge keys and recursive
aliases are refused. ``${NAME}`` stands for an environment variable, which must be set.

    document = read_yaml("run.yaml")
    config = validate(RunConfig, document)        # a pydantic model

A mistake is a YamlError such as ``run.yaml:12: optimizer.lrr: unknown key; did you mean 'lr'?``.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from data_pipeline.errors import DataError

KeyPath = tuple[Union[str, int], ...]
ModelT = TypeVar("ModelT", bound=BaseModel)

_INT = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9_]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+(\.[0-9]*)?")
_CONSTANTS = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_CONSTANTS |= {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_CONSTANTS |= {".inf": float("inf"), "-.inf": float("-inf"), ".nan": float("nan")}

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
# In a flow sequence such as [${DATA}/x.bin] braces end a plain scalar, so variables are carried through the
# parser between two private-use characters, and put in after it: their values may then hold any character.
_CARRIED = re.compile("\ue000([A-Za-z_][A-Za-z0-9_]*)\ue001")


class YamlError(DataError):
    """A mistake in a YAML file. The message is one line that starts with ``file:line:``."""


class PlacedError(ValueError):
    """Raised in a pydantic validator to point at a key below: ``PlacedError(("a", 0), "...")``."""

    def __init__(self, path: KeyPath, message: str) -> None:
        super().__init__(message)
        self.path = path


@dataclass(frozen=True)
class Mark:
    """Where a key stands. `line` counts from 1; 0 means that there is no line (a command-line override)."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass
class Document:
    """Plain data and the place of each key: ``marks[("optimizer", "lr")]``; ``()`` is the file."""

    data: Any
    marks: dict[KeyPath, Mark] = field(default_factory=dict)

    def mark(self, path: Iterable[str | int]) -> Mark:
        """The place of `path`, or of its nearest parent that has one."""
        keys = tuple(path)
        while keys and keys not in self.marks:
            keys = keys[:-1]
        return self.marks.get(keys, Mark("<data>", 0))

    def error(self, path: Iterable[str | int], message: str) -> YamlError:
        """An error about `path`, ready to raise: ``file:line: a.b: message``."""
        keys = tuple(path)
        return YamlError(f"{self.mark(keys)}: {dotted(keys)}: {message}" if keys else f"{self.mark(keys)}: {message}")

    def set(self, path: KeyPath, other: Document) -> None:
        """Put `other` with its marks at `path` (parents are made): a section's own file, or an override."""
        if not path:
            self.data, self.marks = other.data, dict(other.marks)
            return
        parent = self.data
        for depth, key in enumerate(path[:-1], start=1):
            if isinstance(parent, dict) and parent.get(key) is None:
                parent[key] = {}
                self.marks.setdefault(path[:depth], other.mark(()))
            parent = _child(parent, key, path, other)
        if isinstance(parent, list):
            _child(parent, path[-1], path, other)
        elif not isinstance(parent, dict):
            above = dotted(path[:-1])
            raise other.error(path, f"{above} is a value, not a section; set {above} itself")
        parent[path[-1]] = other.data
        self.marks = {keys: mark for keys, mark in self.marks.items() if keys[: len(path)] != path}
        self.marks.update({path + keys: mark for keys, mark in other.marks.items()})

    def sub(self, path: KeyPath) -> Document:
        """The part under `path` as a document of its own, with the same places."""
        data = self.data
        for key in path:
            data = data[key]
        marks = {keys[len(path) :]: mark for keys, mark in self.marks.items() if keys[: len(path)] == path}
        marks.setdefault((), self.mark(path))
        return Document(data, marks)


def _child(parent: Any, key: str | int, path: KeyPath, other: Document) -> Any:
    try:
        return parent[key]
    except (KeyError, IndexError, TypeError):
        raise other.error(path, f"there is no {key!r} to set in {type(parent).__name__}; check the path") from None


def dotted(path: Iterable[str | int]) -> str:
    """``("phases", 0, "tokens")`` -> ``phases[0].tokens``."""
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else str(key)
    return text


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The member of `known` that `word` was probably meant to be, or None."""
    names = [str(name) for name in known]
    folded = {name.casefold().replace("-", "_"): name for name in reversed(names)}
    found = difflib.get_close_matches(word.casefold().replace("-", "_"), folded, n=1, cutoff=0.6)
    return folded[found[0]] if found else None


def suggestion(word: str, known: Iterable[str], what: str = "known keys") -> str:
    """``did you mean 'lr'?`` when something is near, else the list of what there is."""
    names = [str(name) for name in known]
    near = nearest(word, names)
    return f"did you mean {near!r}?" if near else f"{what}: {', '.join(names) or 'none'}"


# --- reading


def read_yaml(path: str | os.PathLike[str], env: Mapping[str, str] | None = None) -> Document:
    """The YAML file at `path`. `env` (default: the environment) gives the values of ``${NAME}``.

    Raises YamlError: the file is missing or not UTF-8, its syntax is wrong, a key comes twice, a variable is
    not set.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise YamlError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        raise YamlError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    return parse_yaml(text, str(path), env)


def parse_yaml(text: str, file: str, env: Mapping[str, str] | None = None, *, lines: bool = True) -> Document:
    """The YAML in `text`; errors name it `file`, and with ``lines=False`` (a command-line value) no line."""
    env = os.environ if env is None else env
    builder = _Builder(file, env, lines)
    try:
        node = yaml.compose(_VARIABLE.sub("\ue000\\1\ue001", text), Loader=_SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        place = Mark(file, mark.line + 1 if mark and lines else 0)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be parsed"
        problem = " ".join(_CARRIED.sub(r"${\1}", problem).split())
        raise YamlError(f"{place}: is not valid YAML: {problem}; check indentation, colons and quotes here") from None
    data = None if node is None else builder.build(node, (), ())
    builder.marks.setdefault((), Mark(file, 1 if lines else 0))
    return Document(data, builder.marks)


_SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Builder:
    """Turns composed nodes into plain data, noting where each key is."""

    def __init__(self, file: str, env: Mapping[str, str], lines: bool) -> None:
        self.file, self.env, self.lines = file, env, lines
        self.marks: dict[KeyPath, Mark] = {}

    def build(self, node: yaml.Node, path: KeyPath, above: tuple[yaml.Node, ...]) -> Any:
        self.marks.setdefault(path, self._mark(node))
        if any(node is parent for parent in above):
            raise self._error(node, path, "an alias that holds itself; write the value out")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, above + (node,))
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, path + (i,), above + (node,)) for i, item in enumerate(node.value)]
        return self._scalar(node, path)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath, above: tuple[yaml.Node, ...]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise self._error(key_node, path, "a key must be a plain word")
            key = self._expand(key_node, path)
            if key == "<<" and not key_node.style:
                raise self._error(key_node, path, "merge keys (<<) are not read; write the keys out")
            inner = path + (key,)
            if key in result:
                first = self.marks[inner].line
                raise self._error(key_node, inner, f"the key comes twice (first in line {first}); remove one")
            self.marks[inner] = self._mark(key_node)
            result[key] = self.build(value_node, inner, above)
        return result

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        text = self._expand(node, path)
        if node.tag not in _PLAIN_TAGS:
            raise self._error(node, path, f"the tag {node.tag} is not read; remove it")
        if node.style:  # quoted or a block: text as it stands
            return text
        if text in _CONSTANTS:
            return _CONSTANTS[text]
        if _INT.fullmatch(text):
            return int(text.replace("_", ""))
        if _FLOAT.fullmatch(text):
            return float(text.replace("_", ""))
        if _LEADING_ZERO.fullmatch(text):
            raise self._error(
                node,
                path,
                f"{text} starts with a zero, which YAML readers take differently; drop it or quote it",
            )
        return text

    def _expand(self, node: yaml.ScalarNode, path: KeyPath) -> str:
        def value(match: re.Match[str]) -> str:
            name = match.group(1)
            if name not in self.env:
                message = f"the environment variable {name} is not set; export {name}=... or write the value here"
                raise self._error(node, path, message)
            return self.env[name]

        return _CARRIED.sub(value, node.value)

    def _mark(self, node: yaml.Node) -> Mark:
        return Mark(self.file, node.start_mark.line + 1 if self.lines else 0)

    def _error(self, node: yaml.Node, path: KeyPath, message: str) -> YamlError:
        place = dotted(path)
        return YamlError(f"{self._mark(node)}: {place}: {message}" if place else f"{self._mark(node)}: {message}")


_PLAIN_TAGS = {
    f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "timestamp", "value", "merge")
}


# --- checking against a pydantic model


def validate(model: type[ModelT], document: Document, context: Any = None) -> ModelT:
    """`document` as a `model`; a pydantic ValidationError becomes a YamlError of one line."""
    if not isinstance(document.data, dict):
        kind = "empty" if document.data is None else f"a {type(document.data).__name__}"
        keys = ", ".join(_field_names(model))
        raise document.error((), f"is {kind}, not a mapping of keys; known keys: {keys}")
    try:
        return model.model_validate(document.data, context=context)
    except ValidationError as error:
        raise YamlError(explain(error, model, document)) from None


def explain(error: ValidationError, model: type[BaseModel], document: Document) -> str:
    """One line about the most telling mistake of `error`: ``file:line: key.path: what; how to fix``.

    A misspelt key comes before the missing one that it was meant to be.
    """
    problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    first = problems[0]
    path = _path_in_data(first["loc"], document.data, missing=first["type"] == "missing")
    path += getattr(first.get("ctx", {}).get("error"), "path", ())
    if first["type"] == "union_tag_invalid":  # the key that tells which member of a union it is
        path += (first["ctx"]["discriminator"].strip("'"),)
    line = str(document.error(path, _message(first, path, model)))
    others = len({_path_in_data(p["loc"], document.data, p["type"] == "missing") for p in problems[1:]} - {path})
    return f"{line} (and {others} more)" if others else line


def _message(problem: Mapping[str, Any], path: KeyPath, model: type[BaseModel]) -> str:
    kind, got = problem["type"], problem.get("input")
    if kind == "extra_forbidden":
        return f"unknown key; {suggestion(str(path[-1]), known_keys(model, path[:-1], problem['loc']))}"
    if kind == "missing":
        return "is missing; add it"
    if kind in ("value_error", "assertion_error"):
        return " ".join(str(problem.get("ctx", {}).get("error", problem["msg"])).split())
    if kind in ("bool_type", "bool_parsing"):
        return f"{_short(got)} is not true or false; write true or false"
    text = problem["msg"].removeprefix("Input should be ")
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        text = "a mapping of keys"
    if kind in ("tuple_type", "list_type"):
        text = "a list"
    if kind == "union_tag_invalid":
        got, text, kind = problem["ctx"]["tag"], problem["ctx"]["expected_tags"].replace(", ", " or "), "literal_error"
    if kind == "literal_error":
        near = nearest(got, [str(w).strip("'") for w in re.findall(r"'[^']*'", text)]) if isinstance(got, str) else None
        text += f" (did you mean {near!r}?)" if near else ""
    text = text.replace("a valid integer", "an integer").replace("a valid ", "a ")
    return f"{_short(got)} is not accepted; it should be {text}"


def as_yaml(value: Any) -> str:
    """A value as a message shows it: as one writes it in YAML where Python has another word, text in quotes."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def _short(value: Any) -> str:
    text = as_yaml(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _path_in_data(loc: Iterable[str | int], data: Any, missing: bool) -> KeyPath:
    """pydantic's location without the names of union members and validators, which are no keys."""
    keys, path = list(loc), []
    for position, key in enumerate(keys):
        last = position == len(keys) - 1
        if isinstance(data, dict) and (key in data or (missing and last)):
            path.append(key)
            data = data.get(key)
        elif isinstance(data, list) and isinstance(key, int) and key < len(data):
            path.append(key)
            data = data[key]
    return tuple(path)


def known_keys(model: type[BaseModel], path: Iterable[str | int] = (), loc: Iterable[str | int] = ()) -> list[str]:
    """The keys that may stand under `path` in a document of `model`; empty where any key may. pydantic's `loc`
    tells which members of unions are meant."""
    kinds: list[Any] = [model]
    tags = set(loc)
    for key in path:
        kinds = [inner for kind in kinds for inner in _inside(kind, key)]
        kinds = [kind for kind in kinds if tags & _tags(kind)] or kinds
    names = [name for kind in kinds for name in (_field_names(kind) if _is_model(kind) else [])]
    return list(dict.fromkeys(names))


def _inside(kind: Any, key: str | int) -> list[Any]:
    if _is_model(kind):
        found = [info.annotation for name, info in kind.model_fields.items() if key in (name, info.alias)]
        return [member for annotation in found for member in _members(annotation)]
    arguments = get_args(kind)
    if get_origin(kind) is dict or (isinstance(get_origin(kind), type) and issubclass(get_origin(kind), Mapping)):
        return _members(arguments[1])
    return [member for argument in arguments if argument is not Ellipsis for member in _members(argument)]


def _members(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) is Union or type(annotation).__name__ == "UnionType":
        return [member for argument in get_args(annotation) for member in _members(argument)]
    return [annotation]


def _tags(kind: Any) -> set[str]:
    """The values of a model's keys that can have but one: by them it is told from the others of a union."""
    fields = kind.model_fields.values() if _is_model(kind) else ()
    literals = [get_args(info.annotation) for info in fields if get_origin(info.annotation) is Literal]
    return {values[0] for values in literals if len(values) == 1}


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _field_names(model: type[BaseModel]) -> list[str]:
    return [info.alias or name for name, info in model.model_fields.items()]
