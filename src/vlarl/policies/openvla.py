"""Owns the parts that OpenVLA and OpenVLA-OFT share: projector, Llama, value head, action logits. Key names as published.

Legend: B batch, S positions, D hidden width, N action tokens, M action bins (256), J values per chunk.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from vlarl.errors import CheckpointError
from vlarl.policies.layout import OpenVLAConfig

VALUE_WIDTHS = (512, 128)


class Projector(nn.Module):
    """Patch features -> Llama's embedding space: three layers after fused towers, two after one."""

    def __init__(self, vision_width: int, hidden: int, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        if fused:
            self.fc1 = nn.Linear(vision_width, 4 * vision_width)
            self.fc2 = nn.Linear(4 * vision_width, hidden)
            self.fc3 = nn.Linear(hidden, hidden)
        else:
            self.fc1 = nn.Linear(vision_width, hidden)
            self.fc2 = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc2(F.gelu(self.fc1(x)))
        return self.fc3(F.gelu(x)) if self.fused else x


class ValueHead(nn.Module):
    """Hidden state (B,D) -> values (B,J). The last layer starts at zero: the first values are 0, and push nothing into the policy."""

    def __init__(self, hidden: int, outputs: int) -> None:
        super().__init__()
        first, second = VALUE_WIDTHS
        last = nn.Linear(second, outputs, bias=False)
        nn.init.zeros_(last.weight)
        self.mlp = nn.Sequential(nn.Linear(hidden, first), nn.GELU(), nn.Linear(first, second), nn.GELU(), last)

    def forward(self, hidden_BD: Tensor) -> Tensor:
        return self.mlp(hidden_BD)


def build_language_model(config: OpenVLAConfig) -> LlamaForCausalLM:
    """transformers' Llama with SDPA attention. Its RMSNorm rounds through float32; torch's keeps float64 and has the same key names."""
    fields = {k: v for k, v in config.text.items() if k not in ("torch_dtype", "dtype", "model_type")}
    fields |= {"attn_implementation": "sdpa", "use_cache": False}
    try:
        llama = LlamaForCausalLM(LlamaConfig(**fields))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"config.json: text_config is no Llama configuration: {error}") from error
    norms = [(layer, name) for layer in llama.model.layers for name in ("input_layernorm", "post_attention_layernorm")]
    for owner, name in [*norms, (llama.model, "norm")]:
        old = getattr(owner, name)
        setattr(owner, name, nn.RMSNorm(old.weight.shape[0], eps=old.variance_epsilon, device=old.weight.device, dtype=old.weight.dtype))
    return llama


def action_logits(lm_head: nn.Module, hidden_BND: Tensor, low: int, high: int) -> Tensor:
    """Logits of the action tokens low..high-1 only, (B,N,M): the other rows of a plain head are never multiplied."""
    if type(lm_head) is nn.Linear:
        return F.linear(hidden_BND, lm_head.weight[low:high])
    return lm_head(hidden_BND)[..., low:high]


def full_precision(x: Tensor) -> Tensor:
    """float64 stays, everything else becomes float32: the dtype of log-probs, values and losses."""
    return x if x.dtype == torch.float64 else x.float()
