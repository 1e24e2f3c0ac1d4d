"""Owns one update of the policy: epochs of minibatches, gradient accumulation with global denominators, the gates before each step."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vlarl.algorithms import losses
from vlarl.algorithms.health import all_finite, explained_variance, logprob_gap, value_moments
from vlarl.algorithms.minibatches import microbatches, slot_minibatches
from vlarl.distributed.fsdp import clip_grad_norm, set_gradient_sync
from vlarl.distributed.mesh import World
from vlarl.distributed.reduce import all_reduce_max, all_reduce_sum
from vlarl.errors import WorkerError
from vlarl.learner.targets import Targets
from vlarl.policies.base import VLAPolicy
from vlarl.recipe.schema import Grpo, Ppo, Rollout, Update
from vlarl.types import Observation, TrajectoryBatch

SKIPPED_STEPS_LIMIT = 3  # optimiser steps in a row that may be refused for non-finite gradients

COUNTS = ("weight", "count", "value_count", "gap_count")
SUMS = (*COUNTS, "policy_loss", "value_loss", "entropy", "kl", "clipped", "approx_kl", "ratio", "gap_sum")
MAXIMA = ("ratio_max", "gap_max")


class Learner:
    """Updates one policy. Holds nothing but the optimiser and how often in a row a step was refused."""

    def __init__(
        self,
        policy: VLAPolicy,
        reference: VLAPolicy | None,
        optimizer: torch.optim.Optimizer,
        world: World,
        algorithm: Ppo | Grpo,
        settings: Update,
        rollout: Rollout,
        seed: int,
        dump_dir: Path | None = None,
        keep_whole: bool = True,
        beat: Callable[[], object] = lambda: None,
    ) -> None:
        """reference: the policy before RL, for the KL term (None without one). dump_dir: where the samples of a refused step are left.
        keep_whole: weights and gradients stay whole between the forward passes of a step; False: less memory, more traffic.
        beat: called before every forward pass: a healthy update may last longer than a rank may be silent."""
        self.policy, self.reference, self.optimizer = policy, reference, optimizer
        self._world, self._algorithm, self._settings, self._rollout, self._seed = world, algorithm, settings, rollout, seed
        self._refused = 0
        self._dump_dir = dump_dir
        self._keep_whole = keep_whole
        self._beat = beat
        self.trains_policy = True  # False while the critic warms up: then gradients of the value head alone reach the optimiser

    def update(self, batch: TrajectoryBatch, targets: Targets, update: int) -> dict[str, float]:
        """One update: every kept sample once per epoch, `minibatches` optimiser steps per epoch. Returns metrics, equal on all ranks.

        Raises WorkerError if rollout and training log-probs disagree, or gradients stay non-finite.
        """
        totals = _Totals(self._world)
        value_fit = torch.zeros(5, dtype=torch.float64)
        if targets.return_TBJ is not None:
            mask = (batch.valid_TBK if targets.return_TBJ.shape[-1] > 1 else batch.valid_TBK.any(-1, keepdim=True)).float()
            value_fit = value_moments(batch.value_TBJ, targets.return_TBJ, mask)
        attempted, taken = 0, 0
        for epoch in range(self._settings.epochs):
            parts = slot_minibatches(targets.keep_TB, batch.slot_B, self._seed, update, epoch, self._settings.minibatches)
            for index in parts:
                samples = [_Sample.take(batch, targets, rows, weight, self._world.device) for rows, weight in self._pieces(index)]
                if samples:
                    taken += self._step(samples, totals, gate=attempted == 0)
                    attempted += 1
        metrics = totals.metrics()
        if targets.return_TBJ is not None:
            metrics["explained_variance"] = explained_variance(all_reduce_sum(self._world, value_fit))
        samples_kept = all_reduce_sum(self._world, targets.keep_TB.sum().double())
        return metrics | {"steps": float(taken), "skipped_steps": float(attempted - taken), "samples": float(samples_kept)}

    def _pieces(self, index: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's forward passes for one minibatch: as many, and as large, as on the rank with most samples."""
        most = int(all_reduce_max(self._world, torch.tensor(float(len(index)))))
        count = -(-most // self._settings.microbatch)
        return iter(microbatches(index, -(-most // count), count) if count else ())

    def _step(self, samples: list[_Sample], totals: _Totals, gate: bool) -> bool:
        """Gradient of one minibatch, summed over forward passes and ranks, then one optimiser step; False if it was refused."""
        level = self._algorithm.logprob
        action_dim = self.policy.spec.action_dim
        weights = [losses.level_mask(s.valid_BK, level, action_dim) * s.weight_B[:, None] for s in samples]
        # Added up in float64: in float32 the denominators would depend on how samples are shared out over ranks.
        value_weights = [s.value_mask_BJ for s in samples]
        sizes = torch.stack([torch.stack([w.double().sum() for w in group]).sum() for group in (weights, value_weights)])
        policy_size, value_size = all_reduce_sum(self._world, sizes).clamp(min=1e-12).unbind()
        for i, (sample, weight_BL) in enumerate(zip(samples, weights, strict=True)):
            self._beat()
            set_gradient_sync(self.policy.module, enabled=not self._keep_whole or i == len(samples) - 1)
            self._loss(sample, weight_BL, policy_size, value_size, totals, gate).backward()
        if not self.trains_policy:
            self._drop_policy_gradients()
        norm = clip_grad_norm(self.policy.module, self._settings.grad_clip)
        if gate:
            self._check_gap(totals)
        finite = bool(all_finite([norm]))
        if finite:
            self.optimizer.step()
            totals.add_norm(norm)
        else:
            self._dump(samples)
        self._refused = 0 if finite else self._refused + 1
        if self._refused >= SKIPPED_STEPS_LIMIT:
            raise WorkerError(f"update: the gradient was not finite {self._refused} times in a row.", "Lower update.learning_rate.")
        self.optimizer.zero_grad(set_to_none=True)
        return finite

    def _loss(self, s: _Sample, weight_BL: Tensor, policy_size: Tensor, value_size: Tensor, totals: _Totals, gate: bool) -> Tensor:
        """The loss of one forward pass, already divided by the global denominators."""
        a, level, K = self._algorithm, self._algorithm.logprob, s.valid_BK.shape[1]
        action_dim = self.policy.spec.action_dim
        scores = self.policy.evaluate(s.obs, s.token_BN, self._rollout.temperature, self._rollout.top_k, s.feature_BPF)
        logprob_BL = losses.ratio_level(scores.logprob_BN, s.valid_BK, level)
        old_logprob_BL = losses.ratio_level(s.logprob_BN.to(scores.logprob_BN.dtype), s.valid_BK, level)
        advantage_BL = losses.level_advantage(s.advantage_BJ, s.valid_BK, level, action_dim).expand_as(logprob_BL)
        policy, stats = losses.policy_loss(logprob_BL, old_logprob_BL, advantage_BL, weight_BL, a.clip[0], a.clip[1], a.dual_clip)
        stats |= {"policy_loss": policy.detach(), "weight": weight_BL.sum()}
        loss = policy / policy_size
        entropy = losses.entropy_sum(losses.ratio_level(scores.entropy_BN, s.valid_BK, level), weight_BL)
        stats["entropy"] = entropy.detach()
        if a.entropy_coef:
            loss = loss - a.entropy_coef * entropy / policy_size
        if self.reference is not None:
            with torch.no_grad():
                # Towers that do not learn are the reference's, too.
                reference = self.reference.evaluate(s.obs, s.token_BN, self._rollout.temperature, self._rollout.top_k, s.feature_BPF)
            kl = losses.kl_sum(logprob_BL, losses.ratio_level(reference.logprob_BN, s.valid_BK, level), weight_BL)
            stats["kl"] = kl.detach()
            loss = loss + a.kl_coef * kl / policy_size
        if isinstance(a, Ppo):
            assert s.return_BJ is not None
            value, value_stats = losses.value_loss(scores.value_BJ, s.value_BJ, s.return_BJ, s.value_mask_BJ, a.value_clip, a.huber)
            stats |= value_stats | {"value_loss": value.detach()}
            loss = loss + a.value_coef * value / value_size
        else:
            loss = loss + 0.0 * scores.value_BJ.sum()  # the unused value head still takes part in FSDP's reduction
        if gate:
            executed_BN = losses.level_mask(s.valid_BK, "token", s.token_BN.shape[1] // K) & (s.weight_B > 0)[:, None]
            stats |= logprob_gap(scores.logprob_BN, s.logprob_BN, executed_BN)
        totals.add(stats)
        return loss

    def _drop_policy_gradients(self) -> None:
        """Before they are clipped or remembered: at a rate of 0 they would still fill Adam's moments, with what an untaught critic says."""
        for group in self.optimizer.param_groups:
            if group["name"] != "value":
                for parameter in group["params"]:
                    parameter.grad = None

    def _dump(self, samples: list[_Sample]) -> None:
        """Leave this rank's samples of a refused step for inspection."""
        if self._dump_dir is not None:
            self._dump_dir.mkdir(parents=True, exist_ok=True)
            torch.save([vars(s) | {"obs": vars(s.obs)} for s in samples], self._dump_dir / f"rank{self._world.rank}-{self._refused}.pt")

    def _check_gap(self, totals: _Totals) -> None:
        """Stop before the first step if acting and learning do not agree on what was likely."""
        gap = totals.gap()
        if not gap <= self._settings.logprob_gap_limit:
            raise WorkerError(
                f"update: rollout and training log-probs differ by {gap:.3g} nats per token on average, "
                f"more than update.logprob_gap_limit = {self._settings.logprob_gap_limit}.",
                "Acting and learning must see the same weights, images, temperature and dtype.",
            )


@dataclass(frozen=True)
class _Sample:
    """One forward pass's worth of samples, on the learner's device; rows of weight 0 are padding."""

    obs: Observation
    feature_BPF: Tensor | None
    token_BN: Tensor
    logprob_BN: Tensor
    value_BJ: Tensor
    advantage_BJ: Tensor
    return_BJ: Tensor | None
    valid_BK: Tensor
    value_mask_BJ: Tensor
    weight_B: Tensor

    @staticmethod
    def take(batch: TrajectoryBatch, targets: Targets, rows: Tensor, keep_B: Tensor, device: torch.device) -> _Sample:
        """Rows of the flattened [T * B] batch; `keep_B` is 0 for padding."""

        def pick(x: Tensor) -> Tensor:
            return x.flatten(0, 1)[rows].to(device)

        valid_BK = pick(batch.valid_TBK) & (keep_B > 0).to(device)[:, None]
        mask_BK = valid_BK if batch.value_TBJ.shape[-1] > 1 else valid_BK.any(-1, keepdim=True)
        kept = batch.feature_TBPF.numel() > 0
        image = batch.image_TBVHWC.flatten(0, 1)[rows]
        sentences = tuple(batch.instructions[i] for i in batch.instruction_TB.flatten()[rows].tolist())
        return _Sample(
            obs=Observation(image if kept else image.to(device), pick(batch.state_TBD), sentences),  # frames are looked at without features
            feature_BPF=pick(batch.feature_TBPF) if kept else None,
            token_BN=pick(batch.token_TBN),
            logprob_BN=pick(batch.logprob_TBN),
            value_BJ=pick(batch.value_TBJ),
            advantage_BJ=pick(targets.advantage_TBJ),
            return_BJ=None if targets.return_TBJ is None else pick(targets.return_TBJ),
            valid_BK=valid_BK,
            value_mask_BJ=mask_BK.float(),
            weight_B=pick(targets.weight_TB) * keep_B.to(device),
        )


class _Totals:
    """Sums of statistics over an update; read once at its end (and at the gate), so that no step waits for the device."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._sums = {name: torch.zeros((), dtype=torch.float64, device=world.device) for name in SUMS}
        self._maxima = {name: torch.zeros((), dtype=torch.float64, device=world.device) for name in MAXIMA}
        self._norms: list[Tensor] = []

    def add(self, stats: dict[str, Tensor]) -> None:
        for name, value in stats.items():
            if name in self._sums:
                self._sums[name] += value
            elif name in self._maxima:
                self._maxima[name] = torch.maximum(self._maxima[name], value.double())

    def add_norm(self, norm: Tensor) -> None:
        self._norms.append(norm)

    def gap(self) -> float:
        total, count = all_reduce_sum(self._world, torch.stack([self._sums["gap_sum"], self._sums["gap_count"]])).tolist()
        return total / max(count, 1.0)

    def metrics(self) -> dict[str, float]:
        """Means over all ranks, by the names of docs/metrics.md (without the update/ prefix)."""
        values = all_reduce_sum(self._world, torch.stack([self._sums[n] for n in SUMS])).tolist()
        sums = dict(zip(SUMS, values, strict=True))
        maxima = dict(zip(MAXIMA, all_reduce_max(self._world, torch.stack([self._maxima[n] for n in MAXIMA])).tolist(), strict=True))
        weight, count, value_count = max(sums["weight"], 1e-12), max(sums["count"], 1.0), max(sums["value_count"], 1.0)
        return {
            "policy_loss": sums["policy_loss"] / weight,
            "value_loss": sums["value_loss"] / value_count,
            "entropy": sums["entropy"] / weight,
            "kl_reference": sums["kl"] / weight,
            "approx_kl": sums["approx_kl"] / count,
            "ratio": sums["ratio"] / count,
            "ratio_max": maxima["ratio_max"],
            "clip_fraction": sums["clipped"] / count,
            "logprob_gap": sums["gap_sum"] / max(sums["gap_count"], 1.0),
            "logprob_gap_max": maxima["gap_max"],
            "grad_norm": float(torch.stack(self._norms).mean()) if self._norms else 0.0,
        }
