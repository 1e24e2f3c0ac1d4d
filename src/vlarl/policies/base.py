"""Owns VLAPolicy, what rollout and learner call, and PolicyModule, what a family builds (families.py).

Legend: B batch, K actions per chunk, A numbers per action, N = K*A tokens, M bins, J values, L prompt tokens, P patches, F features.
"""
from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlarl.policies.actions import ActionCodec, build_codec, encode_bins
from vlarl.policies.engine import Engine, Inputs, Outputs
from vlarl.policies.layout import OpenVLAConfig
from vlarl.policies.sampling import Draw, entropy, log_distribution, token_logprob
from vlarl.policies.spec import PolicySpec
from vlarl.policies.tokenizer import Prompt, PromptTable
from vlarl.types import ActionChunk, Observation

# Given the logits of the next tokens (B, n, M), their bins (B, n): how a module that decodes step by step learns what was chosen.
Choose = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Scores:
    """logprob_BN, entropy_BN (nats), value_BJ: float32 (float64 for a float64 model), with gradient."""

    logprob_BN: Tensor
    entropy_BN: Tensor
    value_BJ: Tensor


class PolicyModule(nn.Module, ABC):
    """A family's module: the part of a policy that is sharded, trained and saved."""

    value_head: nn.Module

    @abstractmethod
    def forward(
        self,
        image: Tensor,
        input_ids_BL: Tensor,
        mask_BL: Tensor | None = None,
        state_BD: Tensor | None = None,
        token: Tensor | Choose | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, N, M) and values (B, J), float32 (float64 for a float64 model).

        image: uint8 frames (B, V, H, W, 3), or tower features (B, P, F) from `encode_image`. input_ids_BL int64: BOS first; pads, if
        any, between BOS and text. mask_BL bool, False at pads; None: nothing is padded. state_BD: normalised, where the policy reads
        one. token: bins (B, N) to be scored, or a Choose that is asked as logits come, in order and for every token; None will do for a
        family whose tokens do not depend on each other.
        """

    @abstractmethod
    def encode_image(self, image_BVHWC: Tensor) -> Tensor:
        """uint8 frames -> tower features (B, P, F), views one after another: what may be cached while the towers are frozen."""

    @abstractmethod
    def fsdp_units(self) -> list[nn.Module]:
        """The repeated blocks, for sharding and activation checkpointing."""


class VLAPolicy:
    """A module with its tokenizer and action codec. `act` and `evaluate` run the same forward code.

    module: what is sharded and trained. keep_features: whether `act` hands over what the towers made of the frames.
    policy_version: optimiser updates behind its weights; the learner counts it up.
    folder: where the tokenizer and processor files lie. lora_scale: alpha / rank of its adapters (1: none).
    statistics: what replaces its folder's dataset_statistics.json (None: nothing).
    adapter_base: folder or bundled name whose stored weights its adapters change; empty where they lie nowhere as they were loaded.
    engine: how `act` runs its forward pass; plain unless replaced (`equip` in probe.py). notices: lines about what was loaded, for the log.
    """

    def __init__(
        self,
        module: PolicyModule,
        config: OpenVLAConfig,
        spec: PolicySpec,
        prompts: PromptTable,
        codec: ActionCodec,
        device: torch.device,
        folder: Path,
        lora_scale: float,
        adapter_base: str,
    ) -> None:
        self.module = module
        self.config = config
        self.spec = spec
        self.codec = codec
        self.device = device
        self.folder = folder
        self.lora_scale = lora_scale
        self.adapter_base = adapter_base
        self.policy_version = 0
        self.keep_features = False
        self.engine = Engine()
        self.statistics: dict[str, Any] | None = None
        self.notices: tuple[str, ...] = ()
        self._prompts = prompts

    def adopt_statistics(self, key: str, entry: dict[str, Any]) -> None:
        """Scale actions and state by one entry of a dataset_statistics.json from now on, instead of what the folder holds."""
        config = self.config
        self.codec = build_codec({key: entry}, key, config.normalization, config.epsilon, config.action_dim, self.device)
        self.spec = replace(self.spec, unnorm_key=key)
        self.statistics = {key: entry}

    def prompts(self, instruction: tuple[str, ...], multiple: int = 1) -> Prompt:
        """Token ids and mask of B sentences, padded to the longest, or the next multiple."""
        return self._prompts.batch(instruction, multiple)

    @torch.no_grad()
    def act(self, obs: Observation, noise_BN: Tensor | None, temperature: float, top_k: int) -> ActionChunk:
        """Sample (noise uniform in [0, 1), one number per token) or, with noise None, take the likeliest bins.

        Log-probs are of the distribution sampled from; greedy ones are under temperature 1 without top-k. An L1 head gives actions
        without probabilities: noise is ignored, tokens are the nearest bins, log-probs are 0.
        """
        prompt = self.prompts(obs.instruction, self.engine.prompt_multiple)
        image_BVHWC, state_BD = (x.to(self.device, non_blocking=True) for x in (obs.image_BVHWC, obs.state_BD))
        noise_BN = None if noise_BN is None else noise_BN.to(self.device, non_blocking=True)
        inputs = Inputs(image_BVHWC, prompt.ids_BL, prompt.mask_BL, state_BD if self.config.proprio_dim else None, noise_BN)
        o = self.engine(self._choose, inputs, temperature, top_k)
        return ActionChunk(o.action_BKA, o.token_BN, o.logprob_BN, o.value_BJ, self.policy_version, o.feature_BPF)

    def _choose(self, inputs: Inputs, temperature: float, top_k: int) -> Outputs:
        """The whole of acting on the device. Waits for nothing there, and its work depends on shapes alone: it can be captured."""
        state_BD = None if inputs.state_BD is None else self.codec.normalize_state(inputs.state_BD)
        if self.config.head == "l1":
            action_BKA, value_BJ = self.module(inputs.image_BVHWC, inputs.ids_BL, inputs.mask_BL, state_BD)
            token_BN = encode_bins(action_BKA).flatten(1)
            return Outputs(self.codec.unnormalize(action_BKA), token_BN, action_BKA.new_zeros(token_BN.shape), value_BJ)
        draw = Draw(inputs.noise_BN, temperature, top_k)
        image = self.module.encode_image(inputs.image_BVHWC) if self.keep_features else inputs.image_BVHWC
        _, value_BJ = self.module(image, inputs.ids_BL, inputs.mask_BL, state_BD, draw)
        token_BN, logprob_BN = draw.result()
        return Outputs(self.codec.decode(token_BN), token_BN, logprob_BN, value_BJ, image if self.keep_features else None)

    def evaluate(self, obs: Observation, token_BN: Tensor, temperature: float, top_k: int, feature_BPF: Tensor | None = None) -> Scores:
        """Score stored tokens, with gradient. feature_BPF: output of `module.encode_image` for these frames, which are then not looked at.

        An L1 head scores by the Laplace distribution (scale 1) that its loss stands for.
        """
        token_BN = token_BN.to(self.device)
        logits_BNM, value_BJ = self._forward(obs, feature_BPF, token_BN)
        if self.config.head == "l1":
            logprob_BN = -(logits_BNM.flatten(1) - self.codec.values_M[token_BN]).abs() - math.log(2)
            return Scores(logprob_BN.to(value_BJ.dtype), torch.full_like(value_BJ[:, :1], 1 + math.log(2)).expand_as(token_BN), value_BJ)
        logp_BNM = log_distribution(logits_BNM, temperature, top_k, token_BN)
        return Scores(token_logprob(logp_BNM, token_BN), entropy(logp_BNM), value_BJ)

    def logits(self, obs: Observation, token_BN: Tensor) -> Tensor:
        """Unnormalised log-probabilities of the bins, float32 (B, N, M), each given the tokens before it, with gradient; for cloning."""
        return self._forward(obs, None, token_BN.to(self.device))[0]

    def _forward(self, obs: Observation, feature_BPF: Tensor | None, token: Tensor) -> tuple[Tensor, Tensor]:
        # Padded as for acting: other lengths and masks choose other kernels, and in bfloat16 their rounding shows in the log-probs.
        prompt = self.prompts(obs.instruction, self.engine.prompt_multiple)
        image = obs.image_BVHWC if feature_BPF is None else feature_BPF
        state = self.codec.normalize_state(obs.state_BD.to(self.device)) if self.config.proprio_dim else None
        logits_BNM, value_BJ = self.module(image.to(self.device), prompt.ids_BL, prompt.mask_BL, state, token)
        return logits_BNM, value_BJ
