"""Owns the way of stored tensors into a module that was built empty: strict about names and shapes, reading what this rank keeps."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vlarl.errors import CheckpointError
from vlarl.policies.adapter import Adapter, misfits
from vlarl.policies.base import PolicyModule
from vlarl.policies.layout import REFUSED, refusal
from vlarl.policies.weight_files import VALUE_HEAD, Stored, read_header, write_weights

SIDE_FILES = "*--*_checkpoint.pt"  # NAME--STEP_checkpoint.pt: a part of the policy in a file of its own
OPTIONAL = "proprio_projector"  # published with policies that may be run without it
FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # as safetensors spells them
BLOCK_BYTES = 32 << 20  # of a weight in float32: what is merged at a time while a file is written
Read = Callable[[str, int, int], Tensor]  # name in the file, first row, row after the last


@dataclass(frozen=True)
class Place:
    """Where a policy's weights go. spread: shards an empty module, in place. part: a tensor of the module's state -> this rank's rows of
    it (sharing memory) and the number of the first."""

    spread: Callable[[PolicyModule], None]
    part: Callable[[Tensor], tuple[Tensor, int]]


WHOLE = Place(lambda module: None, lambda tensor: (tensor, 0))


def side_tensors(folder: Path, module: nn.Module) -> dict[str, Stored]:
    """Tensors of the side files in a folder, under the names that they have in the module. `read_config` has refused FiLM's."""
    parts = {name for name, _ in module.named_children()}
    found: dict[str, Stored] = {}
    seen: dict[str, Path] = {}
    for path in sorted(folder.glob(SIDE_FILES)):
        part = path.name.split("--")[0]
        if part in seen:
            message = f"{folder}: {seen[part].name} and {path.name} are both there."
            raise CheckpointError(message, "Keep the one that belongs to the weights.")
        seen[part] = path
        if part == OPTIONAL and part not in parts:
            continue
        if part not in parts:
            raise CheckpointError(f"{path}: this policy has no {part}.", "Choose a checkpoint without this file.")
        for key, tensor in _load_side(path).items():
            if part == "action_head" and "noise_predictor." in key:  # its file has the same name as an L1 head's
                raise refusal(path, REFUSED["noisy_action_projector"])
            name = f"{part}.{key.removeprefix('module.')}"
            found[name] = Stored(path, key, str(tensor.dtype), tuple(tensor.shape), 0, 0)
    return found


def check_fit(folder: Path, stored: dict[str, Stored], adapter: Adapter | None, expected: dict[str, tuple[int, ...]]) -> None:
    """CheckpointError unless the stored tensors are exactly the expected {name: shape}; a value head may be lacking as a whole."""
    has_head = any(name.startswith(VALUE_HEAD) for name in stored)
    wrong = []
    for name, tensor in stored.items():
        if name not in expected:
            if not name.startswith(f"{OPTIONAL}."):
                wrong.append(f"unexpected {name}")
        elif tensor.shape != expected[name]:
            wrong.append(f"{name} is {tensor.shape}, expected {expected[name]}")
    wrong += [f"missing {name}" for name in expected if name not in stored and (has_head or not name.startswith(VALUE_HEAD))]
    if wrong:
        hint = "Its config.json describes another model."
        if VALUE_HEAD in wrong[0]:
            hint = "Set policy.value as the checkpoint's value head has it, or leave it out."
        raise CheckpointError(f"{folder}: the weights do not fit the configuration: {_first(wrong)}.", hint)
    if adapter is not None and (wrong := misfits(adapter, expected)):
        hint = f"It was made for the base model {adapter.base or '(not named)'}."
        raise CheckpointError(f"{adapter.folder}: the adapter does not fit the policy {folder}: {_first(wrong)}.", hint)


def _first(wrong: list[str]) -> str:
    more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    return f"{'; '.join(wrong[:5])}{more}"


def materialize(module: nn.Module, device: torch.device) -> None:
    """Memory for an empty module's parameters, uninitialised; buffers keep their values."""
    buffers = dict(module.named_buffers(remove_duplicate=False))
    module.to_empty(device=device)
    for name, buffer in module.named_buffers(remove_duplicate=False):
        buffer.copy_(buffers[name])


@torch.no_grad()
def fill(module: nn.Module, stored: dict[str, Stored], adapter: Adapter | None, apart: bool, head: nn.Module | None, place: Place) -> None:
    """Read every tensor of a materialised module: rows that this rank keeps, cast while copying, one tensor at a time.

    stored: as checked by `check_fit`. adapter: merged into what is read, or, `apart`, put into the module's own factors. head: whole value
    head where none is stored. Adapters that are not stored start at A ~ N(0, 1/rank), B = 0, drawn whole from torch's generator, so the
    same for every sharding.
    """
    wanted: dict[Path, list[tuple[Stored, Tensor, str]]] = {}  # file -> what to read, where to, layer whose factors are added ("": none)
    replaced = adapter.whole if adapter is not None else {}
    for name, tensor in module.state_dict().items():
        plain = name.replace(".base_layer.", ".")
        layer, _, factor = name.rpartition(".lora_")
        if layer and apart and adapter is not None:
            source, layer = adapter.layers[layer]["AB".index(factor[0])], ""
        elif layer:
            whole = torch.zeros(()).expand(tensor.shape) if factor[0] == "B" else torch.randn(tensor.shape) / tensor.shape[0]
            _put(whole, tensor, place)
            continue
        elif head is not None and name.startswith(VALUE_HEAD):
            _put(head.get_parameter(name.removeprefix(VALUE_HEAD)), tensor, place)
            continue
        else:
            source = replaced.get(plain, stored[plain])
            adapted = adapter is not None and not apart and plain.endswith(".weight") and plain.removesuffix(".weight") in adapter.layers
            layer = plain.removesuffix(".weight") if adapted else ""
        wanted.setdefault(source.file, []).append((source, tensor, layer))
    for path, tensors in wanted.items():
        with _open(path) as read:
            for source, tensor, layer in tensors:
                local, start = place.part(tensor)
                if local.numel():
                    rows = read(source.key, start, start + local.shape[0] if local.ndim else 0)
                    local.copy_(_adapted(rows, adapter, layer, start, local.dtype) if layer and adapter is not None else rows)


def _put(whole: Tensor, tensor: Tensor, place: Place) -> None:
    local, start = place.part(tensor)
    if local.numel():
        local.copy_(whole[start : start + local.shape[0]])


def _adapted(rows: Tensor, adapter: Adapter, layer: str, start: int, dtype: torch.dtype) -> Tensor:
    """Rows of a weight, plus the same rows of scale * B A; computed in `dtype`, but at least float32."""
    first, second = adapter.layers[layer]
    with _open(first.file) as read:
        a, b = read(first.key, 0, first.shape[0]), read(second.key, start, start + rows.shape[0])
    wide = torch.promote_types(dtype, torch.float32)
    update = b.to(wide).flatten(1) @ a.to(wide).flatten(1)
    return rows.to(wide) + adapter.scale * update.view(rows.shape)


def write_merged(folder: Path, tensors: Mapping[str, Stored], adapter: Adapter | None, dtype: str | None, shard_bytes: int) -> list[Path]:
    """`write_weights`, with the adapter merged, and in another dtype (None: each tensor's own; else as safetensors spells it).

    The files are laid out first, with zeros where something is computed, and filled then, some rows at a time: no tensor is held whole.
    """
    zeros = folder / ".zeros"
    laid, computed = {}, {}
    for name, tensor in tensors.items():
        source = adapter.whole.get(name, tensor) if adapter is not None else tensor
        wanted = dtype if dtype is not None and tensor.dtype in FLOATS else tensor.dtype
        laid[name] = source
        if wanted != source.dtype or _layer_of(name, adapter):
            bytes_ = math.prod(source.shape) * FLOATS[wanted].itemsize
            laid[name] = Stored(zeros, name, wanted, source.shape, 0, bytes_)
            computed[name] = source
    with zeros.open("wb") as file:
        file.truncate(max((laid[name].bytes for name in computed), default=0))  # sparse: it takes no room
    try:
        paths = write_weights(folder, laid, shard_bytes)
    finally:
        zeros.unlink()
    for path in paths:
        with path.open("r+b") as out:
            for name, place in read_header(path).items():
                if name in computed:
                    out.seek(place.start)
                    for rows in _merged_rows(name, computed[name], adapter, FLOATS[place.dtype]):
                        out.write(rows.reshape(-1).view(torch.uint8).numpy().data)
    return paths


def merged_tensor(name: str, stored: Stored, adapter: Adapter | None) -> Tensor:
    """A stored tensor, whole, with what the adapter changes of it, in the stored dtype."""
    source = adapter.whole.get(name, stored) if adapter is not None else stored
    with _open(stored.file) as read:
        dtype = read(stored.key, 0, 1).dtype
    return torch.cat(list(_merged_rows(name, source, adapter, dtype))).view(source.shape)


def _layer_of(name: str, adapter: Adapter | None) -> str:
    """The layer whose factors are added to a weight; empty: none."""
    layer = name.removesuffix(".weight")
    return layer if adapter is not None and layer != name and layer in adapter.layers and name not in adapter.whole else ""


@torch.no_grad()
def _merged_rows(name: str, source: Stored, adapter: Adapter | None, dtype: torch.dtype) -> Iterator[Tensor]:
    """A tensor in pieces of some rows, with the layer's factors added; of one without axes, its only number."""
    layer, rows = _layer_of(name, adapter), source.shape[0] if source.shape else 1
    step = max(1, BLOCK_BYTES // (4 * max(1, math.prod(source.shape[1:]))))
    with _open(source.file) as read:
        for start in range(0, rows, step):
            piece = read(source.key, start, min(rows, start + step))
            if layer and adapter is not None:
                piece = _adapted(piece, adapter, layer, start, dtype)
            yield piece.to(dtype).reshape(-1) if not source.shape else piece.to(dtype).contiguous()


@contextmanager
def _open(path: Path) -> Iterator[Read]:
    """A weight file, mapped; whatever cannot be read becomes a CheckpointError."""
    try:
        if path.suffix == ".pt":
            tensors = _load_side(path)
            yield lambda key, start, end: tensors[key][start:end]
            return
        with safe_open(path, "pt") as file:

            def read(key: str, start: int, end: int) -> Tensor:
                piece = file.get_slice(key)
                return piece[start:end] if piece.get_shape() else file.get_tensor(key)

            yield read
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}.", "The file may have been cut short; copy it again.") from error


def _load_side(path: Path) -> dict[str, Tensor]:
    """A side file: a state dict saved by torch. Nothing but tensors is unpickled."""
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises many kinds; all mean the same here
        hint = "Expected a state dict as torch.save writes it; copy it again."
        raise CheckpointError(f"{path}: cannot be read: {error}.", hint) from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise CheckpointError(f"{path}: expected a state dict of tensors, got {type(state).__name__}.")
    return state
