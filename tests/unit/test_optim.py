"""Owns: parameter groups, AdamW's arithmetic, the learning-rate schedule."""
from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from vlarl.learner.optim import build_optimizer, learning_rate_at, set_learning_rates


def _module() -> nn.Module:
    module = nn.Module()
    module.language_model = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    module.vision_backbone = nn.Linear(2, 2, dtype=torch.float64).requires_grad_(False)
    module.value_head = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    return module


def test_two_groups_of_trainable_parameters() -> None:
    module = _module()
    optimizer = build_optimizer(module, 1e-4, 1e-3, 1.0, (0.9, 0.95), 1e-5, 0.0)
    policy, value = optimizer.param_groups
    assert policy["params"] == [module.language_model.weight] and policy["lr"] == 1e-4
    assert value["params"] == [module.value_head.weight] and value["lr"] == 1e-3
    set_learning_rates(optimizer, 0.0, 5e-4)
    assert (policy["lr"], value["lr"]) == (0.0, 5e-4)


def test_vision_towers_learn_at_their_own_pace() -> None:
    module = _module()
    module.vision_backbone.requires_grad_(True)
    optimizer = build_optimizer(module, 1e-4, 1e-3, 0.25, (0.9, 0.95), 1e-5, 0.0)
    assert [(g["name"], g["lr"]) for g in optimizer.param_groups] == [("policy", 1e-4), ("vision", 0.25e-4), ("value", 1e-3)]
    set_learning_rates(optimizer, 2e-4, 5e-4)
    assert [g["lr"] for g in optimizer.param_groups] == [2e-4, 0.5e-4, 5e-4]


def test_a_module_without_value_head_has_one_group() -> None:
    module = _module()
    del module.value_head
    optimizer = build_optimizer(module, 1e-4, 1e-3, 1.0, (0.9, 0.95), 1e-5, 0.0)
    set_learning_rates(optimizer, 2e-4, 1.0)
    assert [(g["name"], g["lr"]) for g in optimizer.param_groups] == [("policy", 2e-4)]


def test_steps_are_adamw_and_parameters_without_gradient_wait() -> None:
    """m = (1-b1) sum b1^k g, v alike with g^2, both bias-corrected; p <- p (1 - lr wd) - lr m / (sqrt(v) + eps)."""
    module = _module()
    lr, (b1, b2), eps, decay = 0.1, (0.9, 0.95), 1e-5, 0.01
    optimizer = build_optimizer(module, lr, lr, 1.0, (b1, b2), eps, decay)
    weight, value = module.language_model.weight, module.value_head.weight
    with torch.no_grad():
        weight.copy_(torch.tensor([[1.0, -2.0]]))
        value.copy_(torch.tensor([[1.0, 1.0]]))
    gradients = [0.5, -0.25]
    p, m, v = 1.0, 0.0, 0.0
    for t, g in enumerate(gradients, start=1):
        weight.grad = torch.full_like(weight, g)
        optimizer.step()
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        p = p * (1 - lr * decay) - lr * (m / (1 - b1**t)) / (math.sqrt(v / (1 - b2**t)) + eps)
    assert weight[0, 0].item() == pytest.approx(p, abs=1e-12)
    assert value.tolist() == [[1.0, 1.0]]
    value.grad = torch.ones_like(value)
    optimizer.step()  # its first step is bias-corrected as a first step: lr * 1 / (1 + eps) after decay
    assert value[0, 0].item() == pytest.approx(1.0 * (1 - lr * decay) - lr / (1 + eps), abs=1e-12)


def test_schedule_by_hand() -> None:
    def rates(start: int, warmup: int, updates: int, decay: bool) -> list[float]:
        return [learning_rate_at(u, 1.0, start, warmup, updates, decay) for u in range(updates)]

    assert rates(start=0, warmup=0, updates=3, decay=False) == [1.0, 1.0, 1.0]
    assert rates(start=2, warmup=4, updates=7, decay=False) == [0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates(start=0, warmup=1, updates=4, decay=True) == pytest.approx([1.0, 0.7, 0.4, 0.1])
    assert rates(start=1, warmup=2, updates=4, decay=True) == pytest.approx([0.0, 0.5, 0.55, 0.1])
    assert learning_rate_at(9, 2.0, 0, 0, 4, True) == pytest.approx(0.2), "past the end it stays at a tenth"
    assert learning_rate_at(0, 1.0, 0, 0, 1, True) == 1.0
