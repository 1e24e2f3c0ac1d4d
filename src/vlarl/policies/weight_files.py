"""Owns safetensors files as bytes: which of them make up a policy folder, what their headers promise, copying tensors. Torch-free.

A file is 8 bytes (little-endian length of the header), the header (JSON: {name: {dtype, shape, data_offsets}}), the tensors' bytes.
"""
from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO

from vlarl.errors import CheckpointError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
VALUE_HEAD_FILE = "value_head.safetensors"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
VALUE_HEAD = "value_head."
ASSETS = Path(str(resources.files("vlarl"))) / "assets"
_CUT_SHORT = "The file may have been cut short; copy it again."


@dataclass(frozen=True)
class Stored:
    """A tensor on disk: its file, its name in it, dtype as safetensors spells it (BF16), shape, first byte and number of bytes."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    bytes: int


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, in the order of their bytes. CheckpointError where it is missing, damaged or cut short."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            header = json.loads(file.read(length)) if 0 < length <= size - 8 else None
    except FileNotFoundError:
        hint = "Download or copy the checkpoint again."
        if path.parent.parent == ASSETS:  # a configuration alone
            hint = f"It is shipped without weights; scratch:{path.parent.name} is the same policy with random ones."
        raise CheckpointError(f"{path}: the policy folder lacks this file.", hint) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}.", _CUT_SHORT) from error
    try:
        if header is None:
            raise ValueError(f"its header would have {length} bytes, the file has {size}")
        header.pop("__metadata__", None)
        found = []
        for key, row in header.items():
            first, last = row["data_offsets"]
            found.append(Stored(path, key, row["dtype"], tuple(row["shape"]), 8 + length + first, last - first))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}.", _CUT_SHORT) from error
    needed = max((t.start + t.bytes for t in found), default=8 + length)
    if size != needed:
        raise CheckpointError(f"{path}: cannot be read: it has {size} bytes, its header describes {needed}.", _CUT_SHORT)
    return {t.key: t for t in sorted(found, key=lambda t: t.start)}


def read_weights(folder: Path) -> dict[str, Stored]:
    """The tensors of model.safetensors, or of the shards that the index names, and of value_head.safetensors where there is one."""
    found: dict[str, Stored] = {}
    for path in [*_model_files(folder), *(p for p in (folder / VALUE_HEAD_FILE,) if p.is_file())]:
        header = read_header(path)
        twice = sorted(found.keys() & header.keys())
        if twice:
            message = f"{path}: {twice[0]} is in {found[twice[0]].file.name} too."
            raise CheckpointError(message, "Remove the file that does not belong here.")
        found |= header
    return found


def _model_files(folder: Path) -> list[Path]:
    if not (folder / INDEX).is_file():
        return [folder / WEIGHTS]
    try:
        files = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / INDEX}: cannot be read: {error!r}.", _CUT_SHORT) from error
    return [folder / file for file in sorted(files)]


def write_weights(folder: Path, tensors: Mapping[str, Stored], shard_bytes: int) -> list[Path]:
    """Copy tensors, bytes as they are, into model.safetensors, or into shards with an index where they exceed `shard_bytes`.

    Shards are filled in the given order; a tensor larger than `shard_bytes` gets one to itself.
    """
    shards: list[dict[str, Stored]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.bytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.bytes
    if len(shards) == 1:
        return [write_file(folder / WEIGHTS, shards[0])]
    paths = [folder / f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for path, shard in zip(paths, shards, strict=True):
        write_file(path, shard)
    total = sum(tensor.bytes for tensor in tensors.values())
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: path.name for path, shard in zip(paths, shards, strict=True) for name in shard},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return paths


def write_file(path: Path, tensors: Mapping[str, Stored]) -> Path:
    """One safetensors file of tensors that lie in others, copied one after another in a megabyte of memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [end, end + tensor.bytes]}
        end += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            with tensor.file.open("rb") as source:
                source.seek(tensor.start)
                _copy(source, out, tensor)
    return path


def _copy(source: BinaryIO, out: BinaryIO, tensor: Stored) -> None:
    left = tensor.bytes
    while left:
        chunk = source.read(min(left, 1 << 20))
        if not chunk:
            raise CheckpointError(f"{tensor.file}: ends within {tensor.key}.", _CUT_SHORT)
        out.write(chunk)
        left -= len(chunk)

