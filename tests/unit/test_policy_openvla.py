"""Native OpenVLA: step by step with a KV cache against one teacher-forced pass."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vlarl.policies.base import VLAPolicy
from vlarl.policies.checkpoint import load_policy
from vlarl.policies.layout import read_policy_spec
from vlarl.policies.sampling import Draw
from vlarl.types import Observation

SENTENCES = ("put the red cube on the green plate", "push the blue cube left", "touch the yellow cube", "touch the red cube")


def observation(batch: int, sentences: tuple[str, ...] = SENTENCES) -> Observation:
    image = torch.randint(0, 256, (batch, 1, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    return Observation(image, torch.zeros(batch, 8), tuple(sentences[i % len(sentences)] for i in range(batch)))


def noise(batch: int) -> Tensor:
    return torch.rand(batch, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def policy() -> VLAPolicy:
    policy = load_policy("scratch:tiny-openvla", seed=1)
    torch.nn.init.normal_(policy.module.value_head.mlp[4].weight)
    return policy


@pytest.mark.parametrize("sentences", [SENTENCES, SENTENCES[:1]], ids=["padded", "even"])
@pytest.mark.parametrize("batch", [1, 4, 64])
def test_act_and_evaluate_agree(policy: VLAPolicy, batch: int, sentences: tuple[str, ...]) -> None:
    obs = observation(batch, sentences)
    for temperature, top_k in ((1.0, 0), (1.6, 50)):
        chunk = policy.act(obs, noise(batch), temperature, top_k)
        scores = policy.evaluate(obs, chunk.token_BN, temperature, top_k)
        assert (chunk.logprob_BN - scores.logprob_BN).abs().max() < 1e-5
        assert (chunk.value_BJ - scores.value_BJ).abs().max() < 1e-5
    assert chunk.action_BKA.shape == (batch, 1, 7)
    assert chunk.token_BN.shape == (batch, 7)


def test_greedy_takes_the_likeliest_bin_given_the_ones_before(policy: VLAPolicy) -> None:
    obs = observation(4)
    chunk = policy.act(obs, None, 0.3, 5)
    with torch.no_grad():
        assert torch.equal(policy.logits(obs, chunk.token_BN).argmax(-1), chunk.token_BN)
        assert (policy.evaluate(obs, chunk.token_BN, 1.0, 0).logprob_BN - chunk.logprob_BN).abs().max() < 1e-5


def test_a_row_does_not_depend_on_padding_or_batch_mates() -> None:
    policy = load_policy("scratch:tiny-openvla", seed=1, dtype=torch.float64)
    torch.nn.init.normal_(policy.module.value_head.mlp[4].weight)
    obs = observation(8)
    together = policy.act(obs, noise(8), 1.0, 0)
    for i in range(8):  # alone, a row has no padding and takes the path without a mask
        alone = policy.act(obs.select(torch.tensor([i])), noise(8)[i : i + 1], 1.0, 0)
        assert torch.equal(alone.token_BN[0], together.token_BN[i])
        assert (alone.logprob_BN[0] - together.logprob_BN[i]).abs().max() < 1e-12
        assert (alone.value_BJ[0] - together.value_BJ[i]).abs().max() < 1e-12


@torch.no_grad()
def test_a_token_changes_what_follows_and_nothing_before(policy: VLAPolicy) -> None:
    obs, token = observation(4), torch.full((4, 7), 100)
    before = policy.logits(obs, token)
    token[:, 3] = 7
    change = (policy.logits(obs, token) - before).abs().amax((0, 2))
    assert change[:4].max() < 1e-5
    assert change[4:].min() > 1e-3


@torch.no_grad()
def test_each_step_looks_at_one_new_position(policy: VLAPolicy) -> None:
    obs, asked, draw = observation(4), list[tuple[int, ...]](), Draw(None, 1.0, 0)
    lengths = list[int]()
    hook = policy.module.language_model.model.layers[0].register_forward_pre_hook(lambda _, x: lengths.append(x[0].shape[1]))

    def choose(logits: Tensor) -> Tensor:
        asked.append(tuple(logits.shape))
        return draw(logits)

    prompt = policy.prompts(obs.instruction)
    logits, _ = policy.module(obs.image_BVHWC, prompt.ids_BL, prompt.mask_BL, token=choose)
    hook.remove()
    assert asked == [(4, 1, 256)] * 7
    assert lengths == [16 + prompt.ids_BL.shape[1], *[1] * 6]
    assert (logits - policy.logits(obs, draw.result()[0])).abs().max() < 1e-4


def test_every_weight_learns_but_the_rows_of_unused_tokens() -> None:
    policy = load_policy("scratch:tiny-openvla", seed=1)
    torch.nn.init.normal_(policy.module.value_head.mlp[4].weight)
    scores = policy.evaluate(observation(4), torch.full((4, 7), 9), 1.0, 0)
    (scores.logprob_BN.sum() + scores.value_BJ.sum()).backward()
    assert [n for n, p in policy.module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    embedding = policy.module.language_model.model.embed_tokens.weight.grad
    assert embedding[704 + 9].abs().sum() > 0
    assert embedding[704 + 10].abs().sum() == 0


def test_spec(policy: VLAPolicy) -> None:
    spec = read_policy_spec("scratch:tiny-openvla")
    assert spec == policy.spec
    assert (spec.kind, spec.chunk, spec.action_dim, spec.head, spec.kv_cache) == ("openvla", 1, 7, "tokens", True)
    assert spec.parameters == sum(p.numel() for n, p in policy.module.named_parameters() if not n.startswith("value_head."))
