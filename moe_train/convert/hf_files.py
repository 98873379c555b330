"""The weight files of a Hugging Face folder: read one tensor at a time, written shard by shard.

safetensors, single or sharded with an index, is read and written; torch's ``pytorch_model.bin`` is read.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from moe_train.errors import DamagedError, UserError

SHARD_BYTES = 5_000_000_000
"""The most that one written file holds, unless a single tensor is larger."""

_LAYOUTS = (
    ("model.safetensors.index.json", True),
    ("model.safetensors", False),
    ("pytorch_model.bin.index.json", True),
    ("pytorch_model.bin", False),
)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: there is no such file; is {path.parent} the folder of a Hugging Face model?"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is not a JSON file ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: is not a JSON object")
    return values


class FolderReader:
    """The tensors of a Hugging Face folder. Opening reads headers alone.

    Attributes:
        shapes: name -> shape of every tensor in the files, in the order of the files.

    Raises:
        UserError: there are no weight files, or their index and their content disagree.
        DamagedError: a file cannot be read.
    """

    def __init__(self, folder: Path):
        index, sharded = next(
            ((folder / name, many) for name, many in _LAYOUTS if (folder / name).is_file()), (None, False)
        )
        if index is None:
            raise UserError(f"{folder}: holds no weights; one of {', '.join(name for name, _ in _LAYOUTS)} is needed")
        listed: dict[str, str] = {}
        files = [index]
        if sharded:
            listed = read_json(index).get("weight_map") or {}
            files = [folder / name for name in sorted(set(listed.values()))]
            missing = [path.name for path in files if not path.is_file()]
            if missing or not files:
                raise UserError(f"{index}: names files that are not there: {', '.join(missing) or 'none at all'}")
        self._files = [_SafetensorsFile(p) if p.suffix == ".safetensors" else _PickleFile(p) for p in files]
        self._where: dict[str, _SafetensorsFile | _PickleFile] = {}
        for file in self._files:
            for name in file.shapes:
                if name in self._where:
                    raise UserError(f"{file.path}: tensor {name} is in {self._where[name].path.name} as well")
                self._where[name] = file
        for name, file_name in listed.items():
            if name not in self._where or self._where[name].path.name != file_name:
                raise UserError(f"{index}: tensor {name} is not in {file_name}")
        self.shapes = {name: shape for file in self._files for name, shape in file.shapes.items()}

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, as it was stored."""
        return self._where[name].read(name)

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor, without reading it."""
        return self._where[name].dtype(name)


class _SafetensorsFile:
    def __init__(self, path: Path):
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise DamagedError(f"{path}: is not a safetensors file ({error}); fetch it again") from None
        self.shapes = {name: tuple(self._file.get_slice(name).get_shape()) for name in self._file.keys()}

    def read(self, name: str) -> torch.Tensor:
        return self._file.get_tensor(name)

    def dtype(self, name: str) -> torch.dtype:
        part = self._file.get_slice(name)
        return part[:0].dtype if part.get_shape() else self.read(name).dtype


class _PickleFile:
    def __init__(self, path: Path):
        self.path = path
        try:
            self._tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        except Exception as error:  # unpickling raises whatever it meets
            reason = str(error).strip().split("\n")[0]
            raise DamagedError(f"{path}: is not a file of tensors that torch.load reads safely ({reason})") from None

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype


class FolderWriter:
    """Writes tensors, in the order they come, into safetensors files of at most ``shard_bytes`` each.

    Holds one file's tensors in memory. :meth:`close` gives the files their names and writes the index,
    where there are several. Raises UserError where a file cannot be written.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES):
        self.folder, self.shard_bytes = folder, shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one more tensor."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.shard_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += size
        self._total_bytes += size

    def close(self) -> None:
        """Write what is left, name the files, write the index."""
        self._flush()
        count = len(self._shards)
        weight_map = {}
        for number, names in enumerate(self._shards, start=1):
            file_name = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            self._unnamed(number).chmod(0o666 & ~_umask())  # safetensors makes files that nobody else may read
            self._unnamed(number).rename(self.folder / file_name)
            weight_map.update(dict.fromkeys(names, file_name))
        if count > 1:
            index = {
                "metadata": {"total_size": self._total_bytes},
                "weight_map": dict(sorted(weight_map.items())),
            }
            write_json(self.folder / "model.safetensors.index.json", index)

    def _flush(self) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        if not self._pending:
            return
        self._shards.append(list(self._pending))
        path = self._unnamed(len(self._shards))
        try:
            save_file(self._pending, path, metadata={"format": "pt"})
        except SafetensorError as error:  # what the system said, such as that the disk is full, is in its text alone
            raise UserError(f"{path}: cannot be written ({error}); make room, or choose another disk") from None
        self._pending, self._pending_bytes = {}, 0

    def _unnamed(self, number: int) -> Path:
        return self.folder / f"shard-{number}.partial"


def _umask() -> int:
    """The bits that new files of this process lack."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, values: dict[str, Any]) -> None:
    """A JSON file as transformers lays it out."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
