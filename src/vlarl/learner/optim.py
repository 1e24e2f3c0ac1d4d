"""Owns the optimiser: AdamW over three parameter groups (policy, vision, value), and the learning-rate schedule as a pure function."""
from __future__ import annotations

import torch
from torch import nn

VALUE_PREFIX, VISION_PREFIX = "value_head.", "vision_backbone."


def build_optimizer(
    module: nn.Module,
    learning_rate: float,
    value_learning_rate: float,
    vision_scale: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, 2019) over the trainable parameters: groups `value` (`value_head.*`), `vision`
    (`vision_backbone.*`, at `vision_scale` times the policy's rate) and `policy` (the rest).

    A group without trainable parameters is left out. Call after sharding. Moments exist from the start (zeros), so memory
    is claimed at once and a checkpoint always has the same entries.
    """
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    parts: dict[str, list[nn.Parameter]] = {"policy": [], "vision": [], "value": []}
    for name, p in trainable:
        parts["value" if name.startswith(VALUE_PREFIX) else "vision" if name.startswith(VISION_PREFIX) else "policy"].append(p)
    rates = {"policy": (learning_rate, 1.0), "vision": (learning_rate, vision_scale), "value": (value_learning_rate, 1.0)}
    groups = [{"name": n, "lr": rates[n][0] * rates[n][1], "scale": rates[n][1], "params": parts[n]} for n in parts if parts[n]]
    optimizer = torch.optim.AdamW(groups, betas=betas, eps=eps, weight_decay=weight_decay, foreach=True)
    for _, p in trainable:
        # A parameter that has had no gradient yet (value head under GRPO, trunk during the critic's warm-up) starts at step 0.
        optimizer.state[p] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def build_cloning_optimizers(module: nn.Module, learning_rate: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """For behaviour cloning of an unsharded module: Muon (Jordan et al., 2024) for the hidden layers' matrices, AdamW for everything else.

    Muon's steps are scaled to AdamW's size, so that one learning rate serves both. The value head is left out: nothing trains it here.
    """
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad and not name.startswith(VALUE_PREFIX)}
    hidden = {name: p for name, p in trainable.items() if p.ndim == 2 and "embed" not in name and "lm_head" not in name}
    rest = [p for name, p in trainable.items() if name not in hidden]
    optimizers: list[torch.optim.Optimizer] = []
    if hidden:
        muon = torch.optim.Muon(list(hidden.values()), lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        optimizers.append(muon)
    if rest:
        optimizers.append(torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.95), weight_decay=weight_decay, foreach=True))
    return optimizers


def learning_rate_at(update: int, base: float, start: int, warmup: int, updates: int, decay: bool) -> float:
    """Learning rate of update `update` (from 0).

    0 before `start` (the critic's warm-up); then a linear rise to `base`, reached on the `warmup`-th update (at once for warmup 0 or 1);
    with `decay`, times a line from 1 at `start` to 0.1 at the last update, `updates` - 1.
    """
    if update < start:
        return 0.0
    age = update - start
    rate = base * min(1.0, (age + 1) / max(warmup, 1))
    if decay:
        rate *= 1.0 - 0.9 * min(1.0, age / max(updates - 1 - start, 1))
    return rate


def set_learning_rates(optimizer: torch.optim.Optimizer, policy: float, value: float) -> None:
    """Set the rates of all groups; the vision towers' is the policy's times their scale."""
    rates = {"policy": policy, "vision": policy, "value": value}
    for group in optimizer.param_groups:
        group["lr"] = rates[group["name"]] * group["scale"]
