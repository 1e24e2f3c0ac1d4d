"""Owns OpenVLA: the module that both families train, its parts, and OpenVLA's own decoding, token after token with a KV cache.

Key names as published. Sequence: [BOS][patches of every view][state, if any][pads][rest of the prompt], then what the family appends.
Legend: B batch, V views, P patches, L prompt tokens, S positions, D hidden width, N action tokens, M action bins (256), J values per chunk.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaModel

from vlarl.errors import CheckpointError
from vlarl.policies.base import Choose, PolicyModule
from vlarl.policies.layout import OpenVLAConfig
from vlarl.policies.pixels import fit_frames
from vlarl.policies.vision import VisionBackbone

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


class ProprioProjector(nn.Module):
    """Normalised state (B,D) -> one token of Llama's embedding space (B,1,D)."""

    def __init__(self, state_dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(state_dim, hidden)
        self.fc2 = nn.Linear(hidden, hidden)

    def forward(self, state_BD: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(state_BD)))[:, None]


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


@dataclass(frozen=True)
class Prefix:
    """What every answer is conditioned on. embedding_BSD: ends with the last prompt token. mask_BS bool, False at pads; None: no pads."""

    embedding_BSD: Tensor
    mask_BS: Tensor | None


# (module, prefix, tokens to score or a chooser) -> what predicts the chunk, values (B,J)
Decode = Callable[["OpenVLA", Prefix, "Tensor | Choose | None"], tuple[Tensor, Tensor]]


class OpenVLA(PolicyModule):
    """Towers, projector, Llama and value head, and a family's way to decode."""

    action_head: nn.Module  # where the family has one besides the action tokens

    def __init__(self, config: OpenVLAConfig, value_outputs: int, decode: Decode) -> None:
        super().__init__()
        shapes = config.shapes
        self.config = config
        self.num_tokens = config.chunk * config.action_dim
        self.vision_backbone = VisionBackbone(shapes, config.image_sizes)
        self.language_model = build_language_model(config)
        self.hidden_size = self.language_model.config.hidden_size
        self.projector = Projector(self.vision_backbone.width, self.hidden_size, len(shapes) == 2)
        self.value_head = ValueHead(self.hidden_size, value_outputs)
        if config.proprio_dim:
            self.proprio_projector = ProprioProjector(config.proprio_dim, self.hidden_size)
        self._decode = decode

    def fsdp_units(self) -> list[nn.Module]:
        """See PolicyModule."""
        vision = [block for tower in self.vision_backbone.towers for block in tower.blocks]
        return [*vision, *self.language_model.model.layers]

    def encode_image(self, image_BVHWC: Tensor) -> Tensor:
        """See PolicyModule."""
        batch, views = image_BVHWC.shape[:2]
        config = self.config
        frames = fit_frames(image_BVHWC.flatten(0, 1), config.image_sizes[0], config.resize, config.crop, config.resize_strategy)
        feature = self.vision_backbone(self.vision_backbone.normalize(frames))
        return feature.reshape(batch, views * feature.shape[1], -1)

    def forward(
        self,
        image: Tensor,
        input_ids_BL: Tensor,
        mask_BL: Tensor | None = None,
        state_BD: Tensor | None = None,
        token: Tensor | Choose | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See PolicyModule."""
        feature = image if image.is_floating_point() else self.encode_image(image)
        prompt_BLD = self.language_model.get_input_embeddings()(input_ids_BL)
        extra = [self.projector(feature)]
        if self.config.proprio_dim:
            assert state_BD is not None, "this policy reads a state"
            extra.append(self.proprio_projector(state_BD.to(prompt_BLD.dtype)))
        embedding_BSD = torch.cat([prompt_BLD[:, :1], *extra, prompt_BLD[:, 1:]], dim=1)
        mask_BS = None
        if mask_BL is not None:
            inserted = embedding_BSD.shape[1] - mask_BL.shape[1]
            mask_BS = torch.cat([mask_BL[:, :1].expand(-1, 1 + inserted), mask_BL[:, 1:]], dim=1)
        return self._decode(self, Prefix(embedding_BSD, mask_BS), token)

    def read_tokens(self, hidden_BND: Tensor) -> Tensor:
        """Logits of the action tokens (B,N,M)."""
        low = self.config.action_low
        return full_precision(action_logits(self.language_model.lm_head, hidden_BND, low, low + self.config.action_bins))

    def read_value(self, hidden_BD: Tensor) -> Tensor:
        """Values (B,J) from the hidden state that predicts the first action token."""
        return full_precision(self.value_head(hidden_BD))


def build_openvla(config: OpenVLAConfig, value_outputs: int) -> OpenVLA:
    """Native OpenVLA: one action of N tokens, each conditioned on those before it."""
    return OpenVLA(config, value_outputs, decode_causally)


def decode_causally(module: OpenVLA, prefix: Prefix, token: Tensor | Choose | None) -> tuple[Tensor, Tensor]:
    """Score given tokens in one pass, or choose them one by one: a prefill, then a step of one position for each token but the last."""
    assert token is not None, "OpenVLA conditions each token on those before it"
    llama, embed = module.language_model.model, module.language_model.get_input_embeddings()
    low, tokens, length = module.config.action_low, module.num_tokens, prefix.embedding_BSD.shape[1]
    total = length + tokens - 1
    position_BS, seen_BS = _positions(prefix, total)
    if isinstance(token, Tensor):
        embedding_BSD = torch.cat([prefix.embedding_BSD, embed(token[:, :-1] + low)], dim=1)
        hidden_BND = run_layers(llama, embedding_BSD, position_BS, _causal(seen_BS), causal=True)[:, length - 1 :]
        return module.read_tokens(hidden_BND), module.read_value(hidden_BND[:, 0])
    cache = [KeyValues(total) for _ in llama.layers]
    prefill = None if seen_BS is None else _causal(seen_BS[:, :length])
    hidden_B1D = run_layers(llama, prefix.embedding_BSD, position_BS[:, :length], prefill, causal=True, cache=cache)[:, -1:]
    value_BJ = module.read_value(hidden_B1D[:, 0])
    logits = [module.read_tokens(hidden_B1D)]
    for t in range(length, total):
        chosen_B1D = embed(token(logits[-1]) + low)
        seen = None if seen_BS is None else seen_BS[:, None, None, : t + 1]
        hidden_B1D = run_layers(llama, chosen_B1D, position_BS[:, t : t + 1], seen, causal=False, cache=cache)
        logits.append(module.read_tokens(hidden_B1D))
    token(logits[-1])
    return torch.cat(logits, dim=1), value_BJ


def _positions(prefix: Prefix, total: int) -> tuple[Tensor, Tensor | None]:
    """Position ids (1 or B, total) and, where something is padded, which of the positions may be seen, bool (B, total)."""
    if prefix.mask_BS is None:
        return torch.arange(total, device=prefix.embedding_BSD.device)[None], None
    answer = total - prefix.mask_BS.shape[1]
    seen_BS = torch.cat([prefix.mask_BS, prefix.mask_BS.new_ones(len(prefix.mask_BS), answer)], dim=1)
    return seen_BS.long().cumsum(1) - 1, seen_BS


def _causal(seen_BS: Tensor | None) -> Tensor | None:
    """(B,1,S,S): every position sees those before it and itself, but no pads."""
    if seen_BS is None:
        return None
    length = seen_BS.shape[1]
    return seen_BS.new_ones(length, length).tril() & seen_BS[:, None, None, :]


class KeyValues:
    """Keys and values of one layer, allocated once for `length` positions. Its attention calls `update`.

    How far it is filled is a Python number, so nothing waits for the device, and a pass over whole prompts keeps the fast kernels. One
    for each layer, and not one for all, because layers that differ in nothing but their weights share compiled code.
    """

    def __init__(self, length: int) -> None:
        self._length, self._filled = length, 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def update(self, key_BHSD: Tensor, value_BHSD: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        """Append S positions; returns everything up to them."""
        start, end = self._filled, self._filled + key_BHSD.shape[2]
        if self._keys is None or self._values is None:
            batch, heads, _positions, width = key_BHSD.shape
            self._keys = key_BHSD.new_empty(batch, heads, self._length, width)
            self._values = torch.empty_like(self._keys)
        self._keys[:, :, start:end], self._values[:, :, start:end] = key_BHSD, value_BHSD
        self._filled = end
        return (key_BHSD, value_BHSD) if start == 0 else (self._keys[:, :, :end], self._values[:, :, :end])


def run_layers(
    llama: LlamaModel, x_BSD: Tensor, position_BS: Tensor, seen: Tensor | None, causal: bool, cache: Sequence[KeyValues] | None = None
) -> Tensor:
    """Hidden states after the final norm (B,S,D).

    seen: bool (B,1,S,keys); None: the fast kernels, every position sees those up to itself (causal) or all. The layers are called
    directly: the model's own forward would derive a mask once more, and look at the positions on the host to do so.
    """
    rotary = llama.rotary_emb(x_BSD, position_ids=position_BS)
    for i, layer in enumerate(llama.layers):
        own = None if cache is None else cache[i]
        x_BSD = layer(x_BSD, attention_mask=seen, position_embeddings=rotary, past_key_values=own, is_causal=causal)
    return llama.norm(x_BSD)


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
