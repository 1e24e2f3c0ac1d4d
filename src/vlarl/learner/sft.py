"""Owns the warm start: behaviour cloning on recorded episodes, or on those of a scripted expert, collected while training goes on.

That expert labels what is seen; what is executed is noisier than the label in a third of the chunks, so that the clone also learns to
recover (noise injection as in DART, Laskey et al., 2017).

Which samples are cloned does not depend on the number of ranks. A draw is keyed by its step and its position in the minibatch, noise by
slot and chunk. A rank clones the positions of its share; where an expert plays, each position has slots of its own, so that a rank plays
only those of its share and every rank clones as many samples. A slot on the border of two shares is played on both ranks, alike.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from vlarl.datasets.read import Recorded
from vlarl.distributed.mesh import World
from vlarl.distributed.reduce import all_reduce_sum
from vlarl.envs.base import BatchedEnv
from vlarl.envs.pool import Feed
from vlarl.policies.actions import BINS
from vlarl.policies.base import VLAPolicy
from vlarl.recipe.schema import Warmstart
from vlarl.rng import fold, integers, uniform
from vlarl.types import Observation

NOISY_CHUNKS = 1 / 3
GRIPPER_FLIPS = 0.05  # share of chunks in which the executed gripper command is inverted
REUSE = 6  # times a collected sample is seen on average
FIRST_FILL = 8192  # samples collected before the first step, at most; over all ranks
GRAIN = 2**20  # parts into which a position's slots are cut to draw one of them in whole numbers
_SAMPLE, _SLOT, _NOISE = range(3)  # streams of random numbers under a phase's key


@runtime_checkable
class ExpertEnv(BatchedEnv, Protocol):
    """A simulator that knows how its tasks are done."""

    def expert_chunk(self, chunk: int, clumsiness: float) -> Tensor:
        """The expert's next `chunk` actions for every slot, (B, K, A); in a share `clumsiness` of the episodes it misses its aim."""


class Demonstrations(Protocol):
    """Where the samples of cloning come from."""

    def provide(self, seen: int, alive: Callable[[], None]) -> None:
        """Make ready what the next step may draw, after `seen` samples over all ranks; call `alive` now and then."""

    def sample(self, step: int, share: range) -> tuple[Observation, Tensor]:
        """Samples `share` of a step's minibatch, drawn with replacement: observation, expert tokens (B, N)."""


class RecordedPool:
    """The frames of recorded episodes, each with the chunk of actions that followed."""

    def __init__(self, data: Recorded, policy: VLAPolicy, key: Tensor) -> None:
        """The policy's statistics must be those of the data already. key: of the phase's random numbers."""
        self._key = key
        self._image, self._state = torch.from_numpy(data.image_NVHWC), torch.from_numpy(data.state_ND)
        self._token = policy.codec.encode(torch.from_numpy(data.chunks(policy.spec.chunk)).to(policy.device)).cpu()
        self._sentence = data.sentence_N

    def provide(self, seen: int, alive: Callable[[], None]) -> None:
        """Everything is there."""

    def sample(self, step: int, share: range) -> tuple[Observation, Tensor]:
        """See Demonstrations."""
        rows = integers(fold(self._key, _SAMPLE, step, _numbers(share)), len(self._token))
        sentences = tuple(self._sentence[i] for i in rows.tolist())
        return Observation(self._image[rows], self._state[rows], sentences), self._token[rows]


class DemonstrationPool:
    """Rings of (image, state, sentence, expert tokens), one per slot and equally long, filled by playing the expert in one simulator."""

    def __init__(
        self, env: ExpertEnv, feed: Feed, policy: VLAPolicy, settings: Warmstart, slots: range, of: int, key: Tensor
    ) -> None:
        """slots: those of all `of` slots that this rank plays, at most settings.pool. key: of the phase's random numbers."""
        self._env, self._feed, self._policy, self._settings = env, feed, policy, settings
        self._slots, self._of, self._key = slots, of, key
        spec, chunk, self._depth = env.spec, policy.spec.chunk, settings.pool // of
        size = self._depth * len(slots)
        self._image = torch.zeros(size, spec.views, spec.height, spec.width, 3, dtype=torch.uint8)
        self._state = torch.zeros(size, spec.state_dim)
        self._token = torch.zeros(size, chunk * spec.action_dim, dtype=torch.int64)
        self._sentence = [""] * size
        self._first = min(FIRST_FILL, settings.pool)
        self.rounds = 0
        """Samples collected from every slot."""
        self._restart(list(range(len(slots))))

    def provide(self, seen: int, alive: Callable[[], None]) -> None:
        """Play on, so that a collected sample is seen REUSE times on average."""
        while self.rounds * self._of < max(self._first, seen // REUSE):
            self.collect()
            alive()

    def collect(self) -> None:
        """One more sample from every slot."""
        every = torch.arange(len(self._slots))
        obs = self._env.observe(every)
        action_BKA = self._env.expert_chunk(self._policy.spec.chunk, self._settings.clumsiness)
        rows = self.rounds % self._depth * len(self._slots) + every
        self._image[rows], self._state[rows] = obs.image_BVHWC.cpu(), obs.state_BD.cpu()
        self._token[rows] = self._policy.codec.encode(action_BKA).cpu()
        for row, sentence in zip(rows.tolist(), obs.instruction, strict=True):
            self._sentence[row] = sentence
        result = self._env.step_chunk(self._disturb(action_BKA), torch.ones(len(every), dtype=torch.bool))
        self.rounds += 1
        ended = (result.terminated_BK | result.truncated_BK).any(-1)
        self._restart(ended.nonzero()[:, 0].tolist())

    def sample(self, step: int, share: range) -> tuple[Observation, Tensor]:
        """See Demonstrations. Position p of a minibatch of P is of one of the slots p S / P to (p + 1) S / P."""
        position = _numbers(share)
        part = position * GRAIN + integers(fold(self._key, _SLOT, step, position), GRAIN)
        slot = part * self._of // (self._settings.batch * GRAIN)
        place = integers(fold(self._key, _SAMPLE, step, position), min(self.rounds, self._depth))
        rows = place * len(self._slots) + slot - self._slots.start
        sentences = tuple(self._sentence[i] for i in rows.tolist())
        return Observation(self._image[rows], self._state[rows], sentences), self._token[rows]

    def _disturb(self, action_BKA: Tensor) -> Tensor:
        B, K, A = action_BKA.shape
        numbers = torch.arange(K * A + 2)
        u_BU = uniform(fold(self._key, _NOISE, self.rounds, _numbers(self._slots)[:, None], numbers))
        normal_BKA = torch.special.ndtri(u_BU[:, 2:].clamp(min=2.0**-53)).view(B, K, A)  # at 0 it is infinite
        noise = normal_BKA.to(action_BKA) * self._settings.action_noise
        noise[..., -1] = 0.0
        noisy, flip = u_BU[:, 0] < NOISY_CHUNKS, u_BU[:, 1] < GRIPPER_FLIPS
        action = action_BKA + noise * noisy[:, None, None].to(noise)
        action[..., -1] = torch.where(flip[:, None].to(action.device), -action[..., -1], action[..., -1])
        return action.clamp(-1, 1)

    def _restart(self, places: list[int]) -> None:
        episodes = [self._feed.next(self._slots[b]) for b in places]
        if places:
            self._env.reset(torch.tensor(places), [e for e in episodes if e is not None])


def share_of(world: World, batch: int) -> range:
    """The positions of a minibatch that this rank clones."""
    return range(world.rank * batch // world.world_size, (world.rank + 1) * batch // world.world_size)


def slots_of(share: range, batch: int, slots: int) -> range:
    """Those of all `slots` slots that positions `share` are drawn from."""
    return range(share.start * slots // batch, (share.stop * slots - 1) // batch + 1)


def _numbers(of: range) -> Tensor:
    return torch.arange(of.start, of.stop)


@dataclass(frozen=True)
class SftProgress:
    """After `step` optimiser steps, means since the last report: loss (nats per token above the target's own entropy), accuracy
    (share of tokens whose most likely bin is the expert's), error (mean distance of the most likely bin from the expert's, in bins)."""

    step: int
    loss: float
    accuracy: float
    error: float


def soft_targets(token_BN: Tensor, width: float, bins: int) -> Tensor:
    """Target distribution (B, N, M): a Gaussian of `width` bins around the expert's bin, cut off at the ends; one-hot for width 0."""
    if width == 0:
        return torch.nn.functional.one_hot(token_BN, bins).float()
    centre = torch.arange(bins, device=token_BN.device)
    return torch.softmax(-0.5 * ((centre - token_BN[..., None]) / width) ** 2, dim=-1)


def clone(
    policy: VLAPolicy,
    optimizers: Sequence[torch.optim.Optimizer],
    pool: Demonstrations,
    settings: Warmstart,
    world: World,
    alive: Callable[[], None],
    report: Callable[[SftProgress], None],
) -> None:
    """Behaviour cloning for `settings.steps` optimiser steps. The module is not sharded: every rank holds it whole and clones its share
    of each minibatch; gradients are summed. alive: called at every step, and while demonstrations are collected."""
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    share = share_of(world, settings.batch)
    sums = torch.zeros(4, dtype=torch.float64)
    for step in range(settings.steps):
        alive()
        pool.provide(step * settings.batch, alive)
        for group in (g for optimizer in optimizers for g in optimizer.param_groups):
            group["lr"] = learning_rate(settings, step)
        obs, token_BN = pool.sample(step, share)
        target = soft_targets(token_BN.to(world.device), settings.bin_smoothing, BINS)
        seen = Observation(obs.image_BVHWC.to(world.device), obs.state_BD.to(world.device), obs.instruction)
        logits_BNM = policy.logits(seen, token_BN)
        log_target, fine = target.clamp(min=1e-12).log(), torch.promote_types(logits_BNM.dtype, torch.float32)
        loss = (target * (log_target - torch.log_softmax(logits_BNM.to(fine), -1))).sum()
        (loss / (settings.batch * token_BN.shape[1])).backward()  # the tokens of all ranks
        _sum_gradients(world, parameters)
        torch.nn.utils.clip_grad_norm_(parameters, settings.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            distance = (logits_BNM.argmax(-1).cpu() - token_BN).abs().double()
        count = torch.tensor(float(token_BN.numel()))
        sums += torch.stack([loss.detach().cpu().double(), (distance == 0).sum(), distance.sum(), count])
        if (step + 1) % settings.log_every == 0 or step + 1 == settings.steps:
            total = all_reduce_sum(world, sums)
            report(SftProgress(step + 1, *(total[:3] / total[3]).tolist()))
            sums.zero_()


def _sum_gradients(world: World, parameters: Sequence[Tensor]) -> None:
    """One reduction of all gradients."""
    if world.world_size == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    total = all_reduce_sum(world, torch.cat([g.flatten() for g in grads]))
    for grad, part in zip(grads, total.split([g.numel() for g in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def learning_rate(settings: Warmstart, step: int) -> float:
    """Linear warm-up, then linear decay to a twentieth."""
    left = 1 - 0.95 * step / settings.steps
    return settings.learning_rate * min(1.0, (step + 1) / max(settings.lr_warmup, 1)) * left
