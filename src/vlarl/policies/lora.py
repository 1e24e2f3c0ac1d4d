"""Owns what is trainable: freezing parts, injecting LoRA adapters (peft), merging them back into plain weights."""
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import peft.tuners.lora.layer as lora_layers
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from vlarl.errors import CheckpointError
from vlarl.policies.adapter import PREFIX, config_of

if TYPE_CHECKING:
    from vlarl.recipe.schema import Lora

ADAPTER = "default"  # the one that there is, in state dicts
PARTS = {"vision": "vision_backbone", "projector": "projector", "language": "language_model"}


def freeze_parts(module: nn.Module, freeze: Sequence[str]) -> None:
    """Parts (vision, projector, language) that get no gradient."""
    for part in freeze:
        getattr(module, PARTS[part]).requires_grad_(False)


def inject_lora(module: nn.Module, lora: Lora, freeze: Sequence[str], layers: Sequence[str]) -> None:
    """Put adapters into `module`, in place; base weights freeze, the value head stays fully trainable.

    layers: full names of those that get them, as an adapter that is trained on has them; in frozen parts they do not learn. Without any,
    what `lora.targets` says.
    """
    chosen = list(layers) or _targets(module, lora, freeze)
    resting = [name for name in chosen if not module.get_submodule(name).weight.requires_grad]
    alpha = lora.rank * lora.scale
    config = LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=chosen, init_lora_weights="gaussian")  # type: ignore[arg-type]
    empty = next(module.parameters()).is_meta
    inject_adapter_in_model(config, module, ADAPTER, low_cpu_mem_usage=empty)  # adapters are as empty as the module is
    for layer in module.modules():
        if type(layer) is lora_layers.Linear:
            layer.__class__ = AddedLinear
    for name in resting:
        module.get_submodule(name).requires_grad_(False)
    module.value_head.requires_grad_(True)


class AddedLinear(lora_layers.Linear):
    """peft's linear layer with one adapter, always on: W x + scale * B A x, of which the second product is added as it is made.
    No dropout: acting and learning have to see the same weights.

    peft reads and writes the whole output twice more, forward and backward: to scale it, and to add it.
    """

    def forward(self, x: Tensor, *_: object, **__: object) -> Tensor:
        """(..., in) -> (..., out)."""
        flat = x.flatten(0, -2)  # of a result that is no view, so that autograd need not copy where it is changed in place
        result = self.base_layer(flat)
        down, up = (cast(nn.Linear, part[ADAPTER]) for part in (self.lora_A, self.lora_B))
        small = down(flat.to(down.weight.dtype))
        result.addmm_(small.to(result.dtype), up.weight.to(result.dtype).t(), alpha=self.scaling[ADAPTER])
        return result.unflatten(0, x.shape[:-1])


def _targets(module: nn.Module, lora: Lora, freeze: Sequence[str]) -> list[str]:
    """all-linear: every trained nn.Linear but the value head and lm_head. Names given instead match a layer's last name or full path."""
    frozen = tuple(PARTS[part] + "." for part in freeze)
    linear = [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
        and layer.weight.requires_grad
        and not name.startswith(("value_head.", *frozen))
        and not name.endswith("lm_head")
    ]
    if lora.targets != "all-linear":
        linear = [
            name
            for name, layer in module.named_modules()
            if isinstance(layer, (nn.Linear, nn.Conv2d))
            and layer.weight.requires_grad
            and not name.startswith(("value_head.", *frozen))
            and (name.rsplit(".", 1)[-1] in lora.targets or name in lora.targets)
        ]
    if not linear:
        message = f"policy.lora.targets = {lora.targets}: no trained layer has such a name."
        raise CheckpointError(message, "Use all-linear, or names such as q_proj.")
    return linear


def merged(state: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """A state dict with adapters -> the same weights under plain names: W + scale * B A, scale = alpha / rank."""
    plain: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".lora_" in name:
            continue
        if name.endswith(".base_layer.weight"):
            layer = name.removesuffix(".base_layer.weight")
            a, b = (state[f"{layer}.lora_{part}.{ADAPTER}.weight"] for part in "AB")
            wide = torch.promote_types(tensor.dtype, torch.float32)
            update = (b.to(wide).flatten(1) @ a.to(wide).flatten(1)).view_as(tensor)
            tensor = (tensor.to(wide) + scale * update).to(tensor.dtype)
        plain[name.replace(".base_layer.", ".")] = tensor
    return plain


def adapter_state(state: dict[str, Tensor], scale: float, base: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A state dict with adapters -> what PEFT stores of it: the factors under its names, and adapter_config.json."""
    factors = {
        PREFIX + name.replace(f".{ADAPTER}.", "."): tensor.detach().cpu().contiguous() for name, tensor in state.items() if ".lora_" in name
    }
    layers = sorted({name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in factors})
    rank = factors[f"{PREFIX}{layers[0]}.lora_A.weight"].shape[0]
    return factors, config_of(base, rank, scale * rank, layers)
