"""Owns what simulators on SAPIEN share about drawing: a ready BRDF table for its cameras, and what is said where nothing can draw.

SAPIEN computes a 512 x 512 table on its "GPU" before the first picture of a process: 7 to 15 s where Mesa's lavapipe plays the GPU. Given a
table it takes that one. Ours has 64 x 64 entries; pictures are the same, byte for byte. Python 3.8 grammar, numpy.
"""
from __future__ import annotations

import os
from typing import Any

import numpy as np

from vlarl.errors import MachineError

SIZE = 64
SAMPLES = 256
FORMAT = "R32G32B32A32Sfloat"
MESA = "Without a GPU it needs Mesa 25 or newer: `vlarl envs install SIMULATOR` says how; or set VK_ICD_FILENAMES to its lvp_icd.json."


def brdf_table(size: int, samples: int) -> np.ndarray:
    """Split-sum GGX table (Karis, "Real Shading in Unreal Engine 4", 2013): float32 (size, size, 4), first axis dot(normal, view), second
    roughness; channels: scale and bias of the specular colour, two unused. Hammersley points instead of random ones."""
    middle = (np.arange(size) + 0.5) / size
    azimuth = 2 * np.pi * np.arange(samples) / samples
    height = _radical_inverse(samples)
    n_dot_v = middle[:, None]
    view = np.stack([np.sqrt(1 - middle**2), np.zeros(size), middle], -1)
    table = np.zeros((size, size, 4), np.float32)
    for column, roughness in enumerate(middle):
        alpha = roughness**2
        cos = np.sqrt((1 - height) / (1 + (alpha**2 - 1) * height))
        sin = np.sqrt(1 - cos**2)
        half = np.stack([sin * np.cos(azimuth), sin * np.sin(azimuth), cos], -1)
        v_dot_h = view @ half.T
        n_dot_l = np.maximum(2 * v_dot_h * cos - n_dot_v, 0)
        v_dot_h = np.maximum(v_dot_h, 0)
        k = alpha / 2  # of Smith's shadowing for light from an environment
        shadowing = n_dot_l * n_dot_v / ((n_dot_v * (1 - k) + k) * (n_dot_l * (1 - k) + k))
        weight = np.where(n_dot_l > 0, shadowing * v_dot_h / (np.maximum(cos, 1e-6) * n_dot_v), 0)
        fresnel = (1 - v_dot_h) ** 5
        table[:, column, 0] = (weight * (1 - fresnel)).mean(1)
        table[:, column, 1] = (weight * fresnel).mean(1)
    return table


def _radical_inverse(count: int) -> np.ndarray:
    """Van der Corput's sequence in base 2, float64 (count,)."""
    number, value, digit = np.arange(count), np.zeros(count), 0.5
    while number.any():
        value += digit * (number & 1)
        number, digit = number >> 1, digit / 2
    return value


def install_brdf_table() -> None:
    """From now on every camera of this process gets the table before its first picture. Once is enough; more do no harm."""
    import sapien.render

    camera_class = sapien.render.RenderCameraComponent
    take_picture = camera_class.take_picture
    if getattr(take_picture, "with_ready_table", False):
        return
    ready: set[int] = set()
    texture: Any = None

    def with_table(camera: Any) -> None:
        nonlocal texture
        if id(camera) not in ready:
            if texture is None:
                texture = sapien.render.RenderTexture(brdf_table(SIZE, SAMPLES), 2, FORMAT, address_mode="edge")
            camera.set_texture("BRDFLUT", texture)
            ready.add(id(camera))
        take_picture(camera)

    with_table.with_ready_table = True  # type: ignore[attr-defined]
    camera_class.take_picture = with_table


def has_gpu() -> bool:
    """Whether SAPIEN can draw on an NVIDIA GPU, told without its libraries."""
    return os.path.exists("/dev/nvidia0")


def no_renderer(error: RuntimeError) -> MachineError | None:
    """What to tell the user where `error`, raised by SAPIEN, says that nothing can draw here; None where it says something else."""
    said = str(error)
    if any(words in said for words in ("rendering device", "physical device", "Vulkan", "vk::")):
        return MachineError("SAPIEN finds nothing to render with: {}.".format(said.strip().rstrip(".")), MESA)
    return None
