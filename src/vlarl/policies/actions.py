"""Owns the action codec: bins <-> normalised values <-> environment units, OpenVLA's 256-bin scheme; and the state's normalising.

A bin is what the policy stores and scores: bin = token id - id of the first action token, 0..255. The order is reversed: high bins
are low values. 256 edges lie on [-1, 1], so there are 255 centres; bins 0 and 1 share the highest one.
Legend: B batch, K actions per chunk, A numbers per action, N = K*A tokens.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlarl.errors import CheckpointError
from vlarl.policies.layout import Normalization

BINS = 256
EPSILON = 1e-8


def _edges(device: torch.device) -> Tensor:
    """linspace(-1, 1, 256) to numpy's last bit: torch's own differs there, and data lie on edges."""
    edges = torch.arange(BINS, dtype=torch.float64, device=device) * (2 / (BINS - 1)) - 1
    edges[-1] = 1
    return edges


def bin_values(device: torch.device) -> Tensor:
    """float64 (256,): the value that each bin decodes to: centre clip(255 - bin, 0, 254)."""
    edges = _edges(device)
    centres = (edges[1:] + edges[:-1]) / 2
    return centres[(BINS - 1 - torch.arange(BINS, device=device)).clamp(0, BINS - 2)]


def encode_bins(value: Tensor) -> Tensor:
    """Normalised values, any shape, clipped to [-1, 1] -> bins int64: 256 - digitize(value, edges)."""
    return BINS - torch.bucketize(value.double().clamp(-1, 1), _edges(value.device), right=True)


@dataclass(frozen=True)
class ActionCodec:
    """Bins <-> actions in environment units, and states -> what a policy reads.

    low_A, high_A float64: range of the data; scaled_A bool: False = left as it is, in [-1, 1]. state_low_D, state_high_D float64: range
    of the state, None where the statistics have none.
    """

    low_A: Tensor
    high_A: Tensor
    scaled_A: Tensor
    values_M: Tensor
    epsilon: float
    state_low_D: Tensor | None
    state_high_D: Tensor | None

    def decode(self, token_BN: Tensor) -> Tensor:
        """Bins (B,N) -> float32 (B,K,A), environment units."""
        return self.unnormalize(self.values_M[token_BN].unflatten(1, (-1, len(self.low_A))))

    def unnormalize(self, value_BKA: Tensor) -> Tensor:
        """Values in [-1, 1] -> float32 (B,K,A), environment units: 0.5 * (v + 1) * (high - low [+ 1e-8]) + low."""
        value_BKA = value_BKA.double()
        scaled = 0.5 * (value_BKA + 1) * (self.high_A - self.low_A + self.epsilon) + self.low_A
        return torch.where(self.scaled_A, scaled, value_BKA).float()

    def encode(self, action_BKA: Tensor) -> Tensor:
        """Actions (B,K,A) in environment units -> bins int64 (B,N)."""
        action = action_BKA.double()
        normalised = 2 * (action - self.low_A) / (self.high_A - self.low_A + EPSILON) - 1
        return encode_bins(torch.where(self.scaled_A, normalised, action)).flatten(1)

    def normalize_state(self, state_BD: Tensor) -> Tensor:
        """States (B,D) -> float64 (B,D): clip(2 * (x - low) / (high - low + 1e-8) - 1, -1, 1)."""
        assert self.state_low_D is not None and self.state_high_D is not None, "the statistics of this policy have no state"
        scaled = 2 * (state_BD.double() - self.state_low_D) / (self.state_high_D - self.state_low_D + EPSILON) - 1
        return scaled.clamp(-1, 1)


def build_codec(
    statistics: dict[str, Any], key: str, normalization: Normalization, epsilon: bool, action_dim: int, device: torch.device
) -> ActionCodec:
    """Codec from one entry of dataset_statistics.json. CheckpointError where its length is not the policy's action_dim."""
    action = statistics[key]["action"]
    low_name, high_name = ("q01", "q99") if normalization == "quantiles" else ("min", "max")
    low, high = action[low_name], action[high_name]
    if not len(low) == len(high) == action_dim:
        raise CheckpointError(
            f"dataset_statistics.json: {key} holds actions of {len(low)} numbers, config.json says {action_dim}.",
            "Choose another policy.unnorm_key.",
        )
    mask = action["mask"] if "mask" in action else [True] * action_dim
    state = statistics[key].get("proprio")

    def numbers(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)

    return ActionCodec(
        numbers(low),
        numbers(high),
        torch.tensor(mask, dtype=torch.bool, device=device),
        bin_values(device),
        EPSILON if epsilon else 0.0,
        numbers(state[low_name]) if state else None,
        numbers(state[high_name]) if state else None,
    )
