"""What tokenizers do with texts that are long, large, or look like their special tokens."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from data_pipeline.indexed import IndexedReader
from data_pipeline.prepare import prepare
from data_pipeline.tokenizer import _pieces, load_tokenizer, train_tokenizer
from tests.data_pipeline.corpora import text


@pytest.fixture
def tokenizer_json(tmp_path: Path) -> Path:
    """A byte-level BPE that cuts texts to 16 tokens and fills others up to as many, as its file says."""
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["</s>", "<pad>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([text(seed) for seed in range(20)], trainer)
    model.enable_truncation(16)
    model.enable_padding(pad_id=1, pad_token="<pad>", length=16)
    path = tmp_path / "tokenizer.json"
    model.save(str(path))
    return path


def test_a_tokenizer_json_neither_cuts_nor_fills(tokenizer_json: Path, tmp_path: Path) -> None:
    texts = ["a", text(1) * 5, "some more"]
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps({"text": sample}) + "\n" for sample in texts))
    prepare([tmp_path / "raw.jsonl"], tmp_path / "out", tokenizer_json)
    tokenizer, reader = load_tokenizer(tokenizer_json), IndexedReader(tmp_path / "out")
    documents = [reader.document(number).tolist() for number in range(3)]
    assert [tokenizer.decode(document[:-1]) for document in documents] == texts
    assert documents == [[*tokenizer.encode(sample), tokenizer.eos_id] for sample in texts]
    assert not any({0, 1} & set(document[:-1]) for document in documents)


def test_special_tokens_within_a_text_are_text(tokenizer_json: Path, tmp_path: Path) -> None:
    (tmp_path / "raw.txt").write_text("".join(text(seed) for seed in range(20)) + "</s>")
    for tokenizer in (load_tokenizer(tokenizer_json), train_tokenizer([tmp_path / "raw.txt"], tmp_path / "t", 300)):
        sample = "one</s>two<pad>"
        for ids in (tokenizer.encode(sample), *tokenizer.encode_many([sample])):
            assert tokenizer.eos_id not in ids and tokenizer.decode(ids) == sample


def test_a_word_that_looks_like_an_end_token_ends_no_document(tokenizer_json: Path) -> None:
    """Gemma's own has HTML's ``</s>``, which is no special token, beside its ``<eos>``."""
    data = json.loads(tokenizer_json.read_text())
    html = next(token for token in data["added_tokens"] if token["content"] == "</s>")
    html["special"] = False
    data["added_tokens"].append(html | {"id": 300, "content": "<eos>", "special": True})
    tokenizer_json.write_text(json.dumps(data))
    tokenizer = load_tokenizer(tokenizer_json)
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (300, 301)
    ids = tokenizer.encode("<s>old</s> and <eos>")
    assert html["id"] in ids and tokenizer.eos_id not in ids


def test_one_large_document_is_sampled_too(tmp_path: Path) -> None:
    line = text(0) + "\n"
    for name, document in (("lines", line * 500), ("one line", line.replace("\n", " ") * 500)):
        path = tmp_path / f"{name}.txt"
        for salt in range(8):  # whatever the text
            path.write_text(document + str(salt))
            out = tmp_path / f"{name}{salt}"
            tokenizer = train_tokenizer([path], out, 300, sample_bytes=len(document) // 8)
            assert tokenizer.vocab_size == 300


@pytest.mark.parametrize("packed", [False, True])
def test_no_more_is_learned_from_because_it_is_packed(tmp_path: Path, packed: bool) -> None:
    data = "".join(json.dumps({"text": text(seed)}) + "\n" for seed in range(400)).encode()
    path = tmp_path / ("raw.jsonl.gz" if packed else "raw.jsonl")
    path.write_bytes(gzip.compress(data) if packed else data)
    sample = sum(map(len, _pieces([path], "text", len(data) // 10)))
    assert len(data) / 20 < sample < len(data) / 5


def test_a_long_line_of_wide_characters_is_learned_from(tmp_path: Path) -> None:
    wide = "".join(chr(0x4E00 + (number * number) % 499) for number in range(7000))
    (tmp_path / "wide.jsonl").write_text(json.dumps({"text": wide + "𠀀" * 5000 + "end"}) + "\n")
    tokenizer = train_tokenizer([tmp_path / "wide.jsonl"], tmp_path / "wide", 700, character_coverage=1.0)
    assert max(map(len, ([*tokenizer.encode(wide[at])] for at in range(200)))) <= 2  # no character falls to its bytes
    assert len(tokenizer.encode("𠀀" * 8)) < 10
