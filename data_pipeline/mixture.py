"""The mixture file: which sources there are, and in which phases they are fed with which weights.

    sequence_length: 4096
    seed: 1234
    tokenizer: ${DATA}/tokenizer.model
    sources:
      web:  {paths: [${DATA}/web/*.bin]}
      code: {paths: [${DATA}/code/*.bin], max_epochs: 4}
    phases:
      - {name: stable, tokens: 1T,   weights: {web: 70, code: 30}}
      - {name: decay,  tokens: 250B, weights: {web: 40, code: 60}}

Weights are relative, and taken as written (39.8 is 199/5). One phase may ask for ``tokens: rest`` when
`total_tokens` is given. Paths are relative to the mixture file; a path is a ``.bin`` file, its prefix, or a
pattern, of this machine or of an object store (``s3://bucket/web/*.bin``). ``*.heldout.bin`` is never training data.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from data_pipeline.errors import DataError, MissingDataError
from data_pipeline.indexed import prefix_of
from data_pipeline.storage import absolute, find, is_pattern
from data_pipeline.units import parse_count
from data_pipeline.yaml_marks import Document, PlacedError, read_yaml, suggestion, validate

HELDOUT = ".heldout"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


def _count(value: Any) -> Any:
    return value if value is None else parse_count(value)


def _count_or_rest(value: Any) -> Any:
    return value if value == "rest" else parse_count(value)


Count = Annotated[int, BeforeValidator(_count), Field(gt=0)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class SourceConfig(_Part):
    """One corpus: its shards in order, and how often it may be read at most."""

    paths: list[str] = Field(min_length=1)
    max_epochs: Optional[float] = Field(default=None, gt=0, allow_inf_nan=False)


class PhaseConfig(_Part):
    """A stretch of the run with constant weights. `tokens` is an int once the mixture is loaded."""

    name: str
    tokens: Annotated[Union[int, Literal["rest"]], BeforeValidator(_count_or_rest)]
    weights: dict[str, Union[int, float]] = Field(min_length=1)

    @field_validator("tokens")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if value == 0:
            raise ValueError("a phase needs tokens; give a count such as 500M, or remove the phase")
        return value

    @field_validator("weights")
    @classmethod
    def _usable(cls, weights: dict[str, int | float]) -> dict[str, int | float]:
        for name, weight in weights.items():
            if not math.isfinite(weight) or weight < 0:
                raise PlacedError((name,), f"{weight} is not a weight; give a number of 0 or more")
        if not any(weights.values()):
            raise ValueError("all weights are 0; give at least one source a positive weight")
        return weights

    def normalised(self) -> dict[str, float]:
        """The weights as shares of 1, for printing (the arithmetic of samples uses exact integers)."""
        total = math.fsum(self.weights.values())
        return {name: weight / total for name, weight in self.weights.items()}


class MixtureConfig(_Part):
    """The whole mixture. From `load_mixture` its paths are absolute; a ``rest`` is a number."""

    sequence_length: int = Field(gt=0, le=2**24)
    seed: int = Field(ge=0, lt=2**63)
    tokenizer: Optional[str] = None
    total_tokens: Optional[Count] = None
    sources: dict[str, SourceConfig] = Field(min_length=1)
    phases: list[PhaseConfig] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, data: Any, info: ValidationInfo) -> Any:
        base = (info.context or {}).get("base")
        if base is None or not isinstance(data, dict):
            return data
        data = dict(data)
        if isinstance(data.get("tokenizer"), str):
            data["tokenizer"] = absolute(data["tokenizer"], base)
        if isinstance(data.get("sources"), dict):
            data["sources"] = {name: _resolved_source(source, base) for name, source in data["sources"].items()}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> MixtureConfig:
        for path, message in self._problems():
            raise PlacedError(path, message)
        resolved = self._with_rest()
        return self if resolved is None else resolved

    def _problems(self) -> Iterator[tuple[tuple[str | int, ...], str]]:
        for name in self.sources:
            if not _NAME.fullmatch(name):
                yield ("sources", name), "is not a name; use letters, digits, '.', '_', '+' and '-'"
        seen: set[str] = set()
        for number, phase in enumerate(self.phases):
            if phase.name in seen:
                yield (
                    ("phases", number, "name"),
                    f"{phase.name!r} is the name of an earlier phase; give it another",
                )
            seen.add(phase.name)
            for name in phase.weights:
                if name not in self.sources:
                    hint = suggestion(name, self.sources, "known sources")
                    yield ("phases", number, "weights", name), f"unknown source; {hint}"
        rest = [number for number, phase in enumerate(self.phases) if phase.tokens == "rest"]
        if len(rest) > 1:
            yield ("phases", rest[1], "tokens"), "only one phase can take the rest; give this one a count"
        fixed = sum(phase.tokens for phase in self.phases if phase.tokens != "rest")
        if rest and self.total_tokens is None:
            yield (
                ("phases", rest[0], "tokens"),
                "the rest of what is not known; set total_tokens at the top of the file",
            )
        if self.total_tokens is not None:
            if rest and fixed >= self.total_tokens:
                yield (
                    ("phases", rest[0], "tokens"),
                    f"the other phases take {fixed} of total_tokens {self.total_tokens}: no rest "
                    "is left; raise total_tokens",
                )
            if not rest and fixed != self.total_tokens:
                yield (
                    ("total_tokens",),
                    f"is {self.total_tokens} but the phases add up to {fixed}; correct one, or let a phase take 'rest'",
                )

    def _with_rest(self) -> MixtureConfig | None:
        rest = [number for number, phase in enumerate(self.phases) if phase.tokens == "rest"]
        if not rest:
            return None
        tokens = self.total_tokens - sum(phase.tokens for phase in self.phases if phase.tokens != "rest")
        phases = list(self.phases)
        phases[rest[0]] = phases[rest[0]].model_copy(update={"tokens": tokens})
        object.__setattr__(self, "phases", phases)  # the model is frozen for its users, not yet for its own validator
        return self

    @property
    def phase_ends(self) -> list[int]:
        """The sample at which each phase ends: floor(cumulative tokens / sequence_length)."""
        ends, tokens = [], 0
        for phase in self.phases:
            tokens += int(phase.tokens)
            ends.append(tokens // self.sequence_length)
        return ends

    @property
    def num_samples(self) -> int:
        return self.phase_ends[-1]

    @property
    def num_tokens(self) -> int:
        """The budget as asked for; the run feeds num_samples * sequence_length of it."""
        return sum(int(phase.tokens) for phase in self.phases)

    def shards(self, name: str) -> list[str]:
        """The prefixes of a source's shards, in order. Raises DataError when a path leads to nothing."""
        prefixes: list[str] = []
        paths = self.sources[name].paths
        for path, found in zip(paths, expand(paths), strict=True):
            if not found:
                raise MissingDataError(f"source {name!r}: {_nothing_at(path)}")
            prefixes += found
        doubles = (
            {prefix for prefix in prefixes if prefixes.count(prefix) > 1}
            if len(set(prefixes)) < len(prefixes)
            else None
        )
        if doubles:
            raise DataError(
                f"source {name!r}: {min(doubles)} comes twice; weights, not repeated paths, say how much is read"
            )
        return prefixes

    def tokenizer_fingerprint(self) -> str | None:
        """xxh3-128 of the tokenizer's file; None when the mixture names none."""
        if self.tokenizer is None:
            return None
        from data_pipeline.tokenizer import file_fingerprint

        return file_fingerprint(self.tokenizer)


def expand(paths: Sequence[str]) -> list[list[str]]:
    """The shards that each of `paths` (.bin, prefix or pattern) stands for, sorted; held-out ones never match."""
    names = [prefix_of(path) + ".bin" for path in paths]
    files = [path if is_pattern(name) else name for path, name in zip(paths, names, strict=True)]
    shards = [[prefix_of(file) for file in found if file.endswith(".bin")] for found in find(files)]
    return [[prefix for prefix in found if not prefix.endswith(HELDOUT)] for found in shards]


def _nothing_at(path: str) -> str:
    if prefix_of(path).endswith(HELDOUT):
        return f"{path} is held-out text, which is never trained on; name the training file"
    if is_pattern(path):
        return f"no .bin file matches {path}; check the pattern, or make the files with `moe-train prepare`"
    return f"there is no {prefix_of(path)}.bin; check the path, or make it with `moe-train prepare`"


def load_mixture(path: str | os.PathLike[str], env: Mapping[str, str] | None = None) -> MixtureConfig:
    """The mixture of the YAML file `path`, with absolute paths.

    A mistake is one YamlError ``file:line: key: what; how to fix``. The shards themselves are looked for when
    they are opened.
    """
    return check_mixture(read_yaml(path, env), Path(path).parent)


def check_mixture(document: Document, base: str | os.PathLike[str] = ".") -> MixtureConfig:
    """A mixture that was read already (a section of a run file); paths are relative to `base`."""
    return validate(MixtureConfig, document, context={"base": str(base)})


def _resolved_source(source: Any, base: str) -> Any:
    if not isinstance(source, dict) or not isinstance(source.get("paths"), list):
        return source
    return source | {"paths": [absolute(path, base) if isinstance(path, str) else path for path in source["paths"]]}
