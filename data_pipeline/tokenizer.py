"""Tokenizers: train a sentencepiece model, load a sentencepiece ``.model`` or a Hugging Face
``tokenizer.json``.

sentencepiece and tokenizers are imported when they are needed, not with this module.
"""

from __future__ import annotations

import io
import os
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import xxhash

from data_pipeline.errors import DataError, MissingDataError
from data_pipeline.target import check_target

UNK_ID, BOS_ID, EOS_ID = 0, 1, 2

PIECE_CHARACTERS = 4096
"""The longest piece of text that a tokenizer is trained on."""


class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer."""

    vocab_size: int
    eos_id: int

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; nothing is added at either end."""

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text, which is faster together."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`."""

    def fingerprint(self) -> str:
        """xxh3-128 of the tokenizer's file."""


def file_fingerprint(path: str | os.PathLike[str]) -> str:
    """xxh3-128 of a file, in hexadecimal. Raises MissingDataError when it cannot be read."""
    digest = xxhash.xxh3_128()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise MissingDataError(f"tokenizer {path}: cannot be read ({error.strerror}); check the path") from None
    return digest.hexdigest()


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer in the file `path`: sentencepiece (``.model``) or Hugging Face (``.json``)."""
    if not Path(path).is_file():
        raise DataError(
            f"tokenizer {path}: there is no such file; check the path, or train one with `moe-train tokenizer train`"
        )
    return HuggingFaceTokenizer(path) if str(path).endswith(".json") else SentencePieceTokenizer(path)


class SentencePieceTokenizer:
    """A sentencepiece model."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        import sentencepiece

        self.path = str(path)
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.Load(self.path)
        except (RuntimeError, OSError):
            raise DataError(
                f"tokenizer {path}: is not a sentencepiece model; give a .model or a tokenizer.json"
            ) from None
        self.vocab_size = self._model.vocab_size()
        self.eos_id = self._model.eos_id()
        if self.eos_id < 0:
            raise DataError(f"tokenizer {path}: has no end-of-document token (</s>); train one that has")

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        return self._model.encode(texts, num_threads=1)

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode([int(i) for i in ids])

    def fingerprint(self) -> str:
        return file_fingerprint(self.path)


class HuggingFaceTokenizer:
    """A ``tokenizer.json``. A document ends with the first of the usual end tokens that it has, special ones first:
    others are words, as HTML's ``</s>`` is where ``<eos>`` ends documents."""

    END_TOKENS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "[SEP]")

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            import tokenizers
        except ImportError:
            raise DataError(f"tokenizer {path}: needs the package tokenizers; pip install tokenizers") from None
        self.path = str(path)
        try:
            self._model = tokenizers.Tokenizer.from_file(self.path)
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"tokenizer {path}: is not a tokenizer.json ({str(error).splitlines()[0]})") from None
        # Such files are made for models that read one text at a time; a corpus keeps every document whole.
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True  # "</s>" within a text is text, not the end of a document
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
        special = {token.content for token in self._model.get_added_tokens_decoder().values() if token.special}
        known = [token for token in self.END_TOKENS if self._model.token_to_id(token) is not None]
        if not known:
            raise DataError(f"tokenizer {path}: has none of the end tokens {', '.join(self.END_TOKENS)}; add one")
        self.eos_id = self._model.token_to_id(min(known, key=lambda token: token not in special))

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._model.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode([int(i) for i in ids], skip_special_tokens=True)

    def fingerprint(self) -> str:
        return file_fingerprint(self.path)


def train_tokenizer(
    inputs: Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    vocab_size: int,
    *,
    text_key: str = "text",
    sample_bytes: int = 100_000_000,
    character_coverage: float = 0.9995,
) -> Tokenizer:
    """Train a sentencepiece BPE model on raw text and write it to `out` (``.model`` is added when missing).

    It keeps text as it is (no normalisation, every space kept, digits apart, unknown characters as bytes),
    has unk, bos and eos at 0, 1 and 2, and is the same for the same inputs: one thread, and the lines to learn
    from (about `sample_bytes` in all, each in pieces of at most `PIECE_CHARACTERS`) drawn with a fixed seed.

    Args:
        inputs: files, folders or patterns, as `prepare` takes them.
        vocab_size: the number of ids, the 256 bytes and 3 special ones included.

    Raises DataError: `out` is there already or cannot be written; no text, or too little of it for `vocab_size`.
    """
    import sentencepiece

    target = check_target(out if str(out).endswith(".model") else f"{out}.model", "--out")
    if target.exists():
        raise DataError(f"{target} is there already, and corpora may need it; choose another --out, or remove it")
    if vocab_size < 300:
        raise DataError(
            f"vocab_size {vocab_size} is too small; 256 bytes, 3 special ids and some characters need at least 300"
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_pieces(inputs, text_key, sample_bytes),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=-1,
            max_sentence_length=4 * PIECE_CHARACTERS,  # in bytes; what is longer is passed over
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        limit = reason.partition("<= ")[2].split(".")[0]
        if limit.isdigit():
            raise DataError(
                f"vocab_size {vocab_size} is too large for this text; at most {limit}, or give more text"
            ) from None
        if "Vocabulary size is smaller" in reason or "too small" in reason:
            raise DataError(f"vocab_size {vocab_size} is too small for the characters of this text; raise it") from None
        raise DataError(f"sentencepiece could not train on this text ({reason}); check the inputs") from None
    partial = target.with_name(target.name + ".partial")
    partial.write_bytes(model.getvalue())
    os.replace(partial, target)
    return load_tokenizer(target)


def _pieces(inputs: Iterable[str | os.PathLike[str]], text_key: str, sample_bytes: int) -> Iterator[str]:
    from data_pipeline.documents import find_inputs, read_documents, unpacked_bytes

    files = find_inputs(inputs)
    share = sample_bytes / max(1, unpacked_bytes(files))
    draw, some = random.Random(0), False
    for document in read_documents(files, text_key):
        if document.text is None:
            continue
        for line in document.text.splitlines():
            for start in range(0, len(line), PIECE_CHARACTERS):
                piece = line[start : start + PIECE_CHARACTERS]
                # pieces, not documents: one file of text may be all there is
                if piece.strip() and draw.random() < share:
                    some = True
                    yield piece
    if not some:
        raise DataError("the inputs hold no text to train a tokenizer on; check the paths and the text field")
