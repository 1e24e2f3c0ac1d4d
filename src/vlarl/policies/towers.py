"""Owns the shapes of the vision towers: one literal table keyed by timm id, which a checkpoint's config.json may extend. Stdlib only."""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from vlarl.errors import CheckpointError


@dataclass(frozen=True)
class TowerShape:
    """One vision transformer, in timm's conventions.

    patch: pixels. width, depth, heads, mlp: of the transformer (mlp: hidden units). class_token, registers: prefix tokens, which have no
    slot in the position table. layer_scale: DINOv2's per-channel gains. attention_pool: SigLIP's pooling head (present in
    checkpoints, never used). mean, std: RGB normalisation. dead_weights: whether the checkpoint stores what the features do
    not need (last block, final norm, pooling head); published ones do and exports must keep it.
    """

    patch: int
    width: int
    depth: int
    heads: int
    mlp: int
    class_token: bool
    registers: int
    layer_scale: bool
    attention_pool: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    dead_weights: bool = True

    @property
    def layers_used(self) -> int:
        """Features are those after block depth - 2 (timm's get_intermediate_layers with n = {depth - 2})."""
        return self.depth - 1

    @property
    def layers_built(self) -> int:
        return self.depth if self.dead_weights else self.layers_used

    @property
    def prefix(self) -> int:
        return int(self.class_token) + self.registers

    def patches(self, image_size: int) -> int:
        return (image_size // self.patch) ** 2

    def parameters(self, image_size: int) -> int:
        """Number of stored parameters."""
        w, m = self.width, self.mlp
        block = 2 * 2 * w + (w * 3 * w + 3 * w) + (w * w + w) + (w * m + m) + (m * w + w) + (2 * w if self.layer_scale else 0)
        stem = self.prefix * w + self.patches(image_size) * w + 3 * self.patch**2 * w + w
        head = 2 * w if self.dead_weights else 0
        if self.dead_weights and self.attention_pool:
            head += w + (w * w + w) + (w * 2 * w + 2 * w) + (w * w + w) + 2 * w + (w * m + m) + (m * w + w)
        return stem + self.layers_built * block + head


_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def _dinov2(patch: int, width: int, depth: int, heads: int, mlp: int, registers: int, dead_weights: bool = True) -> TowerShape:
    return TowerShape(patch, width, depth, heads, mlp, True, registers, True, False, **_IMAGENET, dead_weights=dead_weights)


def _siglip(patch: int, width: int, depth: int, heads: int, mlp: int, dead_weights: bool = True) -> TowerShape:
    return TowerShape(patch, width, depth, heads, mlp, False, 0, False, True, **_HALF, dead_weights=dead_weights)


TOWERS: dict[str, TowerShape] = {
    "vit_large_patch14_reg4_dinov2.lvd142m": _dinov2(14, 1024, 24, 16, 4096, 4),
    "vit_so400m_patch14_siglip_224": _siglip(14, 1152, 27, 16, 4304),
    # A small random checkpoint that tests hold against the original implementation.
    "tiny_vit_patch14_reg4_dinov2": _dinov2(14, 32, 4, 2, 128, 4),
    "tiny_vit_patch14_siglip_224": _siglip(14, 48, 3, 3, 144),
    # The shipped tiny policy.
    "vlarl_tiny_patch16_dinov2_64": _dinov2(16, 96, 3, 4, 192, 0, dead_weights=False),
    "vlarl_tiny_patch16_siglip_64": _siglip(16, 96, 3, 4, 192, dead_weights=False),
}


COUNTS = {"patch": 1, "width": 1, "depth": 2, "heads": 1, "mlp": 1, "registers": 0}  # whole numbers, and the least that make a tower
SWITCHES = ("class_token", "layer_scale", "attention_pool", "dead_weights")
COLOURS = ("mean", "std")


def tower_shape(timm_id: str, own: Mapping[str, Any] | None = None) -> TowerShape:
    """own: shapes that a checkpoint's config.json describes, by id; they come before the table's. CheckpointError names the known ids."""
    if own and timm_id in own:
        return _read_shape(timm_id, own[timm_id])
    if timm_id not in TOWERS:
        message = f"config.json: timm_model_ids names the vision tower {timm_id!r}, which is not known."
        hint = f'Known: {", ".join(TOWERS)}. Others are described under "vlarl": {{"towers": {{"{timm_id}": {{...}}}}}}.'
        raise CheckpointError(message, hint)
    return TOWERS[timm_id]


def _read_shape(timm_id: str, values: object) -> TowerShape:
    """A shape as config.json describes it: every field of TowerShape, dead_weights apart, which it may leave out."""
    where, names = f'config.json: the vision tower {timm_id!r} under "vlarl": "towers"', [field.name for field in fields(TowerShape)]
    if not isinstance(values, dict):
        raise CheckpointError(f"{where} is {values!r}, expected an object.", f"It holds {', '.join(names)}.")
    values = {"dead_weights": True, **values}
    differing = sorted(set(names) ^ set(values))
    if differing:
        raise CheckpointError(f"{where} must hold exactly {', '.join(names)}; differs in {', '.join(differing)}.")
    for name, value in values.items():
        expected = _expected(name, value)
        if expected:
            raise CheckpointError(f"{where}: {name} is {value!r}, expected {expected}.")
    if values["width"] % values["heads"]:
        raise CheckpointError(f"{where}: heads is {values['heads']}, which does not divide its width {values['width']}.")
    colours = {name: tuple(values[name]) for name in COLOURS}
    return TowerShape(**(values | colours))


def _expected(name: str, value: object) -> str:
    """What a field should be; empty where it is."""
    if name in SWITCHES:
        return "" if isinstance(value, bool) else "true or false"
    if name in COUNTS:
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= COUNTS[name]
        return "" if fits else f"a whole number of at least {COUNTS[name]}"
    least = 0.0 if name == "std" else -math.inf
    fits = isinstance(value, list) and len(value) == 3 and all(type(x) in (int, float) and x > least for x in value)
    return "" if fits else f"three {'positive ' if name == 'std' else ''}numbers, of red, green and blue"
