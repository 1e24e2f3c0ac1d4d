"""Owns OpenVLA-OFT as RL uses it: a chunk's action tokens decoded in parallel by one bidirectional forward pass.

Sequence: [BOS][patches of every view][pads][rest of the prompt][N zeroed placeholders][stop token, if the checkpoint had it].
The last prompt token predicts action token 0: the next-token shift is kept although attention sees everything.
Legend: B batch, V views, P patches of all views, L prompt tokens, S positions, N action tokens, M action bins (256), J values.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from vlarl.policies.base import PolicyModule
from vlarl.policies.layout import OpenVLAConfig
from vlarl.policies.openvla import Projector, ValueHead, action_logits, build_language_model, full_precision
from vlarl.policies.towers import tower_shape
from vlarl.policies.vision import VisionBackbone


class OpenVLAOFT(PolicyModule):
    """The module that is sharded, trained and saved. Parameter names are the published ones, plus `value_head.*`."""

    def __init__(self, config: OpenVLAConfig, value_outputs: int) -> None:
        super().__init__()
        shapes = tuple(tower_shape(name) for name in config.tower_ids)
        self.config = config
        self.num_tokens = config.chunk * config.action_dim
        self.vision_backbone = VisionBackbone(shapes, config.image_sizes)
        self.language_model = build_language_model(config)
        self.hidden_size = self.language_model.config.hidden_size
        self.projector = Projector(self.vision_backbone.width, self.hidden_size, len(shapes) == 2)
        self.value_head = ValueHead(self.hidden_size, value_outputs)

    def fsdp_units(self) -> list[nn.Module]:
        """The repeated blocks, for sharding and activation checkpointing."""
        vision = [block for tower in self.vision_backbone.towers for block in tower.blocks]
        return [*vision, *self.language_model.model.layers]

    def encode_image(self, image_BVHWC: Tensor) -> Tensor:
        """uint8 frames -> tower features (B, P, F), views one after another: what may be cached while the towers are frozen."""
        batch, views = image_BVHWC.shape[:2]
        feature = self.vision_backbone(self.vision_backbone.normalize(image_BVHWC.flatten(0, 1)))
        return feature.reshape(batch, views * feature.shape[1], -1)

    def forward(self, image: Tensor, input_ids_BL: Tensor, mask_BL: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The one scoring pass.

        image: uint8 frames (B,V,H,W,3), or tower features (B,P,F) from `encode_image`. input_ids_BL int64: BOS first; pads, if any,
        between BOS and text. mask_BL bool, False at pads; None: nothing is padded. Returns logits (B,N,M) and values (B,J), float32
        (float64 for a float64 model).
        """
        feature = image if image.is_floating_point() else self.encode_image(image)
        patch_BPD = self.projector(feature)
        prompt_BLD = self.language_model.get_input_embeddings()(input_ids_BL)
        batch, patches = patch_BPD.shape[:2]
        pieces = [prompt_BLD[:, :1], patch_BPD, prompt_BLD[:, 1:], prompt_BLD.new_zeros(batch, self.num_tokens, self.hidden_size)]
        if self.config.stop_token:
            stop = input_ids_BL.new_full((batch, 1), self.config.eos_id)
            pieces.append(self.language_model.get_input_embeddings()(stop))
        hidden_BSD = self._decode(torch.cat(pieces, dim=1), mask_BL, patches)
        start = patches + input_ids_BL.shape[1] - 1
        hidden_BND = hidden_BSD[:, start : start + self.num_tokens]
        low = self.config.action_low
        logits_BNM = action_logits(self.language_model.lm_head, hidden_BND, low, low + self.config.action_bins)
        return full_precision(logits_BNM), full_precision(self.value_head(hidden_BND[:, 0]))

    def _decode(self, embedding_BSD: Tensor, mask_BL: Tensor | None, patches: int) -> Tensor:
        """Final-norm hidden states; every position attends to every unpadded one. No padding: no mask, the fast kernels."""
        batch, length = embedding_BSD.shape[:2]
        if mask_BL is None:
            positions = torch.arange(length, device=embedding_BSD.device)[None]
            attention = None
        else:
            tail = length - patches - mask_BL.shape[1]
            mask_BS = torch.cat([mask_BL[:, :1].expand(-1, 1 + patches), mask_BL[:, 1:], mask_BL.new_ones(batch, tail)], dim=1)
            positions = mask_BS.long().cumsum(1) - 1
            attention = mask_BS[:, None, None, :].expand(batch, 1, length, length)
        return self.language_model.model(
            inputs_embeds=embedding_BSD, attention_mask=attention, position_ids=positions, is_causal=False, use_cache=False
        ).last_hidden_state
