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
BINS = 256  # action bins: logits per token
ACTIVATION_BYTES = 34 / 2  # per token, hidden number and byte of precision
CHECKPOINTED_BYTES = 2 / 2
LAYERWISE_PARAMETERS = 50_000_000  # larger policies are gathered layer by layer while learning
PROCESS_BYTES = 600 * 2**20  # interpreter, torch and its libraries
CUDA_CONTEXT_BYTES = 700 * 2**20
RENDER_BYTES_PER_PIXEL = 64  # colour, depth and ray of one pixel while a frame is drawn


@dataclass(frozen=True)
class Sizes:
    """What the estimate depends on besides recipe and specs. ranks: learner ranks that share the shards. slots: of one rank."""

    ranks: int
    slots: int
    dtype: str
    device: Literal["cpu", "cuda"]


def estimate(
    recipe: Recipe, policy: PolicySpec, env: EnvSpec, rollout: RolloutPlan, update: UpdatePlan, sizes: Sizes, job: Job
) -> tuple[MemoryRow, ...]:
    """Rows per rank. What stays resident in both phases is listed in both, so that a phase's rows add up to its need."""
    where: Literal["device", "host"] = "device" if sizes.device == "cuda" else "host"
    compute = BYTES[sizes.dtype]
    master = max(4, compute)
    base = [("process and libraries", CUDA_CONTEXT_BYTES if sizes.device == "cuda" else PROCESS_BYTES)]
    base.append(("master weights, sharded", policy.parameters * master // sizes.ranks))
    if job != "eval":
        base.append(("Adam's moments, sharded", 2 * trainable_parameters(recipe, policy) * master // sizes.ranks))
    acting = [
        ("policy gathered for acting", policy.parameters * compute),
        ("activations while acting", _acting_bytes(policy, sizes, compute)),
    ]
    acting.append(("camera frames being drawn", sizes.slots * env.views * env.height * env.width * RENDER_BYTES_PER_PIXEL))
    rows = [MemoryRow("rollout", name, where, int(size)) for name, size in base + acting]
    if job == "eval":
        return tuple(rows)
    buffer = ("rollout buffer (frames as uint8)", _buffer_bytes(policy, env, rollout, sizes.slots))
    rows.append(MemoryRow("rollout", buffer[0], where, int(buffer[1])))
    learning: list[tuple[str, float]] = [buffer, ("gradients, sharded", trainable_parameters(recipe, policy) * master // sizes.ranks)]
    learning.append(("weights gathered while learning", _gathered(policy) * compute * 2))
    microbatch = max([update.microbatch, *(phase.batch // sizes.ranks for phase in recipe.warmstart)])
    learning.append((f"activations of {microbatch} samples", _activation_bytes(recipe, policy, microbatch, compute)))
    if recipe.algorithm.kl_coef > 0 and recipe.policy.lora is None:
        learning.append(("reference policy, sharded", policy.parameters * compute // sizes.ranks))
    return (*rows, *(MemoryRow("update", name, where, int(size)) for name, size in base + learning))


def phase_bytes(rows: tuple[MemoryRow, ...], phase: str) -> int:
    """Sum over one phase."""
    return sum(row.bytes for row in rows if row.phase == phase)


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


def _acting_bytes(policy: PolicySpec, sizes: Sizes, compute: int) -> float:
    """Without gradients one layer's activations live at a time."""
    one_layer = sizes.slots * policy.sequence_length * policy.hidden_size * compute * ACTIVATION_BYTES
    return one_layer + sizes.slots * policy.chunk * policy.action_dim * BINS * max(4, compute) * 3


def _buffer_bytes(policy: PolicySpec, env: EnvSpec, rollout: RolloutPlan, slots: int) -> int:
    tokens = policy.chunk * policy.action_dim
    frame = env.views * env.height * env.width * 3 + env.state_dim * 4
    sample = frame + tokens * (8 + 4) + policy.chunk * (4 + 4 + 3) + 16  # token, log-prob; value, reward, flags; indices
    steps = rollout.chunk_steps or rollout.episodes_per_slot * rollout.chunks_per_episode
    return slots * (steps + 1) * sample
