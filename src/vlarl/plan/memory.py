"""Owns the memory estimate of one rank. Pure arithmetic, upper bounds, within about a third of the truth; torch-free.

Activations of a transformer layer: 34 bytes per token and hidden number in 2-byte precision (Korthikanti et al., "Reducing activation
recomputation in large transformer models", 2022, eq. 1), without the attention matrix, which fused attention never stores; 2 with
activation checkpointing, plus one layer in full. Parameters, gradients and Adam's moments: "ZeRO", Rajbhandari et al. 2020, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlarl.envs.spec import EnvSpec
from vlarl.plan.placement import MemoryRow, RolloutPlan, UpdatePlan
from vlarl.policies.spec import PolicySpec
from vlarl.recipe.schema import Recipe

Job = Literal["train", "sft", "eval"]
BYTES = {"float32": 4, "float64": 8, "bfloat16": 2}
BUFFER = "rollout buffer (frames as uint8)"
HOSTS = "simulator processes"
BINS = 256  # action bins: logits per token
ACTIVATION_BYTES = 34 / 2  # per token, hidden number and byte of precision
CHECKPOINTED_BYTES = 2 / 2
LAYERWISE_PARAMETERS = 50_000_000  # larger policies are gathered layer by layer while learning
PROCESS_BYTES = 600 * 2**20  # interpreter, torch and its libraries
CUDA_CONTEXT_BYTES = 700 * 2**20
RENDER_BYTES_PER_PIXEL = 64  # colour, depth and ray of one pixel while a frame is drawn


@dataclass(frozen=True)
class Sizes:
    """What the estimate depends on besides recipe and specs. learners: ranks that share the shards. slots: of one rank, which it
    simulates, acts for and learns from (0: does not). name: of the ranks that are so."""

    learners: int
    env_slots: int
    policy_slots: int
    sample_slots: int
    dtype: str
    device: Literal["cpu", "cuda"]
    name: str = "every rank"


def estimate(
    recipe: Recipe, policy: PolicySpec, env: EnvSpec, rollout: RolloutPlan, update: UpdatePlan, sizes: Sizes, job: Job
) -> tuple[MemoryRow, ...]:
    """Rows per rank. What stays resident in both phases is listed in both, so that a phase's rows add up to its need."""
    where: Literal["device", "host"] = "device" if sizes.device == "cuda" else "host"
    compute = BYTES[sizes.dtype]
    master = max(4, compute)
    resident: list[tuple[str, float]] = [("process and libraries", CUDA_CONTEXT_BYTES if sizes.device == "cuda" else PROCESS_BYTES)]
    rollout_rows, update_rows = list[tuple[str, float]](), list[tuple[str, float]]()
    if sizes.sample_slots:
        resident.append(("master weights, sharded", policy.parameters * master // sizes.learners))
        if job != "eval":
            resident.append(("Adam's moments, sharded", 2 * trainable_parameters(recipe, policy) * master // sizes.learners))
    if sizes.policy_slots:
        held = "policy gathered for acting" if sizes.sample_slots else "policy, whole, for acting"
        both = rollout_rows if sizes.sample_slots else resident
        both.append((held, policy.parameters * compute))
        rollout_rows.append(("activations while acting", _acting_bytes(policy, sizes.policy_slots, compute)))
    if sizes.env_slots:
        rollout_rows.append(("camera frames being drawn", sizes.env_slots * env.views * env.height * env.width * RENDER_BYTES_PER_PIXEL))
        if env.slot_bytes and where == "host":  # of a GPU machine's host memory nothing is known here
            sets = 2 if job == "train" and recipe.eval.every else 1  # an evaluation during training has simulators of its own
            resident.append((HOSTS, sets * sizes.env_slots * env.slot_bytes))
    if job != "eval":
        collected = _buffer_bytes(policy, env, rollout, sizes.policy_slots)
        if sizes.policy_slots:
            rollout_rows.append((BUFFER, collected))
        if sizes.sample_slots:
            update_rows.append((BUFFER, _buffer_bytes(policy, env, rollout, sizes.sample_slots)))
            update_rows += _learning_rows(recipe, policy, update, sizes, compute)
    phases = {"rollout": resident + rollout_rows} | ({"update": resident + update_rows} if job != "eval" else {})
    return tuple(
        MemoryRow(phase, name, where, int(size), sizes.name)  # type: ignore[arg-type]
        for phase, rows in phases.items()
        for name, size in rows
    )


def _learning_rows(recipe: Recipe, policy: PolicySpec, update: UpdatePlan, sizes: Sizes, compute: int) -> list[tuple[str, float]]:
    master = max(4, compute)
    rows: list[tuple[str, float]] = [("gradients, sharded", trainable_parameters(recipe, policy) * master // sizes.learners)]
    rows.append(("weights gathered while learning", _gathered(policy) * compute * 2))
    microbatch = max([update.microbatch, *(phase.batch // sizes.learners for phase in recipe.warmstart)])
    rows.append((f"activations of {microbatch} samples", _activation_bytes(recipe, policy, microbatch, compute)))
    if recipe.algorithm.kl_coef > 0 and recipe.policy.lora is None:
        rows.append(("reference policy, sharded", policy.parameters * compute // sizes.learners))
    return rows


def phase_bytes(rows: tuple[MemoryRow, ...], phase: str, ranks: str | None = None) -> int:
    """Sum over one phase: of the ranks named so, or of those that need most."""
    names = {row.ranks for row in rows} if ranks is None else {ranks}
    return max((sum(row.bytes for row in rows if row.phase == phase and row.ranks == name) for name in names), default=0)


def trainable_parameters(recipe: Recipe, policy: PolicySpec) -> int:
    """Frozen parts are not told apart: an upper bound. LoRA: two factors for each of a layer's seven matrices, 3 hidden sizes each."""
    if recipe.policy.lora is None:
        return policy.parameters
    return min(policy.parameters, recipe.policy.lora.rank * policy.layers * 7 * 3 * policy.hidden_size)


def checkpoint_bytes(recipe: Recipe, policy: PolicySpec, dtype: str) -> int:
    """Disk for the checkpoints that are kept, one more while it is written, and the policy folder inside each."""
    master = max(4, BYTES[dtype])
    one = policy.parameters * master * 2 + trainable_parameters(recipe, policy) * master * 2
    return one * (recipe.checkpoint.keep + 2)


def _gathered(policy: PolicySpec) -> int:
    """Parameters that are whole on a rank at a time while learning: two layers (the next is fetched early), or all of a small policy."""
    if policy.parameters <= LAYERWISE_PARAMETERS:
        return policy.parameters
    return 2 * policy.parameters // max(1, policy.layers)


def _activation_bytes(recipe: Recipe, policy: PolicySpec, samples: int, compute: int) -> float:
    per_layer = samples * policy.sequence_length * policy.hidden_size * compute * ACTIVATION_BYTES
    layers = per_layer * policy.layers
    if recipe.update.activation_checkpointing:
        layers = per_layer * CHECKPOINTED_BYTES / ACTIVATION_BYTES * policy.layers + per_layer
    logits = samples * policy.chunk * policy.action_dim * BINS * max(4, compute) * 3  # logits, log-softmax, gradient
    return layers + logits


def _acting_bytes(policy: PolicySpec, slots: int, compute: int) -> float:
    """Without gradients one layer's activations live at a time."""
    one_layer = slots * policy.sequence_length * policy.hidden_size * compute * ACTIVATION_BYTES
    return one_layer + slots * policy.chunk * policy.action_dim * BINS * max(4, compute) * 3


def _buffer_bytes(policy: PolicySpec, env: EnvSpec, rollout: RolloutPlan, slots: int) -> int:
    tokens = policy.chunk * policy.action_dim
    frame = env.views * env.height * env.width * 3 + env.state_dim * 4
    sample = frame + tokens * (8 + 4) + policy.chunk * (4 + 4 + 3) + 16  # token, log-prob; value, reward, flags; indices
    steps = rollout.chunk_steps or rollout.episodes_per_slot * rollout.chunks_per_episode
    return slots * (steps + 1) * sample
