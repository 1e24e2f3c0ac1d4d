"""Owns PolicySpec: the torch-free facts about a policy that `plan` checks against a simulator. Stdlib only."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PolicySpec:
    """What a policy expects and emits.

    image_size: pixels its towers take (frames are resized to it). views: RGB images per observation.
    chunk: actions per forward pass (K). action_dim: numbers per action (A). proprio_dim: 0 = takes no state.
    unnorm_key: which action statistics it un-normalises with. head: how actions come out: tokens, or l1 (regression; no probabilities).
    kv_cache: it decodes token after token and keeps keys and values of all layers meanwhile.
    parameters, hidden_size, layers, sequence_length: for the memory and time estimates. vision_parameters, projector_parameters: of these,
    the towers' and the projector's. patches, vision_width: numbers of patches (of all views) and of features of each.
    values: outputs of the value head.
    """

    kind: str
    image_size: int
    views: int
    chunk: int
    action_dim: int
    proprio_dim: int
    unnorm_key: str
    parameters: int
    hidden_size: int
    layers: int
    sequence_length: int
    head: Literal["tokens", "l1"] = "tokens"
    kv_cache: bool = False
    vision_parameters: int = 0
    projector_parameters: int = 0
    patches: int = 0
    vision_width: int = 0
    values: int = 1
