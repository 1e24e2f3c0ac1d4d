"""Acting at padded sizes, with compiled blocks, and without waiting for the device."""
from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from vlarl.policies.base import VLAPolicy
from vlarl.policies.checkpoint import load_policy
from vlarl.policies.engine import Compiled, Engine, Inputs, Outputs, padded_sizes
from vlarl.policies.probe import action_gap, equip, probe_batch
from vlarl.recipe.schema import Engine as Settings
from vlarl.types import Observation

FAMILIES = ("scratch:tiny", "scratch:tiny-openvla")
SENTENCES = ("put the red cube on the green plate", "push the blue cube left", "touch the yellow cube")


def observation(batch: int) -> Observation:
    image = torch.randint(0, 256, (batch, 1, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    return Observation(image, torch.zeros(batch, 8), tuple(SENTENCES[i % 3] for i in range(batch)))


def noise(policy: VLAPolicy, batch: int) -> Tensor:
    tokens = policy.spec.chunk * policy.spec.action_dim
    return torch.rand(batch, tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def test_sizes_are_few_and_waste_little() -> None:
    assert padded_sizes(1) == (1, 2)
    assert padded_sizes(64) == (1, 2, 4, 8, 16, 32, 64, 72, 96, 128)
    assert padded_sizes(80) == (1, 2, 4, 8, 16, 32, 64, 80, 90, 120, 160)


@pytest.mark.parametrize("source", FAMILIES)
def test_padding_changes_no_row(source: str) -> None:
    policy = load_policy(source, seed=1, dtype=torch.float64)
    torch.nn.init.normal_(policy.module.value_head.mlp[4].weight)
    obs, chance = observation(5), noise(policy, 5)
    plain = policy.act(obs, chance, 1.0, 0)
    policy.engine = Engine((2, 4, 8, 16))
    padded = policy.act(obs, chance, 1.0, 0)
    assert torch.equal(padded.token_BN, plain.token_BN)
    assert torch.equal(padded.action_BKA, plain.action_BKA)
    assert (padded.logprob_BN - plain.logprob_BN).abs().max() < 1e-12
    assert (padded.value_BJ - plain.value_BJ).abs().max() < 1e-12
    assert len(policy.act(observation(17), None, 1.0, 0).token_BN) == 17  # beyond the largest: as it comes


@pytest.mark.parametrize("source", FAMILIES)
def test_what_lies_in_the_padding_changes_no_bit(source: str) -> None:
    policy = load_policy(source, seed=1)
    policy.keep_features = True
    engine, seen = Engine((8,)), list[Outputs]()

    def choose(inputs: Inputs, temperature: float, top_k: int) -> Outputs:
        assert {len(t) for t in inputs if t is not None} == {8}
        other = inputs._replace(image_BVHWC=inputs.image_BVHWC.clone(), ids_BL=inputs.ids_BL.clone(), noise_BN=None)
        other.image_BVHWC[5:], other.ids_BL[5:, 3:] = 255, 77
        seen.append(policy._choose(other, temperature, top_k))
        return policy._choose(inputs._replace(noise_BN=None), temperature, top_k)

    obs = observation(5)
    prompt = policy.prompts(obs.instruction, 8)
    assert prompt.ids_BL.shape[1] % 8 == 0
    with torch.no_grad():
        ours = engine(choose, Inputs(obs.image_BVHWC, prompt.ids_BL, prompt.mask_BL, None, noise(policy, 5)), 1.0, 0)
    assert all(a is not None and b is not None and torch.equal(a, b[:5]) for a, b in zip(ours, seen[0], strict=True))


def test_prompts_of_one_length_share_a_shape_with_others() -> None:
    policy = load_policy("scratch:tiny")
    short, long = (policy.prompts((sentence,), 8) for sentence in ("touch the cube", "touch the yellow cube"))
    assert short.ids_BL.shape == long.ids_BL.shape
    assert short.mask_BL is not None
    assert short.mask_BL[0].sum() == policy.prompts(("touch the cube",)).ids_BL.shape[1]


@pytest.mark.parametrize("source", FAMILIES)
def test_learning_sees_prompts_padded_as_acting_did(source: str) -> None:
    """Else the two would run other kernels, whose rounding shows in bfloat16."""
    policy, seen = load_policy(source, seed=1), list[tuple[torch.Size, bool]]()
    policy.module.register_forward_pre_hook(lambda _, given: seen.append((given[1].shape, given[2] is None)))
    obs = observation(3)
    for engine in (Engine(), Engine((3,))):
        policy.engine = engine
        chunk = policy.act(obs, noise(policy, 3), 1.0, 0)
        policy.evaluate(obs, chunk.token_BN, 1.0, 0)
    assert seen[0] == seen[1] and seen[2] == seen[3]
    assert seen[0] != seen[2] and seen[2][0][1] % 8 == 0


@pytest.mark.parametrize("source", FAMILIES)
def test_acting_never_waits_for_the_device(source: str) -> None:
    """On the meta device there is nothing to wait for: a number, a copy to the host or a shape that depends on values raises."""
    policy = load_policy(source, seed=1)
    obs = observation(3)
    chance = noise(policy, 3)
    policy.act(obs, chance, 1.0, 0)  # tables are made on first use
    meta = torch.device("meta")
    policy.module.to(meta)
    policy.device = policy._prompts._device = meta
    policy._prompts._table_UL = policy._prompts._table_UL.to(meta)
    policy.codec = type(policy.codec)(**{n: t.to(meta) if isinstance(t, Tensor) else t for n, t in vars(policy.codec).items()})
    away = Observation(obs.image_BVHWC.to(meta), obs.state_BD.to(meta), obs.instruction)
    for given, top_k in ((chance, 0), (chance, 50), (None, 0)):
        chunk = policy.act(away, given, 1.6, top_k)
        assert chunk.action_BKA.device == meta
        assert chunk.token_BN.shape == chance.shape
    for waits in (lambda x: x.max().item(), lambda x: x.cpu(), lambda x: x.tolist(), lambda x: x[x > 3], lambda x: bool((x > 3).any())):
        with pytest.raises((RuntimeError, NotImplementedError)):
            waits(chunk.token_BN)


def test_a_compiler_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr("vlarl.policies.probe.Compiled", broken)
    policy = load_policy("scratch:tiny", seed=1)
    assert equip(policy, Settings(compile=True), 2, torch.float32) == ["policy.engine.compile is left out: no compiler"]
    assert (policy.engine.sizes, policy.engine.compiled) == ((1, 2, 3, 4), None)


def test_wrong_numbers_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Careless(Compiled):
        """Acts on a picture a shade brighter."""

        def __init__(self, module: object) -> None:
            pass

        def __call__(self, choose: Any) -> Any:
            return lambda inputs, *how: choose(inputs._replace(image_BVHWC=inputs.image_BVHWC // 2), *how)

    monkeypatch.setattr("vlarl.policies.probe.Compiled", Careless)
    policy = load_policy("scratch:tiny", seed=1)
    (line,) = equip(policy, Settings(compile=True), 2, torch.float32)
    assert "log-probs differ by" in line
    assert policy.engine.compiled is None


def test_graphs_without_a_gpu_are_left_out() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    policy = load_policy("scratch:tiny", seed=1)
    (line,) = equip(policy, Settings(cuda_graphs=True, batch_sizes=(4,)), 2, torch.float32)
    assert line == "policy.engine.cuda_graphs is left out: CUDA graphs need a CUDA device, this is cpu"
    assert (policy.engine.sizes, policy.engine.graphs) == ((4,), None)


def test_nothing_is_padded_unless_asked() -> None:
    policy = load_policy("scratch:tiny", seed=1)
    assert equip(policy, Settings(), 64, torch.float32) == []
    assert policy.engine.sizes == ()


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="torch.compile wants a C++ compiler")
@pytest.mark.slow
def test_compiled_blocks_act_alike_and_learning_stays_plain() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    policy = load_policy("scratch:tiny-openvla", seed=1)
    obs, chance = observation(3), noise(policy, 3)
    plain = policy.act(obs, chance, 1.0, 0)
    assert equip(policy, Settings(compile=True, batch_sizes=(4,)), 4, torch.float32) == []
    assert policy.engine.compiled is not None
    chunk = policy.act(obs, chance, 1.0, 0)
    assert torch.equal(chunk.token_BN, plain.token_BN)
    assert (chunk.logprob_BN - plain.logprob_BN).abs().max() < 1e-5
    assert action_gap(policy) < 1e-5
    # One code for all blocks of a kind, however many layers there are: two towers, of which the one without prefix tokens begins with
    # other strides than it goes on, and Llama's prompts.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
    assert not any("forward" in vars(block) for block in policy.module.fsdp_units())
    # Weights are inputs: what learning changes in place is acted by.
    with torch.no_grad():
        for parameter in policy.module.language_model.model.layers.parameters():
            parameter.mul_(1.1)
    torch._dynamo.utils.counters.clear()
    changed = policy.act(obs, chance, 1.0, 0)
    assert "unique_graphs" not in torch._dynamo.utils.counters["stats"]  # nothing was compiled again
    assert (policy.evaluate(obs, changed.token_BN, 1.0, 0).logprob_BN - changed.logprob_BN).abs().max() < 1e-5
    assert (changed.logprob_BN - chunk.logprob_BN).abs().max() > 1e-3


def test_the_probe_of_a_gap_sees_rows_of_every_size() -> None:
    policy = load_policy("scratch:tiny", seed=1)
    policy.engine = Engine((2, 6))
    seen = []
    real = policy.act

    def counted(obs: Observation, *how: Any) -> Any:
        seen.append(len(obs))
        return real(obs, *how)

    policy.act = counted  # type: ignore[method-assign]
    assert action_gap(policy) < 1e-5
    assert seen == [2, 2, 6, 6]
    assert len(probe_batch(policy)) == 3
