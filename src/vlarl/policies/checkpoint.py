"""Owns policy folders in the Hub layout: loading a VLAPolicy from one, saving one. Strict about every key and shape."""
from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vlarl.errors import CheckpointError
from vlarl.policies.actions import build_codec
from vlarl.policies.adapter import check_continued, stored_weights
from vlarl.policies.base import PolicyModule, VLAPolicy
from vlarl.policies.families import family
from vlarl.policies.layout import (
    EXTRAS,
    OpenVLAConfig,
    choose_unnorm_key,
    is_ours,
    read_config,
    read_statistics,
    resolve_folder,
    spec_from,
    value_count,
)
from vlarl.policies.lora import adapter_state, freeze_parts, inject_lora, merged
from vlarl.policies.openvla import ValueHead
from vlarl.policies.tokenizer import PromptTable, load_tokenizer
from vlarl.policies.value_heads import Wanted, settle_head
from vlarl.policies.vision import VisionTower
from vlarl.policies.weight_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, VALUE_HEAD, VALUE_HEAD_FILE, WEIGHTS
from vlarl.policies.weights import WHOLE, Place, check_fit, fill, materialize, side_tensors
from vlarl.recipe.schema import Lora

STATISTICS = "dataset_statistics.json"
COMPANIONS = (
    STATISTICS,
    "preprocessor_config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
TRAINED = "training_logits.safetensors"


def load_policy(
    source: str,
    unnorm_key: str | None = None,
    value: Literal["chunk", "action"] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    lora: Lora | None = None,
    freeze: Sequence[str] = (),
    seed: int = 0,
    adapter: str | None = None,
    apart: bool = False,
    place: Place = WHOLE,
    stated: Mapping[str, Any] | None = None,
    trainable: bool = True,
) -> VLAPolicy:
    """A policy ready to act: a folder, `bundled:NAME`, or `scratch:NAME` (random weights drawn from `seed`, the same for every dtype).

    value: one value per chunk or per action; None: as stored, else per chunk. A folder without value head gets a fresh one, as does one
    with somebody else's that does not fit; `notices` of the policy say so.
    adapter: folder of a PEFT adapter (or that of `source`, where it is an adapter by itself), merged into the weights, or kept `apart` as
    it was trained; `lora` may ask to train it on. place: how the module is spread over ranks; each reads its own rows only.
    stated: what its files do not say, see `read_config`. trainable: False freezes everything, before it is spread.
    CheckpointError: missing or truncated file, wrong key or shape, no or several action statistics.
    """
    folder, scratch = resolve_folder(source)
    device = torch.device(device)
    config = read_config(folder, stated)
    statistics = read_statistics(folder, config.raw)
    key = choose_unnorm_key(statistics, unnorm_key, str(folder))
    prompts = PromptTable(load_tokenizer(folder), config.bos_id, config.pad_id, config.blank_id, device)
    codec = build_codec(statistics, key, config.normalization, config.epsilon, config.action_dim, device)
    outputs = value_count(config, value)
    if scratch and adapter is not None:
        raise CheckpointError(f"policy.adapter = {adapter}: {source} has random weights.", "Name the adapter's base in policy.checkpoint.")
    base, notice = "", ""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if scratch:
            if lora is not None and lora.start == "adapter":
                check_continued(lora, None, source)
            module = initialize_module(config, outputs, dtype)
            make_trainable(module, lora, freeze, dtype, trainable)
            place.spread(module.to(device))
        else:
            stored, model_folder, found = stored_weights(source, adapter)
            layers: tuple[str, ...] = ()
            if lora is not None and lora.start == "adapter":
                check_continued(lora, found, source)
                apart = True
            if apart and found is not None:
                # PEFT's alpha may be a fraction, and its scale alpha / sqrt(rank).
                layers = tuple(found.layers)
                lora = Lora(rank=found.rank, alpha=found.scale * found.rank)  # type: ignore[arg-type]
            if apart or found is None:
                named = source if model_folder == folder or found is None else found.base
                base = named if named.startswith("bundled:") else str(model_folder.absolute())
            module = empty_module(config, outputs, dtype)
            stored = side_tensors(model_folder, module) | stored  # a part in the weights was trained since its side file was written
            expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
            wanted = Wanted(expected, config.value_outputs if is_ours(config.raw) else None, value is not None)
            stored, notice = settle_head(stored, wanted)
            check_fit(folder, stored, found, expected)
            lacking = not any(name.startswith(VALUE_HEAD) for name in stored)
            head = ValueHead(expected[f"{VALUE_HEAD}mlp.0.weight"][1], outputs) if lacking else None
            make_trainable(module, lora, freeze, dtype, trainable, layers)
            place.spread(module)
            materialize(module, device)
            fill(module, stored, found, apart, head, place)
    scale = lora.scale if lora is not None else 1.0
    policy = VLAPolicy(module.eval(), config, spec_from(config, key, outputs), prompts, codec, device, folder, scale, base)
    policy.notices = (notice,) if notice else ()
    return policy


def build_module(config: OpenVLAConfig, value_outputs: int) -> PolicyModule:
    """The family's module, from the table in families.py."""
    name, attribute = family(config.kind, "config.json").factory.split(":")
    module: PolicyModule = getattr(import_module(name), attribute)(config, value_outputs)
    return module


def initialize_module(config: OpenVLAConfig, value_outputs: int, dtype: torch.dtype) -> PolicyModule:
    """Random weights from torch's generator, drawn in float32."""
    module = build_module(config, value_outputs)
    for tower in (m for m in module.modules() if isinstance(m, VisionTower)):
        tower.initialize()
    cast_parameters(module, dtype)
    return module


def empty_module(config: OpenVLAConfig, value_outputs: int, dtype: torch.dtype) -> PolicyModule:
    """The family's module without memory for its parameters (on the meta device); buffers are real."""
    with init_empty_weights(include_buffers=False):
        module = build_module(config, value_outputs)
    cast_parameters(module, dtype)
    return module


def make_trainable(
    module: PolicyModule, lora: Lora | None, freeze: Sequence[str], dtype: torch.dtype, trainable: bool, layers: Sequence[str] = ()
) -> None:
    """Freeze parts (all, where not `trainable`), put adapters in where `lora` asks for them, or into `layers`; in the weights' dtype."""
    freeze_parts(module, freeze)
    if lora is not None:
        inject_lora(module, lora, freeze, layers)
        cast_parameters(module, dtype)
    if not trainable:
        module.requires_grad_(False)


def cast_parameters(module: PolicyModule, dtype: torch.dtype) -> None:
    """Parameters only: buffers (rotary frequencies, pixel means) keep their precision."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


@dataclass(frozen=True)
class Live:
    """What a policy in training said of the probe batch (`probe_logits`, CPU), and the dtype in which it computed that."""

    logits: Tensor
    compute_dtype: torch.dtype


def companions(folder: Path) -> list[Path]:
    """The files of a policy folder that go along with its weights. Its code is never run here; other evaluators look for it."""
    return [path for path in (*(folder / name for name in COMPANIONS), *sorted(folder.glob("*.py"))) if path.is_file()]


def save_policy(folder: Path, policy: VLAPolicy, state: dict[str, Tensor], live: Live | None = None) -> None:
    """Write a policy folder: config.json, weights and the base policy's tokenizer and processor files.

    state: whole tensors of `policy.module`, those of `saved_names` at least. Adapters are stored alone, in PEFT's layout, which names their
    base, with the value head beside them; where the base is stored nowhere (random weights, or an adapter merged into it), everything is,
    with the adapters merged. live: kept in the folder, so that an export is compared with the policy before it was gathered and written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if live is not None:
        facts = {"compute_dtype": str(live.compute_dtype).removeprefix("torch."), "unnorm_key": policy.spec.unnorm_key}
        _save_tensors(folder / TRAINED, {"logits": live.logits.float().contiguous()}, facts)
    if _stored_alone(policy):
        _save_adapters(folder, policy, state)
        return
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in merged(state, policy.lora_scale).items()}
    widest = max((tensor.dtype for tensor in plain.values()), key=lambda dtype: dtype.itemsize)  # frozen parts may be narrower
    _write_settings(folder, policy, plain, {"torch_dtype": str(widest).removeprefix("torch.")})
    _save_tensors(folder / WEIGHTS, plain)


def saved_names(policy: VLAPolicy) -> frozenset[str]:
    """Which tensors of the module's state `save_policy` needs."""
    names, alone = policy.module.state_dict().keys(), _stored_alone(policy)
    return frozenset(name for name in names if not alone or ".lora_" in name or name.startswith(VALUE_HEAD))


def _stored_alone(policy: VLAPolicy) -> bool:
    return bool(policy.adapter_base) and any(".lora_" in name for name, _ in policy.module.named_parameters())


def _save_adapters(folder: Path, policy: VLAPolicy, state: dict[str, Tensor]) -> None:
    """PEFT's layout, and what makes it a policy folder."""
    factors, config = adapter_state(state, policy.lora_scale, policy.adapter_base)
    head = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items() if name.startswith(VALUE_HEAD)}
    _write_settings(folder, policy, head, {})
    write_json(folder / ADAPTER_CONFIG, config)
    _save_tensors(folder / ADAPTER_WEIGHTS, factors)
    _save_tensors(folder / VALUE_HEAD_FILE, head)


def _write_settings(folder: Path, policy: VLAPolicy, state: dict[str, Tensor], changed: dict[str, Any]) -> None:
    """config.json with some fields changed, and the files that go along. state: holds the value head."""
    outputs = state[f"{VALUE_HEAD}mlp.4.weight"].shape[0]
    extras = {name: getattr(policy.config, name) for name in EXTRAS} | {"value_outputs": outputs}
    write_json(folder / "config.json", policy.config.raw | changed | {"vlarl": extras})
    for path in companions(policy.folder):
        shutil.copyfile(path, folder / path.name)
    if policy.statistics is not None:
        write_json(folder / STATISTICS, policy.statistics)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """A JSON file of a policy folder."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _save_tensors(path: Path, tensors: dict[str, Tensor], facts: Mapping[str, str] = MappingProxyType({})) -> None:
    """A safetensors file, readable by whom the umask allows. facts: kept in its header."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata={"format": "pt", **facts})
    except SafetensorError as error:  # it wraps the system's errors; callers look for a full disk
        raise OSError(errno.ENOSPC if "No space left" in str(error) else errno.EIO, str(error), str(path)) from error
    path.chmod(mode)
