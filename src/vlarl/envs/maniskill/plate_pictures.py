"""Owns the pictures of the plate suite: robot and things pasted onto photographs, textures blended in. Batched tensors, no simulator.

Legend: B scenes, H W pixels, C = 3. Colours run from 0 to 255.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def paste(rgb_BHWC: Tensor, foreground_BHW: Tensor, photo_BHWC: Tensor) -> Tensor:
    """The foreground of `rgb`, the photograph elsewhere. float32."""
    return torch.where(foreground_BHW[..., None], rgb_BHWC.float(), photo_BHWC.float())


def blend_foreground(picture_BHWC: Tensor, foreground_BHW: Tensor, texture_BHWC: Tensor, weight_B: Tensor) -> Tensor:
    """Blend a texture into robot and things: it is stretched over the smallest box around them. float32.

    As published; there the stretching followed the largest box of the batch, so that a scene depended on its neighbours. Here it does not.
    """
    height, width = foreground_BHW.shape[1:]
    left, right, top, bottom = box(foreground_BHW)
    x = (torch.arange(width, device=left.device) - left[:, None] + 0.5) / (right - left + 1)[:, None] * 2 - 1
    y = (torch.arange(height, device=left.device) - top[:, None] + 0.5) / (bottom - top + 1)[:, None] * 2 - 1
    grid = torch.stack([x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], -1)
    source = texture_BHWC.permute(0, 3, 1, 2).float()
    stretched = F.grid_sample(source, grid, mode="bilinear", padding_mode="border", align_corners=False).permute(0, 2, 3, 1)
    weight = torch.where(foreground_BHW, weight_B[:, None, None], 0.0)[..., None]
    return picture_BHWC * (1 - weight) + stretched * weight


def blend_whole(picture_BHWC: Tensor, foreground_BHW: Tensor, texture_BHWC: Tensor, weight_B: Tensor) -> Tensor:
    """Blend a window of a texture twice as large into the whole frame; it moves with the middle of robot and things. float32."""
    height, width = foreground_BHW.shape[1:]
    left, right, top, bottom = box(foreground_BHW)
    x = ((left + right) // 2).clamp(1, width - 1)[:, None] + torch.arange(width, device=left.device)
    y = ((top + bottom) // 2).clamp(1, height - 1)[:, None] + torch.arange(height, device=left.device)
    scene = torch.arange(len(x), device=left.device)[:, None, None]
    window = texture_BHWC[scene, y[:, :, None], x[:, None, :]].float()
    weight = weight_B[:, None, None, None]
    return picture_BHWC * (1 - weight) + window * weight


def to_bytes(picture_BHWC: Tensor) -> Tensor:
    """uint8, cut off below the point, as published."""
    return picture_BHWC.clamp(0, 255).to(torch.uint8)


def box(mask_BHW: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First and last column, first and last row where a mask holds, int64 (B,) each; all 0 for an empty mask."""
    columns, rows = mask_BHW.any(1).byte(), mask_BHW.any(2).byte()
    some = mask_BHW.flatten(1).any(1)
    last_column = columns.shape[1] - 1 - columns.flip(1).argmax(1)
    last_row = rows.shape[1] - 1 - rows.flip(1).argmax(1)
    return columns.argmax(1), last_column * some, rows.argmax(1), last_row * some
