"""Owns the tests' stand-ins: a simulator and policies whose every number is known from the episode's spec."""
from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from vlarl.distributed.fsdp import shard
from vlarl.distributed.mesh import World
from vlarl.envs.spec import EnvSpec, EpisodeSpec
from vlarl.plan.placement import PLAN_VERSION, PlacementPlan, RankPlan, RolloutPlan, UpdatePlan, WorkerGroup
from vlarl.policies.base import Scores
from vlarl.policies.sampling import entropy, log_distribution, token_logprob
from vlarl.types import ActionChunk, ChunkResult, Observation, TrajectoryBatch

K, A = 2, 3  # actions per chunk, numbers per action
N = K * A


def episode(uid: int, length: int, success: bool, group: int = -1) -> EpisodeSpec:
    """An episode that FakeEnv ends after `length` actions, in success (terminated) or not (truncated)."""
    return EpisodeSpec(uid=uid, task=int(success), init_state=length, seed=0, group=group)


class FakeEnv:
    """A BatchedEnv. The n-th action (from 1) of episode u earns 100 u + n; a frame shows (u, actions played so far, 255)."""

    def __init__(self, slots: int) -> None:
        self.spec = EnvSpec("fake", ("failure", "success"), views=1, height=2, width=2, state_dim=2, action_dim=A, horizon=100)
        self.observed: list[list[int]] = []  # slots of every call of observe
        self.actions: list[Tensor] = []
        self.closed = False
        self._episode: list[EpisodeSpec | None] = [None] * slots
        self._played = [0] * slots

    def reset(self, index: Tensor, episodes: Sequence[EpisodeSpec]) -> None:
        for b, spec in zip(index.tolist(), episodes, strict=True):
            self._episode[b], self._played[b] = spec, 0

    def step_chunk(self, action_BKA: Tensor, active_B: Tensor) -> ChunkResult:
        slots, chunk = action_BKA.shape[:2]
        self.actions.append(action_BKA.clone())
        reward, success = torch.zeros(slots, chunk), torch.zeros(slots, dtype=torch.bool)
        terminated, truncated, valid = (torch.zeros(slots, chunk, dtype=torch.bool) for _ in range(3))
        for b in active_B.nonzero()[:, 0].tolist():
            spec = self._episode[b]
            assert spec is not None, f"slot {b} acts without an episode"
            for k in range(min(chunk, spec.init_state - self._played[b])):
                self._played[b] += 1
                valid[b, k], reward[b, k] = True, 100 * spec.uid + self._played[b]
                if self._played[b] == spec.init_state:
                    (terminated if spec.task else truncated)[b, k] = True
                    success[b] = bool(spec.task)
        return ChunkResult(reward, terminated, truncated, valid, success)

    def observe(self, index: Tensor) -> Observation:
        self.observed.append(index.tolist())
        seen = torch.zeros(len(index), 2)
        for row, b in enumerate(index.tolist()):
            spec = self._episode[b]
            assert spec is not None, f"slot {b} is observed without an episode"
            seen[row] = torch.tensor([spec.uid, self._played[b]])
        pixel = torch.cat([seen, torch.full((len(index), 1), 255.0)], 1).to(torch.uint8)
        image = pixel[:, None, None, None].expand(-1, 1, 2, 2, 3).clone()
        return Observation(image, seen, tuple(f"episode {int(uid)}" for uid in seen[:, 0]))

    def state_dict(self) -> dict[str, Any]:
        return {"episode": list(self._episode), "played": list(self._played)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._episode, self._played = list(state["episode"]), list(state["played"])

    def close(self) -> None:
        self.closed = True


class FakePolicy:
    """Acts by what it sees: value 1000 u + n of the frame (u, n); tokens and log-probs from the noise alone."""

    def __init__(self) -> None:
        self.rows: list[int] = []  # size of every forward pass

    def act(self, obs: Observation, noise_BN: Tensor | None, temperature: float, top_k: int) -> ActionChunk:
        self.rows.append(len(obs))
        noise_BN = torch.zeros(len(obs), N, dtype=torch.float64) if noise_BN is None else noise_BN
        token_BN = (noise_BN * 256).long()
        value_B1 = (1000 * obs.state_BD[:, :1] + obs.state_BD[:, 1:]).float()
        action_BKA = obs.state_BD[:, :1, None].expand(-1, K, A).clone()
        return ActionChunk(action_BKA, token_BN, -noise_BN.float(), value_B1, 0)


class NoSpans:
    """Measures nothing."""

    def span(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()


def one_rank_plan() -> PlacementPlan:
    """One CPU rank that does everything."""
    rank = RankPlan(0, 0, 0, "cpu", 1, ("env", "rollout", "learner"), (0, 4), (0, 4), (0, 4))
    rollout, update = RolloutPlan(4, 1, 1, 0, 1, 1, 1), UpdatePlan(4, 1, 1, 4, 4, 1)
    workers = WorkerGroup(1, 1, "gloo")
    return PlacementPlan(PLAN_VERSION, "test", "collocated", "", 1, "float64", workers, (rank,), rollout, update, (), "", None)


class LinearModule(nn.Module):
    """state (B, 2) -> logits (B, N, bins), values (B, 1)."""

    def __init__(self, bins: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.bins = bins
        torch.manual_seed(0)
        self.backbone = nn.Linear(2, 4, dtype=dtype)
        self.head = nn.Linear(4, N * bins, dtype=dtype)
        self.value_head = nn.Linear(4, 1, dtype=dtype)

    def forward(self, state_BD: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.backbone(state_BD.to(self.backbone.weight.dtype)))
        return self.head(hidden).view(-1, N, self.bins).clone(), self.value_head(hidden)


class LinearPolicy:
    """The half of VLAPolicy that the learner uses, over LinearModule; sees the state alone. `calls`: rows of every scoring pass."""

    def __init__(
        self, world: World, dtype: torch.dtype = torch.float64, bins: int = 5, frozen: Sequence[str] = (), whole: bool = False
    ) -> None:
        self.module = LinearModule(bins, dtype)
        for name in frozen:
            self.module.get_submodule(name).requires_grad_(False)
        if not whole:
            shard(self.module, world.learner, dtype)
        self.spec = SimpleNamespace(chunk=K, action_dim=A)
        self.device = world.device
        self.policy_version = 0
        self.calls: list[Tensor] = []

    def evaluate(self, obs: Observation, token_BN: Tensor, temperature: float, top_k: int, feature_BPF: Tensor | None = None) -> Scores:
        self.calls.append(obs.state_BD.clone())
        logits_BNM, value_B1 = self.module(obs.state_BD)
        logp_BNM = log_distribution(logits_BNM, temperature, top_k, token_BN)
        return Scores(token_logprob(logp_BNM, token_BN), entropy(logp_BNM), value_B1)

    def logits(self, obs: Observation, token_BN: Tensor) -> Tensor:
        return self.module(obs.state_BD)[0]


def blank_batch(T: int, B: int, J: int = 1, dtype: torch.dtype = torch.float64) -> TrajectoryBatch:
    """T chunks in each of B slots, all of them executed, all numbers 0, no episode finished. Fill in with dataclasses.replace."""
    executed, never = torch.ones(T, B, K, dtype=torch.bool), torch.zeros(T, B, K, dtype=torch.bool)
    return TrajectoryBatch(
        image_TBVHWC=torch.zeros(T, B, 1, 2, 2, 3, dtype=torch.uint8),
        feature_TBPF=torch.zeros(T, B, 0, 0),
        state_TBD=torch.zeros(T, B, 2),
        instruction_TB=torch.zeros(T, B, dtype=torch.int64),
        instructions=("",),
        token_TBN=torch.zeros(T, B, N, dtype=torch.int64),
        logprob_TBN=torch.zeros(T, B, N, dtype=dtype),
        value_TBJ=torch.zeros(T, B, J, dtype=dtype),
        reward_TBK=torch.zeros(T, B, K),
        terminated_TBK=never,
        truncated_TBK=never.clone(),
        valid_TBK=executed,
        active_TB=torch.ones(T, B, dtype=torch.bool),
        last_value_BJ=torch.zeros(B, J, dtype=dtype),
        final_value_TBJ=torch.zeros(T, B, J, dtype=dtype),
        episode_TB=torch.full((T, B), -1),
        slot_B=torch.arange(B),
        episodes=(),
        policy_version=0,
    )
