"""YAML with marks: what is read, what is refused, and that every complaint names its line."""

from __future__ import annotations

from typing import Literal, Optional

import pytest
from pydantic import BaseModel, ConfigDict

from data_pipeline.yaml_marks import Document, Mark, YamlError, parse_yaml, read_yaml, validate


class Inner(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    lr: float
    name: Literal["adam", "sgd"] = "adam"
    on: bool = False


class Outer(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    inner: Inner
    many: list[Inner] = []
    by_name: dict[str, Optional[Inner]] = {}


def complaint(text: str) -> str:
    with pytest.raises(YamlError) as info:
        validate(Outer, parse_yaml(text, "f.yaml", {}))
    assert "\n" not in str(info.value)
    return str(info.value)


def test_numbers_and_words_follow_yaml_1_2() -> None:
    text = "a: 5e-4\nb: on\nc: 12:30\nd: 1_000\ne: null\nf: true\ng: '5'\nh: -.5\ni: 1.0e+3\nj: 2001-01-01\nk:\n"
    data = parse_yaml(text, "f", {}).data
    assert data == dict(
        a=5e-4, b="on", c="12:30", d=1000, e=None, f=True, g="5", h=-0.5, i=1000.0, j="2001-01-01", k=None
    )
    assert type(data["d"]) is int and type(data["a"]) is float


def test_marks_name_lines() -> None:
    document = parse_yaml("a:\n  b: 1\n  c: [1,\n    2]\n", "f.yaml", {})
    assert document.marks[("a", "b")] == Mark("f.yaml", 2)
    assert document.marks[("a", "c", 1)] == Mark("f.yaml", 4)
    assert document.mark(("a", "zzz", "y")) == Mark("f.yaml", 1)


def test_variables_even_in_flow_sequences_and_with_odd_characters() -> None:
    document = parse_yaml("p: [${D}/x/*.bin, y]  # ${NOT_SET}\nn: ${N}\n", "f", {"D": "/a: b, #c", "N": "12"})
    assert document.data == {"p": ["/a: b, #c/x/*.bin", "y"], "n": 12}


@pytest.mark.parametrize(
    ("text", "start", "part"),
    [
        ("x:\n  y: ${NOPE}\n", "f.yaml:2: x.y: ", "NOPE is not set"),
        ("a: 1\na: 2\n", "f.yaml:2: a: ", "twice"),
        ("a: 010\n", "f.yaml:1: a: ", "zero"),
        ("a: &x [*x]\n", "f.yaml:1: a[0]: ", "alias"),
        ("<<: {a: 1}\n", "f.yaml:1: ", "merge"),
        ("a: [1\nb: 2\n", "f.yaml:2: ", "not valid YAML"),
        ("a: !!python/none x\n", "f.yaml:1: a: ", "tag"),
    ],
)
def test_refused_yaml(text: str, start: str, part: str) -> None:
    with pytest.raises(YamlError) as info:
        parse_yaml(text, "f.yaml", {})
    assert str(info.value).startswith(start) and part in str(info.value) and info.value.exit_code == 2


def test_missing_file() -> None:
    with pytest.raises(YamlError, match="cannot be read"):
        read_yaml("/no/such/file.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("inner:\n  lrr: 1\n", "f.yaml:2: inner.lrr: unknown key; did you mean 'lr'? (and 1 more)"),
        ("inner: {}\n", "f.yaml:1: inner.lr: is missing; add it"),
        ("inner:\n  lr: fast\n", "f.yaml:2: inner.lr: 'fast' is not accepted; it should be a number"),
        (
            "inner:\n  lr: 1\n  on: yes\n",
            "f.yaml:3: inner.on: 'yes' is not true or false; write true or false",
        ),
        (
            "inner: {lr: 1}\nmany:\n- {lr: 2, nam: x}\n",
            "f.yaml:3: many[0].nam: unknown key; did you mean 'name'?",
        ),
        (
            "inner: {lr: 1}\nby_name:\n  z: {lr: 1,\n lrr: 2}\n",
            "f.yaml:4: by_name.z.lrr: unknown key; did you mean 'lr'?",
        ),
        ("inner: 3\n", "f.yaml:1: inner: 3 is not accepted; it should be a mapping of keys"),
        ("inner: {lr: 1}\nmany: 3\n", "f.yaml:2: many: 3 is not accepted; it should be a list"),
        ("- 1\n", "f.yaml:1: is a list, not a mapping of keys; known keys: inner, many, by_name"),
        ("", "f.yaml:1: is empty, not a mapping of keys; known keys: inner, many, by_name"),
    ],
)
def test_validation_errors_are_one_line(text: str, expected: str) -> None:
    assert complaint(text) == expected


def test_literal_suggests() -> None:
    assert "did you mean 'adam'?" in complaint("inner: {lr: 1, name: adan}\n")


def test_set_grafts_sections_and_overrides() -> None:
    document = parse_yaml("inner: other.yaml\nmany: [{lr: 1}]\n", "f.yaml", {})
    document.set(("inner",), parse_yaml("lr: 2\nname: sdg\n", "other.yaml", {}))
    with pytest.raises(YamlError, match=r"^other.yaml:2: inner.name: 'sdg' is not accepted.*did you mean 'sgd'"):
        validate(Outer, document)
    document.set(("inner", "name"), parse_yaml("sgd", "inner.name=sgd", {}, lines=False))
    document.set(("many", 0, "lr"), parse_yaml("1e-4", "x", {}, lines=False))
    document.set(("by_name", "z", "lr"), Document(3))
    config = validate(Outer, document)
    assert config.inner.name == "sgd" and config.many[0].lr == 1e-4 and config.by_name["z"].lr == 3
    document.set(("many", 0, "l"), parse_yaml("1", "many.0.l=1", {}, lines=False))
    with pytest.raises(YamlError, match=r"^many.0.l=1: many\[0\].l: unknown key"):
        validate(Outer, document)
    with pytest.raises(YamlError, match="no 7"):
        document.set(("many", 7, "lr"), Document(3))
    assert document.sub(("inner",)).mark(("lr",)) == Mark("other.yaml", 1)
