"""One update of a linear policy: gradient, gates, what is learnt from and what stays as it is."""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from helpers.fakes import A, K, LinearModule, LinearPolicy, N, blank_batch, one_rank_plan
from vlarl.distributed.fsdp import full_state_dict
from vlarl.distributed.mesh import World, init_world, shutdown
from vlarl.errors import WorkerError
from vlarl.learner.optim import build_optimizer, set_learning_rates
from vlarl.learner.targets import Targets
from vlarl.learner.update import Learner
from vlarl.policies.sampling import log_distribution, token_logprob
from vlarl.recipe.schema import Grpo, Ppo, Rollout, Update
from vlarl.types import Observation, TrajectoryBatch

T, B, BINS = 3, 4, 5
PLAIN = Ppo(value_clip=None, huber=None)
ONE_STEP = Update(minibatches=1, microbatch=T * B, grad_clip=1e9)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    yield init_world(one_rank_plan())
    shutdown()


def rollout(policy: LinearPolicy) -> TrajectoryBatch:
    """A batch with distinct states 0..11 / 12 and the policy's own log-probs of random tokens."""
    batch = blank_batch(T, B)
    batch.state_TBD[..., 0] = torch.arange(T * B).view(T, B) / (T * B)
    batch.state_TBD[..., 1] = 1.0
    batch.token_TBN[:] = torch.randint(BINS, (T, B, N), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        scores = policy.evaluate(Observation(batch.image_TBVHWC, batch.state_TBD.flatten(0, 1), ()), batch.token_TBN.flatten(0, 1), 1.0, 0)
    batch.logprob_TBN[:] = scores.logprob_BN.unflatten(0, (T, B))
    batch.value_TBJ[:] = scores.value_BJ.unflatten(0, (T, B))
    policy.calls.clear()
    return batch


def targets_for(batch: TrajectoryBatch, critic: bool = True) -> Targets:
    """Advantages -6..5 and returns 0..11, all samples kept."""
    number_TB1 = torch.arange(T * B, dtype=torch.float64).view(T, B, 1)
    return Targets(number_TB1 - 6, number_TB1 if critic else None, batch.valid_TBK.any(-1), torch.ones(T, B), 0, 0)


def build(world: World, algorithm: Ppo | Grpo, settings: Update, frozen: tuple[str, ...] = (), sgd: bool = False) -> Learner:
    policy = LinearPolicy(world, bins=BINS, frozen=frozen)
    optimizer: torch.optim.Optimizer = build_optimizer(policy.module, 0.1, 0.1, 1.0, (0.9, 0.95), 1e-8, 0.01)
    if sgd:
        optimizer = torch.optim.SGD(policy.module.parameters(), lr=1.0)
    return Learner(policy, None, optimizer, world, algorithm, settings, Rollout(), seed=1)  # type: ignore[arg-type]


def weights(learner: Learner) -> dict[str, Tensor]:
    return full_state_dict(learner.policy.module)


def same(one: dict[str, Tensor], two: dict[str, Tensor], prefix: str = "") -> bool:
    return all(torch.equal(one[name], two[name]) for name in one if name.startswith(prefix))


def expected_gradient(batch: TrajectoryBatch, targets: Targets) -> dict[str, Tensor]:
    """Of -mean(A_t log pi(action)) over executed actions + mean((V - R)^2 / 2), by autograd on the plain module."""
    module = LinearModule(BINS, torch.float64)
    logits, value = module(batch.state_TBD.flatten(0, 1))
    logprob_SK = token_logprob(log_distribution(logits, 1.0, 0), batch.token_TBN.flatten(0, 1)).unflatten(1, (K, A)).sum(-1)
    valid_SK = batch.valid_TBK.flatten(0, 1)
    loss = -(targets.advantage_TBJ.flatten(0, 1) * logprob_SK * valid_SK).sum() / valid_SK.sum()
    assert targets.return_TBJ is not None
    learnt_S1 = valid_SK.any(-1, keepdim=True)
    loss = loss + ((value - targets.return_TBJ.flatten(0, 1)).square() / 2 * learnt_S1).sum() / learnt_S1.sum()
    loss.backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("microbatch", [12, 5, 1])
def test_the_gradient_is_that_of_the_whole_minibatch(world: World, microbatch: int) -> None:
    learner = build(world, PLAIN, replace(ONE_STEP, microbatch=microbatch), sgd=True)
    batch = rollout(learner.policy)  # type: ignore[arg-type]
    batch.valid_TBK[1, 2, 1] = False  # an action not executed
    targets = targets_for(batch)
    before = weights(learner)
    learner.update(batch, targets, 0)
    gradient = {name: before[name] - after for name, after in weights(learner).items()}
    for name, expected in expected_gradient(batch, targets).items():
        torch.testing.assert_close(gradient[name], expected, atol=1e-12, rtol=1e-12, msg=name)


def test_metrics_of_a_first_step(world: World) -> None:
    learner = build(world, PLAIN, ONE_STEP)
    batch = rollout(learner.policy)  # type: ignore[arg-type]
    targets = targets_for(batch)
    metrics = learner.update(batch, targets, 0)
    assert metrics["policy_loss"] == pytest.approx(0.5)  # the ratio is 1 and the mean advantage -1/2
    assert metrics["ratio"] == pytest.approx(1) and metrics["ratio_max"] == pytest.approx(1)
    assert metrics["approx_kl"] == pytest.approx(0, abs=1e-12) and metrics["clip_fraction"] == 0
    assert metrics["logprob_gap"] == pytest.approx(0, abs=1e-12) and metrics["logprob_gap_max"] == pytest.approx(0, abs=1e-12)
    assert (metrics["steps"], metrics["skipped_steps"], metrics["samples"]) == (1, 0, 12)
    error = (batch.value_TBJ - torch.arange(12).view(T, B, 1)).flatten()
    assert metrics["value_loss"] == pytest.approx(float(error.square().mean() / 2))
    assert metrics["explained_variance"] == pytest.approx(1 - float(error.var(unbiased=False)) / (143 / 12))


def test_what_was_not_executed_teaches_nothing(world: World) -> None:
    results = []
    for garbage in (0, 3):
        learner = build(world, PLAIN, replace(ONE_STEP, minibatches=2))
        batch = rollout(learner.policy)  # type: ignore[arg-type]
        batch.valid_TBK[2, 1], batch.valid_TBK[0, 0, 1] = False, False
        batch.token_TBN[2, 1], batch.token_TBN[0, 0, A:] = garbage, garbage
        batch.logprob_TBN[2, 1], batch.logprob_TBN[0, 0, A:] = -garbage, -garbage
        learner.update(batch, targets_for(batch), 0)
        results.append(weights(learner))
    assert same(*results)


def test_altered_log_probs_stop_the_run_before_the_first_step(world: World) -> None:
    learner = build(world, PLAIN, replace(ONE_STEP, logprob_gap_limit=0.05))
    batch = rollout(learner.policy)  # type: ignore[arg-type]
    before = weights(learner)
    batch.logprob_TBN[:] += 0.06
    with pytest.raises(WorkerError, match=r"differ by 0\.06 nats per token"):
        learner.update(batch, targets_for(batch), 0)
    assert same(before, weights(learner))


def test_a_gap_below_the_limit_passes_and_is_reported(world: World) -> None:
    learner = build(world, PLAIN, replace(ONE_STEP, logprob_gap_limit=0.05))
    batch = rollout(learner.policy)  # type: ignore[arg-type]
    batch.logprob_TBN[:] += 0.04
    assert learner.update(batch, targets_for(batch), 0)["logprob_gap"] == pytest.approx(0.04)


def test_non_finite_gradients_are_skipped_and_three_in_a_row_end_the_run(world: World) -> None:
    learner = build(world, PLAIN, replace(ONE_STEP, minibatches=2))
    batch = rollout(learner.policy)  # type: ignore[arg-type]
    good = targets_for(batch)
    bad = replace(good, advantage_TBJ=torch.full((T, B, 1), math.inf, dtype=torch.float64))
    before = weights(learner)
    metrics = learner.update(batch, bad, 0)
    assert (metrics["steps"], metrics["skipped_steps"]) == (0, 2) and same(before, weights(learner))
    learner.update(rollout(learner.policy), good, 1)  # a good step starts the count anew  # type: ignore[arg-type]
    batch = rollout(learner.policy)  # type: ignore[arg-type]
    learner.update(batch, bad, 2)
    with pytest.raises(WorkerError, match="not finite 3 times in a row"):
        learner.update(batch, bad, 3)


def test_samples_that_are_not_kept_never_reach_the_forward_pass(world: World) -> None:
    learner = build(world, Grpo(group_size=2), replace(ONE_STEP, microbatch=3))
    policy: LinearPolicy = learner.policy  # type: ignore[assignment]
    batch = rollout(policy)
    keep_TB = torch.zeros(T, B, dtype=torch.bool)
    keep_TB[:, 1], keep_TB[0, 2] = True, True  # flat samples 1, 5, 9, 2
    targets = replace(targets_for(batch, critic=False), keep_TB=keep_TB, weight_TB=keep_TB.float())
    metrics = learner.update(batch, targets, 0)
    assert [len(rows) for rows in policy.calls] == [2, 2]  # four samples in two passes, though 3 would fit into one
    seen = sorted(round(12 * float(s)) for rows in policy.calls for s in rows[:, 0])
    assert seen == [1, 2, 5, 9]
    assert metrics["samples"] == 4 and metrics["steps"] == 1


def test_an_update_without_samples_does_nothing(world: World) -> None:
    learner = build(world, Grpo(group_size=2), replace(ONE_STEP, minibatches=4))
    policy: LinearPolicy = learner.policy  # type: ignore[assignment]
    batch = rollout(policy)
    nothing = replace(targets_for(batch, critic=False), keep_TB=torch.zeros(T, B, dtype=torch.bool), weight_TB=torch.zeros(T, B))
    before = weights(learner)
    metrics = learner.update(batch, nothing, 0)
    assert policy.calls == [] and same(before, weights(learner))
    assert (metrics["steps"], metrics["samples"]) == (0, 0) and all(math.isfinite(v) for v in metrics.values())
    assert learner.update(batch, targets_for(batch, critic=False), 1)["steps"] == 4  # and the next update goes on


def test_the_critics_warm_up_moves_the_value_head_alone(world: World) -> None:
    learner = build(world, PLAIN, replace(ONE_STEP, minibatches=2))
    set_learning_rates(learner.optimizer, 0.0, 0.1)
    learner.trains_policy = False
    before = weights(learner)
    for update in range(2):
        batch = rollout(learner.policy)  # type: ignore[arg-type]
        learner.update(batch, targets_for(batch), update)
    after = weights(learner)
    assert same(before, after, "backbone.") and same(before, after, "head.")
    assert not torch.equal(before["value_head.weight"], after["value_head.weight"])
    moments = {name: learner.optimizer.state[p] for name, p in learner.policy.module.named_parameters()}
    assert {name: int(state["step"]) for name, state in moments.items() if not name.startswith("value_head.")} == {
        name: 0 for name in moments if not name.startswith("value_head.")
    }
    assert int(moments["value_head.weight"]["step"]) == 4


def test_grpo_leaves_the_value_head_alone(world: World) -> None:
    learner = build(world, Grpo(group_size=2), replace(ONE_STEP))
    learner.optimizer.param_groups[1]["weight_decay"] = 0.0
    batch = rollout(learner.policy)  # type: ignore[arg-type]
    before = weights(learner)
    learner.update(batch, targets_for(batch, critic=False), 0)
    after = weights(learner)
    assert same(before, after, "value_head.") and not same(before, after, "head.")


def test_frozen_parts_stay(world: World) -> None:
    learner = build(world, PLAIN, replace(ONE_STEP, minibatches=2), frozen=("backbone",))
    batch = rollout(learner.policy)  # type: ignore[arg-type]
    before = weights(learner)
    learner.update(batch, targets_for(batch), 0)
    after = weights(learner)
    assert same(before, after, "backbone.")
    assert not same(before, after, "head.") and not same(before, after, "value_head.")


def test_epochs_learn_every_sample_once_each(world: World) -> None:
    learner = build(world, PLAIN, replace(ONE_STEP, epochs=2, minibatches=2, microbatch=4))
    policy: LinearPolicy = learner.policy  # type: ignore[assignment]
    batch = rollout(policy)
    assert learner.update(batch, targets_for(batch), 0)["steps"] == 4
    seen = [round(12 * float(s)) for rows in policy.calls for s in rows[:, 0]]
    assert sorted(seen) == sorted([*range(12)] * 2) and seen[:12] != seen[12:]


def test_every_forward_pass_is_a_beat(world: World) -> None:
    """A healthy update may last longer than a rank may be silent."""
    policy, passes = LinearPolicy(world, bins=BINS), list[int]()
    settings = replace(ONE_STEP, epochs=2, minibatches=2, microbatch=2)
    optimizer = build_optimizer(policy.module, 0.1, 0.1, 1.0, (0.9, 0.95), 1e-8, 0.01)
    beat = lambda: passes.append(len(policy.calls))  # noqa: E731
    learner = Learner(policy, None, optimizer, world, PLAIN, settings, Rollout(), seed=1, beat=beat)  # type: ignore[arg-type]
    batch = rollout(policy)
    learner.update(batch, targets_for(batch), 0)
    assert passes == [*range(12)] == [*range(len(policy.calls))]


def test_the_kl_term_pulls_back_to_the_reference(world: World) -> None:
    algorithm = replace(PLAIN, kl_coef=0.5)
    policy, reference = LinearPolicy(world, bins=BINS), LinearPolicy(world, bins=BINS)
    optimizer = build_optimizer(policy.module, 0.1, 0.1, 1.0, (0.9, 0.95), 1e-8, 0.0)
    learner = Learner(policy, reference, optimizer, world, algorithm, ONE_STEP, Rollout(), seed=1)  # type: ignore[arg-type]
    batch = rollout(policy)
    assert learner.update(batch, targets_for(batch), 0)["kl_reference"] == pytest.approx(0, abs=1e-12)
    batch = rollout(policy)
    assert learner.update(batch, targets_for(batch), 1)["kl_reference"] > 0.01
    assert len(reference.calls) == 2
