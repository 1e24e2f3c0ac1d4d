"""Checks of a loaded policy: a good one passes, and each fault that they are for is caught."""
from __future__ import annotations

import pytest
import torch

from vlarl.errors import CheckpointError
from vlarl.policies.base import VLAPolicy
from vlarl.policies.checkpoint import load_policy
from vlarl.policies.probe import action_range, check_policy


@pytest.fixture
def policy() -> VLAPolicy:
    return load_policy("bundled:tiny-sft")


def test_a_good_policy_passes_in_every_precision_and_draws_nothing(policy: VLAPolicy) -> None:
    before = torch.get_rng_state()
    check_policy(policy, torch.float32)
    check_policy(load_policy("scratch:tiny", dtype=torch.float64), torch.float64)
    check_policy(load_policy("bundled:tiny-sft", dtype=torch.bfloat16), torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_blind_policy_is_refused(policy: VLAPolicy) -> None:
    torch.nn.init.zeros_(policy.module.projector.fc2.weight)
    with pytest.raises(CheckpointError, match="a black and a white frame give the same actions"):
        check_policy(policy, torch.float32)


def test_damaged_numbers_are_refused(policy: VLAPolicy) -> None:
    policy.module.language_model.lm_head.weight.data[-80, 0] = float("nan")
    with pytest.raises(CheckpointError, match="not finite"):
        check_policy(policy, torch.float32)


def test_padding_that_leaks_is_refused(policy: VLAPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pads that are attended to: a batch of prompts of unequal length gives other actions than its rows."""
    real = policy.prompts

    def leaking(instruction: tuple[str, ...], multiple: int) -> object:
        prompt = real(instruction, multiple)
        return type(prompt)(prompt.ids_BL, None)

    monkeypatch.setattr(policy, "prompts", leaking)
    with pytest.raises(CheckpointError, match="a batch of 3 and the same rows one by one differ"):
        check_policy(policy, torch.float32)


def test_the_statistics_in_use_are_told(policy: VLAPolicy) -> None:
    assert action_range(policy) == "actions un-normalised with tabletop: " + ", ".join(["-1..1"] * 7)
