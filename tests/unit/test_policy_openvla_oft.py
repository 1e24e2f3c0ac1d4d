"""The tiny VLA: act against evaluate, padding, batch mates, cached features, value head."""
from __future__ import annotations

import pytest
import torch

from vlarl.policies.base import VLAPolicy
from vlarl.policies.checkpoint import load_policy
from vlarl.policies.layout import read_policy_spec
from vlarl.recipe.schema import Lora
from vlarl.types import Observation

SENTENCES = ("put the red cube on the green plate", "push the blue cube left", "touch the yellow cube", "touch the red cube")


def observation(batch: int) -> Observation:
    image = torch.randint(0, 256, (batch, 1, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    return Observation(image, torch.zeros(batch, 8), tuple(SENTENCES[i % 4] for i in range(batch)))


def noise(batch: int) -> torch.Tensor:
    return torch.rand(batch, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def policy() -> VLAPolicy:
    return load_policy("scratch:tiny", seed=1)


@pytest.mark.parametrize("batch", [1, 4, 64])
@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (1.6, 50)])
def test_act_and_evaluate_agree(policy: VLAPolicy, batch: int, temperature: float, top_k: int) -> None:
    obs = observation(batch)
    chunk = policy.act(obs, noise(batch), temperature, top_k)
    scores = policy.evaluate(obs, chunk.token_BN, temperature, top_k)
    assert (chunk.logprob_BN - scores.logprob_BN).abs().max() < 1e-5
    assert torch.equal(chunk.value_BJ, scores.value_BJ)
    assert chunk.action_BKA.shape == (batch, 4, 7)
    assert chunk.action_BKA.dtype == torch.float32
    assert chunk.token_BN.dtype == torch.int64


def test_greedy_takes_the_likeliest_bin_and_reports_temperature_one(policy: VLAPolicy) -> None:
    obs = observation(4)
    chunk = policy.act(obs, None, 0.3, 5)
    scores = policy.evaluate(obs, chunk.token_BN, 1.0, 0)
    assert (chunk.logprob_BN - scores.logprob_BN).abs().max() < 1e-5
    other = policy.evaluate(obs, (chunk.token_BN + 1) % 256, 1.0, 0)
    assert (scores.logprob_BN >= other.logprob_BN).all()


def test_scores_do_not_depend_on_padding_or_batch_mates() -> None:
    policy = load_policy("scratch:tiny", seed=1, dtype=torch.float64)
    torch.nn.init.normal_(policy.module.value_head.mlp[4].weight)
    obs = observation(8)
    together = policy.act(obs, noise(8), 1.0, 0)
    for i in range(8):  # alone, a row has no padding and takes the path without a mask
        alone = policy.act(obs.select(torch.tensor([i])), noise(8)[i : i + 1], 1.0, 0)
        assert torch.equal(alone.token_BN[0], together.token_BN[i])
        assert (alone.logprob_BN[0] - together.logprob_BN[i]).abs().max() < 1e-12
        assert (alone.value_BJ[0] - together.value_BJ[i]).abs().max() < 1e-12


def test_image_and_instruction_matter(policy: VLAPolicy) -> None:
    obs = observation(1)
    base = policy.act(obs, noise(1), 1.0, 0).logprob_BN
    black = Observation(torch.zeros_like(obs.image_BVHWC), obs.state_BD, obs.instruction)
    other = Observation(obs.image_BVHWC, obs.state_BD, ("touch the red cube",))
    assert (policy.act(black, noise(1), 1.0, 0).logprob_BN - base).abs().max() > 1e-2
    assert (policy.act(other, noise(1), 1.0, 0).logprob_BN - base).abs().max() > 1e-2


def test_cached_features_score_the_same(policy: VLAPolicy) -> None:
    obs = observation(4)
    tokens = torch.zeros(4, 28, dtype=torch.int64)
    with torch.no_grad():
        feature = policy.module.encode_image(obs.image_BVHWC)
    assert feature.shape == (4, 16, 192)
    direct = policy.evaluate(obs, tokens, 1.0, 0)
    cached = policy.evaluate(obs, tokens, 1.0, 0, feature)
    assert torch.equal(direct.logprob_BN, cached.logprob_BN)


def test_two_views_put_their_patches_one_after_another(policy: VLAPolicy) -> None:
    image = torch.cat([observation(1).image_BVHWC, observation(2).image_BVHWC[1:]], dim=1)
    feature = policy.module.encode_image(image)
    assert feature.shape == (1, 32, 192)
    assert torch.allclose(feature[:, 16:], policy.module.encode_image(image[:, 1:]), atol=1e-5)


def test_every_weight_learns_but_the_rows_of_unused_tokens(policy: VLAPolicy) -> None:
    policy = load_policy("scratch:tiny", seed=1)
    torch.nn.init.normal_(policy.module.value_head.mlp[4].weight)
    scores = policy.evaluate(observation(4), torch.zeros(4, 28, dtype=torch.int64), 1.0, 0)
    (scores.logprob_BN.sum() + scores.value_BJ.sum()).backward()
    silent = [n for n, p in policy.module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []
    head = policy.module.language_model.lm_head.weight.grad
    assert head[704:960].abs().sum() > 0
    assert head[:704].abs().sum() == 0 == head[960:].abs().sum()


def test_value_outputs_and_first_values() -> None:
    assert load_policy("scratch:tiny", value="action").act(observation(2), noise(2), 1.0, 0).value_BJ.tolist() == [[0.0] * 4] * 2
    assert load_policy("scratch:tiny", value="chunk").act(observation(2), noise(2), 1.0, 0).value_BJ.tolist() == [[0.0], [0.0]]


def test_spec_and_parameter_count(policy: VLAPolicy) -> None:
    spec = read_policy_spec("scratch:tiny")
    assert spec == policy.spec
    assert (spec.chunk, spec.action_dim, spec.views, spec.image_size, spec.unnorm_key) == (4, 7, 1, 64, "tabletop")
    assert spec.parameters == sum(p.numel() for n, p in policy.module.named_parameters() if not n.startswith("value_head."))


def test_the_seed_fixes_the_weights_in_every_dtype() -> None:
    one, two = load_policy("scratch:tiny", seed=5), load_policy("scratch:tiny", seed=5, dtype=torch.float64)
    other = load_policy("scratch:tiny", seed=6)
    for (name, a), b in zip(one.module.state_dict().items(), two.module.state_dict().values(), strict=True):
        assert torch.equal(a.double(), b), name
    assert not torch.equal(one.module.projector.fc1.weight, other.module.projector.fc1.weight)


def test_frozen_parts_and_adapters() -> None:
    frozen = load_policy("scratch:tiny", freeze=("vision", "projector"))
    trained = {n.split(".")[0] for n, p in frozen.module.named_parameters() if p.requires_grad}
    assert trained == {"language_model", "value_head"}
    adapted = load_policy("scratch:tiny", lora=Lora(rank=2), freeze=("vision",))
    names = [n for n, p in adapted.module.named_parameters() if p.requires_grad]
    assert all(".lora_" in n or n.startswith("value_head.") for n in names)
    assert not any(n.startswith("vision_backbone.") for n in names)
    assert sum(n.startswith("value_head.") for n in names) == 5
