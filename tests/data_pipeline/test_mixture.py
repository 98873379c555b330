"""The mixture file: what it means, and that each mistake is one line with file, line, key and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.errors import DataError
from data_pipeline.mixture import MixtureConfig, expand, load_mixture
from data_pipeline.sources import open_sources
from tests.data_pipeline.corpora import write_corpus

GOOD = """\
sequence_length: 16
seed: 3
sources:
  web:  {paths: [${D}/web*.bin]}
  code: {paths: [code], max_epochs: 4}
phases:
  - {name: one, tokens: 1K, weights: {web: 39.8, code: 19.6}}
  - name: two
    tokens: 500
    weights: {web: 1}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("web_1", "web_0", "web_0.heldout", "code"):
        write_corpus(tmp_path / name, 400)
    return tmp_path


def load(folder: Path, text: str) -> MixtureConfig:
    (folder / "mix.yaml").write_text(text)
    return load_mixture(folder / "mix.yaml", {"D": str(folder)})


def test_a_good_file(folder: Path) -> None:
    mixture = load(folder, GOOD)
    assert mixture.phase_ends == [62, 93] and mixture.num_samples == 93 and mixture.num_tokens == 1500
    assert mixture.shards("web") == [
        str(folder / "web_0"),
        str(folder / "web_1"),
    ]  # sorted, and nothing held out
    assert mixture.shards("code") == [str(folder / "code")]
    assert mixture.phases[0].normalised()["web"] == pytest.approx(39.8 / 59.4)
    assert set(open_sources(mixture)) == {"web", "code"}
    assert MixtureConfig.model_validate(mixture.model_dump()) == mixture


def test_folders_and_files_with_brackets_are_found_as_they_are_written(folder: Path) -> None:
    """A path that is there is no pattern."""
    inner = folder / "run[1]" / "[a-b]"
    inner.mkdir(parents=True)
    for name in ("web_0", "web_1", "code[0]"):
        write_corpus(inner / name, 400)
    write_corpus(folder / "run[1]" / "web_a", 400)
    mixture = load(inner, GOOD.replace("[code]", '["code[[]0].bin", "../web_[ab].bin"]'))
    assert mixture.shards("web") == [f"{inner}/web_0", f"{inner}/web_1"]
    assert mixture.shards("code") == [f"{inner}/code[0]", f"{folder}/run[1]/web_a"]
    code = [str(inner / name) for name in ("code[0]", "code[0].bin", "code[0].idx")]
    assert expand(code) == [[f"{inner}/code[0]"]] * 3
    with pytest.raises(DataError, match="there is no .*/none.bin; check the path"):
        load(inner, GOOD.replace("[code]", "[none]")).shards("code")


def test_the_rest(folder: Path) -> None:
    mixture = load(folder, "total_tokens: 2K\n" + GOOD.replace("tokens: 500", "tokens: rest"))
    assert [phase.tokens for phase in mixture.phases] == [1000, 1000]
    assert MixtureConfig.model_validate(mixture.model_dump()) == mixture


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("seed: 3", "sede: 3", "2: sede: unknown key; did you mean 'seed'?"),
        (
            "max_epochs: 4",
            "max_epoch: 4",
            "5: sources.code.max_epoch: unknown key; did you mean 'max_epochs'?",
        ),
        ("{web: 1}", "{wbe: 1}", "10: phases[1].weights.wbe: unknown source; did you mean 'web'?"),
        ("{web: 1}", "{web: -1}", "10: phases[1].weights.web: -1 is not a weight"),
        ("{web: 1}", "{web: .inf}", "10: phases[1].weights.web: inf is not a weight; give a number"),
        ("max_epochs: 4", "max_epochs: .inf", "5: sources.code.max_epochs: inf is not accepted; it should be a finite"),
        ("max_epochs: 4", "max_epochs: .nan", "5: sources.code.max_epochs: nan is not accepted; it should be a finite"),
        ("{web: 1}", "{web: 0}", "10: phases[1].weights: all weights are 0"),
        ("{web: 1}", "{web: much}", "10: phases[1].weights.web: 'much' is not accepted"),
        ("tokens: 500", "tokens: 1.5Q", "9: phases[1].tokens: '1.5Q' has the unknown unit 'Q'"),
        (
            "tokens: 500",
            "tokens: rest",
            "9: phases[1].tokens: the rest of what is not known; set total_tokens",
        ),
        ("tokens: 500", "tokens: 0", "9: phases[1].tokens: a phase needs tokens"),
        ("name: two", "name: one", "8: phases[1].name: 'one' is the name of an earlier phase"),
        ("${D}", "${NOT_SET}", "4: sources.web.paths[0]: the environment variable NOT_SET is not set"),
        ("sequence_length: 16", "sequence_length: 16.5", "1: sequence_length: 16.5 is not accepted"),
        ("seed: 3", "seed: 3\nseed: 4", "3: seed: the key comes twice"),
        ("code: {paths: [code], ", "code: {", "5: sources.code.paths: is missing; add it"),
        ("code: {paths: [code]", "code: {paths: []", "5: sources.code.paths: [] is not accepted"),
        ("seed: 3", "seed: 3\ntotal_tokens: 2K", "3: total_tokens: is 2000 but the phases add up to 1500"),
        ("  code:", "  'a b': {paths: [x]}\n  code:", "5: sources.a b: is not a name"),
    ],
)
def test_mistakes_in_the_file(folder: Path, old: str, new: str, expected: str) -> None:
    assert old in GOOD
    with pytest.raises(DataError) as info:
        load(folder, GOOD.replace(old, new))
    message = str(info.value)
    assert message.startswith(f"{folder}/mix.yaml:{expected}") and "\n" not in message and info.value.exit_code == 2


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("[code]", "[cod]", "source 'code': there is no "),
        ("web*.bin", "wub*.bin", "source 'web': no .bin file matches "),
        ("[code]", "[web_0.heldout.bin]", "is held-out text"),
        ("[code]", "[web_0, web_0.bin]", "comes twice"),
        ("sequence_length: 16", "sequence_length: 400", "source 'code': holds 400 tokens, too few"),
    ],
)
def test_mistakes_in_the_data(folder: Path, old: str, new: str, part: str) -> None:
    with pytest.raises(DataError) as info:
        open_sources(load(folder, GOOD.replace(old, new)))
    assert part in str(info.value) and "\n" not in str(info.value) and info.value.exit_code == 2


def test_expand(folder: Path) -> None:
    assert expand([str(folder / "*.bin")]) == [[str(folder / name) for name in ("code", "web_0", "web_1")]]
    assert expand([str(folder / "nothing"), str(folder / "nothing*")]) == [[], []]


def test_ids_outside_the_vocabulary_are_found_when_a_window_is_read(folder: Path) -> None:
    sources = open_sources(load(folder, GOOD), vocab_size=300)
    with pytest.raises(
        DataError,
        match=r"source 'code': .*code.bin, document \d+, holds token id \d+ but the vocabulary has 300",
    ):
        for window in range(sources["code"].num_windows):
            sources["code"].window(0, window)


def test_500_sources_load_quickly_enough_to_be_used(folder: Path) -> None:
    sources = "".join(f"  s{i}: {{paths: [code]}}\n" for i in range(500))
    weights = ", ".join(f"s{i}: {i + 1}" for i in range(500))
    phases = f"- {{name: a, tokens: 1M, weights: {{{weights}}}}}\n"
    text = f"sequence_length: 16\nseed: 1\nsources:\n{sources}phases:\n{phases}"
    assert len(load(folder, text).sources) == 500
