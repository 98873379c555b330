"""Filters on the fields of documents: ``lang=en``, ``meta.score>=0.5``, ``source!=spam``."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from data_pipeline.errors import DataError

_FILTER = re.compile(r"\s*([^\s=!<>]+)\s*(!=|<=|>=|=|<|>)\s*(.*?)\s*")
_OPERATORS = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


class Filter(NamedTuple):
    """One condition. A document that lacks the field, or has another kind of value there, does not meet it."""

    field: str
    symbol: str
    value: Any

    def accepts(self, record: Mapping[str, Any]) -> bool:
        """Whether `record` meets the condition; ``a.b`` is looked for as a field, then as b of a."""
        found = lookup(record, self.field)
        if isinstance(found, bytes):
            found = found.decode("utf-8", "replace")
        numbers = isinstance(found, (int, float)) and isinstance(self.value, (int, float))
        if type(found) is not type(self.value) and (not numbers or bool in map(type, (found, self.value))):
            return False
        return bool(_OPERATORS[self.symbol](found, self.value))


def lookup(record: Mapping[str, Any], field: str) -> Any:
    """The value of `field`, or None; a dotted field is looked for whole first, then level by level."""
    if field in record:
        return record[field]
    first, dot, rest = field.partition(".")
    inner = record.get(first) if dot else None
    return lookup(inner, rest) if isinstance(inner, Mapping) else None


def parse_filters(texts: Iterable[str]) -> list[Filter]:
    """Filters as typed. A value is a number, true or false where it reads as one, else text; quotes keep text.

    Raises DataError for what is no filter.
    """
    return [_parse(text) for text in texts]


def _parse(text: str) -> Filter:
    match = _FILTER.fullmatch(text)
    if match is None or not match[3]:
        raise DataError(f"filter {text!r} is not one; write FIELD=VALUE, or with !=, <, <=, > or >=")
    field, symbol, value = match.groups()
    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = value
    if not isinstance(parsed, (str, int, float)):
        raise DataError(f"filter {text!r}: compare with a number, true, false or text")
    if isinstance(parsed, bool) and symbol not in ("=", "!="):
        raise DataError(f"filter {text!r}: true and false have no order; use = or !=")
    return Filter(field, symbol, parsed)
