"""Owns policy folders in the Hub layout: loading a VLAPolicy from one, saving one. Strict about every key and shape."""
from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlarl.errors import CheckpointError
from vlarl.policies.actions import build_codec
from vlarl.policies.base import POLICIES, PolicyModule, VLAPolicy
from vlarl.policies.layout import (
    EXTRAS,
    OpenVLAConfig,
    choose_unnorm_key,
    read_config,
    read_json,
    read_statistics,
    resolve_folder,
    spec_from,
)
from vlarl.policies.lora import freeze_parts, inject_lora, merged
from vlarl.policies.openvla import ValueHead
from vlarl.policies.tokenizer import PromptTable, load_tokenizer
from vlarl.policies.vision import VisionTower

if TYPE_CHECKING:
    from vlarl.recipe.schema import Lora

WEIGHTS, INDEX, HEAD = "model.safetensors", "model.safetensors.index.json", "value_head."
COMPANIONS = (
    "dataset_statistics.json",
    "preprocessor_config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def load_policy(
    source: str,
    unnorm_key: str | None = None,
    value: Literal["chunk", "action"] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    lora: Lora | None = None,
    freeze: Sequence[str] = (),
    seed: int = 0,
    stated: Mapping[str, Any] | None = None,
) -> VLAPolicy:
    """A policy ready to act: a folder, `bundled:NAME`, or `scratch:NAME` (random weights drawn from `seed`, the same for every dtype).

    value: one value per chunk or per action; None: as stored, else per chunk. A folder without value head gets a fresh one.
    stated: what its files do not say, see `read_config`.
    CheckpointError: missing or truncated file, wrong key or shape, no or several action statistics.
    """
    folder, scratch = resolve_folder(source)
    device = torch.device(device)
    config = read_config(folder, stated)
    statistics = read_statistics(folder, config.raw)
    key = choose_unnorm_key(statistics, unnorm_key, str(folder))
    prompts = PromptTable(load_tokenizer(folder), config.bos_id, config.pad_id, config.blank_id, device)
    codec = build_codec(statistics, key, config.normalization, config.epsilon, config.action_dim, device)
    outputs = {"chunk": 1, "action": config.chunk, None: config.value_outputs or 1}[value]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = initialize_module(config, outputs, dtype) if scratch else load_module(folder, config, outputs, dtype)
        freeze_parts(module, freeze)
        if lora is not None:
            inject_lora(module, lora, freeze)
    scale = lora.alpha / lora.rank if lora is not None else 1.0
    return VLAPolicy(module.to(device).eval(), config, spec_from(config, key), prompts, codec, device, folder, scale)


def build_module(config: OpenVLAConfig, value_outputs: int) -> PolicyModule:
    """The family's module, from the table in base.py."""
    if config.kind not in POLICIES:
        raise CheckpointError(f"config.json: policy kind {config.kind!r} is not known.", f"Known: {', '.join(POLICIES)}.")
    name, attribute = POLICIES[config.kind].split(":")
    module: PolicyModule = getattr(import_module(name), attribute)(config, value_outputs)
    return module


def initialize_module(config: OpenVLAConfig, value_outputs: int, dtype: torch.dtype) -> PolicyModule:
    """Random weights from torch's generator, drawn in float32."""
    module = build_module(config, value_outputs)
    for tower in (m for m in module.modules() if isinstance(m, VisionTower)):
        tower.initialize()
    for parameter in module.parameters():  # buffers (rotary frequencies, pixel means) keep their precision
        parameter.data = parameter.data.to(dtype)
    return module


def load_module(folder: Path, config: OpenVLAConfig, value_outputs: int, dtype: torch.dtype) -> PolicyModule:
    """Weights of a policy folder, one file or shards, cast while reading. `value_head.*` may be absent: then it starts afresh."""
    with init_empty_weights(include_buffers=False):
        module = build_module(config, value_outputs)
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    state: dict[str, Tensor] = {}
    wrong: list[str] = []
    for name, tensor in read_tensors(folder):
        if name not in expected:
            wrong.append(f"unexpected {name}")
        elif tuple(tensor.shape) != expected[name]:
            wrong.append(f"{name} is {tuple(tensor.shape)}, expected {expected[name]}")
        else:
            # A copy: views into the mapped file lie on odd addresses, where other kernels round differently.
            state[name] = tensor.to(dtype, copy=True)
    stored_head = any(name.startswith(HEAD) for name in state)
    wrong += [f"missing {name}" for name in expected if name not in state and (stored_head or not name.startswith(HEAD))]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        hint = "Set policy.value as the checkpoint's value head has it." if HEAD in wrong[0] else "Its config.json describes another model."
        raise CheckpointError(f"{folder}: the weights do not fit the configuration: {'; '.join(wrong[:5])}{more}.", hint)
    if not stored_head:
        module.value_head = ValueHead(expected[f"{HEAD}mlp.0.weight"][1], value_outputs).to(dtype)
        state.update({HEAD + name: tensor for name, tensor in module.value_head.state_dict().items()})
    grads = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    module.load_state_dict(state, strict=True, assign=True)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in grads)
    return module


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of model.safetensors or of the shards that the index names, one at a time."""
    if (folder / INDEX).is_file():
        files = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
    else:
        files = [WEIGHTS]
    for file in files:
        path = folder / file
        if not path.is_file():
            raise CheckpointError(f"{path}: the policy folder lacks this file.", "Download or copy the checkpoint again.")
        try:
            with safe_open(path, "pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (not a dict)
                    yield name, shard.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}.", "The file may have been cut short; copy it again.") from error


def save_policy(folder: Path, policy: VLAPolicy, state: dict[str, Tensor]) -> None:
    """Write a policy folder: config.json, model.safetensors and the base policy's tokenizer and processor files.

    state: full (unsharded) state dict of `policy.module`; adapters are merged into the weights they belong to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in merged(state, policy.lora_scale).items()}
    outputs = plain[f"{HEAD}mlp.4.weight"].shape[0]
    extras = {name: getattr(policy.config, name) for name in EXTRAS} | {"value_outputs": outputs}
    dtype = str(next(iter(plain.values())).dtype).removeprefix("torch.")
    raw = policy.config.raw | {"torch_dtype": dtype, "vlarl": extras}
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    for name in COMPANIONS:
        if (policy.folder / name).is_file():
            shutil.copyfile(policy.folder / name, folder / name)
    try:
        save_file(plain, folder / WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:  # it wraps the system's errors; callers look for a full disk
        raise OSError(errno.ENOSPC if "No space left" in str(error) else errno.EIO, str(error), str(folder / WEIGHTS)) from error
    shutil.copymode(folder / "config.json", folder / WEIGHTS)
