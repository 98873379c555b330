"""megatron-core's data classes over token files, for the benchmarks that compare with them; and synthetic token
files."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np

HEADER = struct.Struct("<9sQBQQ")


class EndToken:
    """What GPTDataset asks of a tokenizer."""

    vocab_size, eod, pad, unique_identifiers = 32000, 2, -1, {"class": "EndToken"}


def sparse_corpus(prefix: Path, tokens: int, document: int) -> None:
    """A corpus of `tokens` uint16 tokens in documents of `document`, all of them 0: a real index, and a .bin without
    blocks."""
    lengths = np.full(-(-tokens // document), document, np.int64)
    lengths[-1] = tokens - lengths[:-1].sum()
    write_index(prefix, lengths)
    with open(f"{prefix}.bin", "wb") as file:
        os.truncate(file.fileno(), tokens * 2)


def write_index(prefix: Path, lengths: np.ndarray) -> None:
    """The .idx of a uint16 corpus of documents of these lengths."""
    with open(f"{prefix}.idx", "wb") as file:
        file.write(HEADER.pack(b"MMIDIDX\x00\x00", 1, 8, len(lengths), len(lengths) + 1))
        file.write(lengths.astype("<i4").tobytes())
        file.write(((np.cumsum(lengths) - lengths) * 2).astype("<i8").tobytes())
        file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())


def gpt_dataset(prefix: str, samples: int | None, sequence_length: int, cache: str):
    """megatron-core's GPTDataset over one corpus: it builds its three indices and writes them to `cache`."""
    from megatron.core.datasets.gpt_dataset import GPTDataset
    from megatron.core.datasets.utils import Split

    config = gpt_config(sequence_length, cache)
    low = GPTDataset.build_low_level_dataset(prefix, config)
    documents = np.arange(len(low), dtype=np.int32)
    return GPTDataset(low, prefix, documents, samples, Split.train, config)


def gpt_config(sequence_length: int, cache: str | None):
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    return GPTDatasetConfig(
        random_seed=1234, sequence_length=sequence_length, blend=([""], None), split="1,0,0", path_to_cache=cache,
        tokenizer=EndToken(), reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
        create_attention_mask=False,
    )  # fmt: skip
