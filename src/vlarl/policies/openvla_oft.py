"""Owns OpenVLA-OFT's decoding: a chunk's action tokens in parallel, by one bidirectional forward pass; and its L1-regression head.

Sequence: the prefix of openvla.py, then [N zeroed placeholders][stop token, if the checkpoint had it].
The last prompt token predicts action token 0: the next-token shift is kept although attention sees everything.
Legend: B batch, S positions, D hidden width, K actions per chunk, A numbers per action, N = K*A action tokens, J values per chunk.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from vlarl.policies.base import Choose
from vlarl.policies.layout import OpenVLAConfig
from vlarl.policies.openvla import OpenVLA, Prefix, full_precision, run_layers

L1_BLOCKS = 2


class ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)


class ResidualMlp(nn.Module):
    """The published head's network; its key names."""

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(inputs)
        self.fc1 = nn.Linear(inputs, width)
        self.mlp_resnet_blocks = nn.ModuleList(ResidualBlock(width) for _ in range(L1_BLOCKS))
        self.layer_norm2 = nn.LayerNorm(width)
        self.fc2 = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))


class L1Head(nn.Module):
    """Hidden states of a chunk's tokens (B,N,D) -> its actions, normalised to about [-1, 1], not clipped (B,K,A)."""

    def __init__(self, chunk: int, action_dim: int, hidden: int) -> None:
        super().__init__()
        self.chunk = chunk
        self.model = ResidualMlp(action_dim * hidden, hidden, action_dim)

    def forward(self, hidden_BND: Tensor) -> Tensor:
        return self.model(hidden_BND.reshape(len(hidden_BND), self.chunk, -1))


def build_openvla_oft(config: OpenVLAConfig, value_outputs: int) -> OpenVLA:
    """OpenVLA-OFT, with the head that the checkpoint has."""
    module = OpenVLA(config, value_outputs, decode_in_parallel)
    if config.head == "l1":
        module.action_head = L1Head(config.chunk, config.action_dim, module.hidden_size)
    return module


def decode_in_parallel(module: OpenVLA, prefix: Prefix, token: Tensor | Choose | None) -> tuple[Tensor, Tensor]:
    """What predicts each token does not depend on the others: given tokens are not looked at. With an L1 head, actions (B,K,A)."""
    prefix_BSD, tokens = prefix.embedding_BSD, module.num_tokens
    batch, length = prefix_BSD.shape[:2]
    pieces = [prefix_BSD, prefix_BSD.new_zeros(batch, tokens, module.hidden_size)]
    if module.config.stop_token:
        stop = torch.full((batch, 1), module.config.eos_id, device=prefix_BSD.device)
        pieces.append(module.language_model.get_input_embeddings()(stop))
    embedding_BSD = torch.cat(pieces, dim=1)
    total = embedding_BSD.shape[1]
    seen = None
    if prefix.mask_BS is None:
        position_BS = torch.arange(total, device=prefix_BSD.device)[None]
    else:
        mask_BS = torch.cat([prefix.mask_BS, prefix.mask_BS.new_ones(batch, total - length)], dim=1)
        position_BS = mask_BS.long().cumsum(1) - 1
        seen = mask_BS[:, None, None, :].expand(batch, 1, total, total)
    hidden_BSD = run_layers(module.language_model.model, embedding_BSD, position_BS, seen, causal=False)
    hidden_BND = hidden_BSD[:, length - 1 : length - 1 + tokens]
    value_BJ = module.read_value(hidden_BND[:, 0])
    if module.config.head == "l1":
        return full_precision(module.action_head(hidden_BND)), value_BJ
    logits_BNM = module.read_tokens(hidden_BND)
    if callable(token) and not isinstance(token, Tensor):
        token(logits_BNM)
    return logits_BNM, value_BJ
