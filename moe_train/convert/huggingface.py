"""``moe-train checkpoint convert``: from and to Hugging Face's format, bit for bit.

One parameter is in memory at a time on the way in, one file's worth on the way out. Needs neither a GPU nor
megatron-core.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from moe_train.checkpoint.folder import check_free
from moe_train.convert.names import Counterpart, counterparts
from moe_train.errors import DamagedError, UserError

if TYPE_CHECKING:
    import torch

    from moe_train.convert.hf_files import FolderReader
    from moe_train.model.config import ModelConfig

HALF_WRITTEN = ".writing"
"""Ending of a folder that is not finished."""


def from_hf(source: str | Path, out: str | Path) -> int:
    """Turn the Hugging Face folder ``source`` into the checkpoint ``out``: weights and tokenizer alone.

    Every tensor of the folder must be one of the model's, with its shape, and the other way round.

    Raises:
        UserError: the folder's model is none that can be expressed here, or ``out`` exists.
        DamagedError: a file cannot be read.
    """
    from moe_train.checkpoint.weights import write_weights

    check_free(out)
    model = HuggingFaceModel(source)
    tensors = ((name, model.read(name)) for name in _track(model.names, "reading"))
    write_weights(out, model.config, tensors, model.dtypes, tokenizer=model.tokenizer)
    print(
        f"{out}: {model.config.num_parameters():,} parameters in {_dtype_names(model.dtypes.values())},"
        f" from {model.num_tensors} tensors"
    )
    return 0


class HuggingFaceModel:
    """A Hugging Face folder, read as a checkpoint is: by our names, one parameter at a time.

    Every tensor of the folder must be one of the model's, with its shape, and the other way round.

    Attributes:
        config: its model; ``names``: every parameter, in the order of the model; ``dtypes``: by name; ``tokenizer``:
            its tokenizer's file, if it has one that is usable here; ``num_tensors``: of the folder.

    Raises:
        UserError: the folder's model is none that can be expressed here.
        DamagedError: a file cannot be read.
    """

    def __init__(self, folder: str | Path):
        _need("safetensors")
        from moe_train.convert.hf_config import model_config
        from moe_train.convert.hf_files import FolderReader, read_json
        from moe_train.convert.hf_tokenizer import find_tokenizer

        self.path = Path(folder)
        config_path = self.path / "config.json"
        self.config = model_config(read_json(config_path), str(config_path))
        self._reader = FolderReader(self.path)
        pairs = counterparts(self.config)
        _account_for_all(self._reader, pairs, self.config, self.path)
        self.dtypes = _dtypes(self._reader, pairs, self.path)
        self.tokenizer, self.num_tensors = find_tokenizer(self.path), len(pairs)
        self._parts = dict(_by_parameter(pairs))
        self.names = list(self._parts)

    def dtype(self, name: str) -> torch.dtype:
        return self.dtypes[name]

    def read(self, name: str) -> torch.Tensor:
        """One whole parameter."""
        import torch

        parts = self._parts[name]
        if not parts[0].index:
            return self._reader.read(parts[0].hf_name).view(parts[0].shape)
        whole = torch.empty(parts[0].shape, dtype=self.dtypes[name])
        for part in parts:
            place = whole[part.index]
            place.copy_(self._reader.read(part.hf_name).view(place.shape))
        return whole


def to_hf(checkpoint: str | Path, out: str | Path, shard_bytes: int | None = None) -> int:
    """Write ``checkpoint`` as the Hugging Face folder ``out`` for transformers' AutoModelForCausalLM.

    The folder gets config.json, generation_config.json, the weights as safetensors (in several files beyond
    ``shard_bytes``, 5 GB unless given) and the tokenizer that lies in the checkpoint. It appears under its
    name once it is complete.

    Raises:
        UserError: there is no such checkpoint, ``out`` exists, or transformers cannot express the model.
        DamagedError: the checkpoint is not what its manifest says.
    """
    _need("safetensors")
    from moe_train.checkpoint.manifest import check_files, read_manifest
    from moe_train.checkpoint.weights import WeightsReader
    from moe_train.convert.hf_config import hf_config
    from moe_train.convert.hf_files import SHARD_BYTES, FolderWriter, write_json
    from moe_train.convert.hf_tokenizer import export_tokenizer

    place = check_free(out)
    reader = WeightsReader(checkpoint)
    hf_config(reader.config, "", None)  # refuses what cannot be expressed, before hours of reading
    if damage := check_files(reader.path, read_manifest(reader.path)):
        raise DamagedError(f"{reader.path}: {damage}")
    pairs = counterparts(reader.config)
    dtypes = {pair.name: reader.dtype(pair.name) for pair in pairs}
    with _new_folder(place) as folder:
        ids, remark = export_tokenizer(reader.tokenizer, folder, reader.config.max_sequence_length)
        dtype = str(dtypes["embedding.weight"]).removeprefix("torch.")
        config = hf_config(reader.config, dtype, ids)
        write_json(folder / "config.json", config)
        write_json(folder / "generation_config.json", _generation_config(config))
        writer = FolderWriter(folder, shard_bytes or SHARD_BYTES)
        for name, parts in _track(_by_parameter(pairs), "writing"):
            whole = reader.read(name)
            for part in parts:
                theirs = part.theirs(whole)
                writer.add(part.hf_name, theirs.clone() if part.index else theirs)  # safetensors takes no views
        writer.close()
    print(
        f"{out}: {len(pairs)} tensors in {_dtype_names(dtypes.values())}, {reader.config.num_parameters():,} parameters"
    )
    if remark:
        print(f"note: {remark}")
    return 0


def _by_parameter(pairs: list[Counterpart]) -> list[tuple[str, list[Counterpart]]]:
    """Each parameter of ours with the tensors that make it up."""
    return [(name, list(parts)) for name, parts in groupby(pairs, key=lambda pair: pair.name)]


def _dtypes(reader: FolderReader, pairs: list[Counterpart], source: Path) -> dict[str, torch.dtype]:
    """Our name -> type; the tensors that make up one parameter have one."""
    dtypes: dict[str, torch.dtype] = {}
    for pair in pairs:
        dtype = reader.dtype(pair.hf_name)
        if not dtype.is_floating_point:
            raise UserError(f"{source}: tensor {pair.hf_name} is {dtype}: quantised weights are not converted")
        if dtypes.setdefault(pair.name, dtype) != dtype:
            raise UserError(
                f"{source}: tensor {pair.hf_name} is {dtype}, others of {pair.name} are {dtypes[pair.name]};"
                " they become one parameter and must have one type"
            )
    return dtypes


def _account_for_all(reader: FolderReader, pairs: list[Counterpart], config: ModelConfig, source: Path) -> None:
    """Every tensor there has its place here and every parameter here its tensor there, in its shape."""
    wanted = {pair.hf_name: pair.hf_shape for pair in pairs}
    # Old files hold the rotary frequencies too; transformers takes those of config.json, as is done here.
    found = {name: shape for name, shape in reader.shapes.items() if not name.endswith(".rotary_emb.inv_freq")}
    if config.tie_embeddings and "lm_head.weight" in found:
        import torch

        head, embedding = (reader.read(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
        if not torch.equal(head, embedding):
            raise UserError(
                f"{source}: lm_head.weight differs from model.embed_tokens.weight, and config.json says"
                " tie_word_embeddings: true; set it to false to keep both"
            )
        del found["lm_head.weight"]
    for name in wanted:
        if name not in found:
            raise UserError(
                f"{source}: tensor {name} is missing; config.json describes another model, or a file is incomplete"
            )
    for name in found:
        if name not in wanted:
            raise UserError(
                f"{source}: tensor {name} belongs to no part of the model of config.json; nothing is dropped silently"
            )
    for name, shape in wanted.items():
        if found[name] != shape:
            raise UserError(
                f"{source}: tensor {name} has the shape {list(found[name])},"
                f" and by config.json it should have {list(shape)}"
            )


def _generation_config(config: dict) -> dict:
    known = {key: value for key, value in config.items() if key.endswith("_token_id") and value is not None}
    return {"_from_model_config": True, **known}


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that takes the name ``out`` when all of it is written, and goes away when that fails."""
    writing = out.with_name(out.name + HALF_WRITTEN)
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    try:
        yield writing
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    if out.exists():
        out.rmdir()
    writing.rename(out)


def _need(package: str) -> None:
    """Say that a package is missing before anything is read."""
    if find_spec(package) is None:
        raise UserError(f"conversion needs the package {package}: pip install 'moe-train[export]'")


def _dtype_names(dtypes: Iterable[torch.dtype]) -> str:
    return " and ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes}))


def _track(items: list, verb: str) -> Iterable:
    """``items`` with a progress bar on a terminal."""
    if not sys.stderr.isatty():
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, verb, console=Console(stderr=True), transient=True)
