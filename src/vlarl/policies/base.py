"""Owns VLAPolicy, what rollout and learner call, and the table of policy families.

Legend: B batch, K actions per chunk, A numbers per action, N = K*A tokens, J values, L prompt tokens, P patches, F features.
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vlarl.policies.actions import ActionCodec
from vlarl.policies.layout import OpenVLAConfig
from vlarl.policies.sampling import entropy, log_distribution, sample, token_logprob
from vlarl.policies.spec import PolicySpec
from vlarl.policies.tokenizer import Prompt, PromptTable
from vlarl.types import ActionChunk, Observation

POLICIES = {"openvla-oft": "vlarl.policies.openvla_oft:OpenVLAOFT"}


@dataclass(frozen=True)
class Scores:
    """logprob_BN, entropy_BN (nats), value_BJ: float32 (float64 for a float64 model), with gradient."""

    logprob_BN: Tensor
    entropy_BN: Tensor
    value_BJ: Tensor


class PolicyModule(nn.Module):
    """A family's module. forward(image or features, input_ids_BL, mask_BL) -> logits (B, N, 256), values (B, J)."""

    def encode_image(self, image_BVHWC: Tensor) -> Tensor:
        """uint8 frames -> tower features (B, P, F), which `forward` takes in the frames' place."""
        raise NotImplementedError

    def fsdp_units(self) -> list[nn.Module]:
        """The repeated blocks, for sharding and activation checkpointing."""
        raise NotImplementedError


class VLAPolicy:
    """A module with its tokenizer and action codec. `act` and `evaluate` run the same forward pass.

    module: what is sharded and trained. policy_version: optimiser updates behind its weights; the learner counts it up.
    folder: where the tokenizer and processor files lie. lora_scale: alpha / rank of its adapters (1: none).
    adapter_base: folder or bundled name whose stored weights its adapters change; empty where they lie nowhere as they were loaded.
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
        self._prompts = prompts

    def prompts(self, instruction: tuple[str, ...]) -> Prompt:
        """Token ids and mask of B sentences."""
        return self._prompts.batch(instruction)

    @torch.no_grad()
    def act(self, obs: Observation, noise_BN: Tensor | None, temperature: float, top_k: int) -> ActionChunk:
        """Sample (noise uniform in [0, 1), one number per token) or, with noise None, take the likeliest bins.

        Log-probs are of the distribution sampled from; greedy ones are under temperature 1 without top-k.
        """
        logits_BNM, value_BJ = self._forward(obs, None)
        if noise_BN is None:
            token_BN = logits_BNM.argmax(-1)
            logp_BNM = log_distribution(logits_BNM, 1.0, 0)
        else:
            logp_BNM = log_distribution(logits_BNM, temperature, top_k)
            token_BN = sample(logp_BNM, noise_BN.to(self.device))
        return ActionChunk(self.codec.decode(token_BN), token_BN, token_logprob(logp_BNM, token_BN), value_BJ, self.policy_version)

    def evaluate(self, obs: Observation, token_BN: Tensor, temperature: float, top_k: int, feature_BPF: Tensor | None = None) -> Scores:
        """Score stored tokens, with gradient. feature_BPF: cached output of `module.encode_image`, where the towers are frozen."""
        logits_BNM, value_BJ = self._forward(obs, feature_BPF)
        logp_BNM = log_distribution(logits_BNM, temperature, top_k)
        return Scores(token_logprob(logp_BNM, token_BN.to(self.device)), entropy(logp_BNM), value_BJ)

    def logits(self, obs: Observation) -> Tensor:
        """Unnormalised log-probabilities of the bins, float32 (B, N, 256), with gradient; for cloning."""
        return self._forward(obs, None)[0]

    def _forward(self, obs: Observation, feature_BPF: Tensor | None) -> tuple[Tensor, Tensor]:
        prompt = self.prompts(obs.instruction)
        image = obs.image_BVHWC if feature_BPF is None else feature_BPF
        logits_BNM, value_BJ = self.module(image.to(self.device), prompt.ids_BL, prompt.mask_BL)
        return logits_BNM, value_BJ
