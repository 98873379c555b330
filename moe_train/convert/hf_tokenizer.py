"""A checkpoint's tokenizer in the form that transformers' AutoTokenizer loads.

A sentencepiece model becomes a ``tokenizer.json`` that gives the same ids, but for rare sequences of characters
where it normalises texts (transformers' own conversion takes every model for BPE, and drops the space that
sentencepiece puts before a text that begins with one). A model of whole words is copied, and left to transformers.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from moe_train.convert.hf_files import write_json

NAMES = ("tokenizer.model", "tokenizer.json")
"""What a tokenizer's file is called, here and there; the first that is there counts."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
"""Kinds of pieces in a sentencepiece model."""

UNIGRAM, BPE, CHAR = 1, 2, 4
"""Kinds of sentencepiece models."""


def find_tokenizer(folder: Path) -> Path | None:
    """The tokenizer's file in ``folder``."""
    return next((folder / name for name in NAMES if (folder / name).is_file()), None)


def export_tokenizer(path: Path | None, out: Path, max_length: int) -> tuple[dict[str, int | None] | None, str | None]:
    """Write the tokenizer at ``path`` into the Hugging Face folder ``out``.

    Returns the ids bos_token_id, eos_token_id and pad_token_id (None without a tokenizer), and a remark for the
    user, if there is one.
    """
    if path is None:
        return None, "the checkpoint has no tokenizer: none was written"
    config: dict[str, Any] = {"clean_up_tokenization_spaces": False, "model_max_length": max_length}
    remark = None
    if path.suffix == ".json":
        shutil.copyfile(path, out / "tokenizer.json")
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        ids, tokens = _special_tokens_of_json(path)
    else:
        shutil.copyfile(path, out / "tokenizer.model")
        model = _SentencePiece(path)
        ids, tokens = model.special_tokens()
        if model.is_known:
            (out / "tokenizer.json").write_text(model.as_tokenizer_json(), encoding="utf-8")
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
            if model.model.normalizer_spec.precompiled_charsmap:
                remark = "the tokenizer normalises texts: in transformers rare characters may get other ids"
        else:
            config |= {
                "tokenizer_class": "LlamaTokenizer",
                "legacy": True,
                "add_bos_token": False,
                "add_eos_token": False,
            }
            remark = "transformers has no tokenizer of this kind: what it makes of tokenizer.model gives other ids"
    write_json(out / "tokenizer_config.json", config | tokens)
    write_json(out / "special_tokens_map.json", tokens)
    return ids, remark


def _special_tokens_of_json(path: Path) -> tuple[dict[str, int | None], dict[str, str]]:
    from data_pipeline.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(path)
    tokens = json.loads(path.read_text(encoding="utf-8")).get("added_tokens", [])
    added = {token["id"]: token["content"] for token in tokens}
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_id, "pad_token_id": None}
    return ids, {"eos_token": added[tokenizer.eos_id]} if tokenizer.eos_id in added else {}


class _SentencePiece:
    """A sentencepiece model, read as the protobuf message that it is."""

    def __init__(self, path: Path):
        from sentencepiece import sentencepiece_model_pb2

        self.model = sentencepiece_model_pb2.ModelProto()
        self.model.ParseFromString(path.read_bytes())

    @property
    def is_known(self) -> bool:
        """Whether ``tokenizers`` has what computes it."""
        trainer = self.model.trainer_spec
        return (
            trainer.model_type in (UNIGRAM, BPE, CHAR)
            and self.model.normalizer_spec.escape_whitespaces
            and not trainer.treat_whitespace_as_suffix
        )

    def special_tokens(self) -> tuple[dict[str, int | None], dict[str, str]]:
        """(bos_token_id and so on, bos_token and so on) of those that the model has."""
        spec = self.model.trainer_spec
        ids: dict[str, int | None] = {}
        tokens: dict[str, str] = {}
        for key, number, piece in (
            ("bos", spec.bos_id, spec.bos_piece),
            ("eos", spec.eos_id, spec.eos_piece),
            ("unk", spec.unk_id, spec.unk_piece),
            ("pad", spec.pad_id, spec.pad_piece),
        ):
            if key != "unk":
                ids[f"{key}_token_id"] = number if number >= 0 else None
            if number >= 0:
                tokens[f"{key}_token"] = piece
        return ids, tokens

    def as_tokenizer_json(self) -> str:
        """The same tokenizer as a ``tokenizer.json``."""
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

        pieces = self.model.pieces
        spec, normalizer = self.model.trainer_spec, self.model.normalizer_spec
        user_defined = sorted((piece.piece for piece in pieces if piece.type == USER_DEFINED), key=len, reverse=True)
        if spec.model_type == UNIGRAM:
            scores = [(piece.piece, piece.score) for piece in pieces]
            tokenizer = Tokenizer(models.Unigram(scores, spec.unk_id, spec.byte_fallback))
        else:
            vocabulary = {piece.piece: number for number, piece in enumerate(pieces)}
            tokenizer = Tokenizer(
                models.BPE(
                    vocab=vocabulary,
                    merges=self._merges(vocabulary),
                    unk_token=pieces[spec.unk_id].piece,
                    fuse_unk=True,
                    byte_fallback=spec.byte_fallback,
                    ignore_merges=bool(user_defined),  # which none makes
                )
            )
        steps = [normalizers.Precompiled(normalizer.precompiled_charsmap)] if normalizer.precompiled_charsmap else []
        if normalizer.remove_extra_whitespaces:
            steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" +"), " ")]
        steps += [normalizers.Prepend("▁")] if normalizer.add_dummy_prefix else []
        tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
        if user_defined:  # found before anything else, the longest first
            symbols = Regex("|".join(re.escape(symbol) for symbol in user_defined))
            tokenizer.pre_tokenizer = pre_tokenizers.Split(symbols, "isolated")
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence(
            [*steps, decoders.Strip(" ", 1, 0)] if normalizer.add_dummy_prefix else steps
        )
        special = [piece.piece for piece in pieces if piece.type in (UNKNOWN, CONTROL)]
        tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
        return tokenizer.to_str()

    def _merges(self, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
        """Pairs in the order in which BPE applies them: the best score of the whole first."""
        merges = []
        for piece in self.model.pieces:
            if piece.type != NORMAL:
                continue
            splits = ((piece.piece[:at], piece.piece[at:]) for at in range(1, len(piece.piece)))
            found = [pair for pair in splits if pair[0] in vocabulary and pair[1] in vocabulary]
            found.sort(key=lambda pair: [vocabulary[part] for part in pair])
            merges += [(piece.score, pair) for pair in found]
        merges.sort(key=lambda merge: -merge[0])  # stable: the order among the splits of one piece is kept
        return [pair for _, pair in merges]
