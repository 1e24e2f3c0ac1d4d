"""Owns the memory estimate of one rank. Pure arithmetic, upper bounds, within about a third of the truth; torch-free.

Activations of a transformer layer: 34 bytes per token and hidden number in 2-byte precision (Korthikanti et al., "Reducing activation
recomputation in large transformer models", 2022, eq. 1), without the attention matrix, which fused attention never stores; 2 with
activation checkpointing, plus one layer in full. Parameters, gradients and Adam's moments: "ZeRO", Rajbhandari et al. 2020, section 3.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Literal

from vlarl.envs.spec import EnvSpec
from vlarl.plan.placement import MemoryRow, Phase, RolloutPlan, UpdatePlan
from vlarl.policies.spec import PolicySpec
from vlarl.recipe.schema import Part, Recipe

Job = Literal["train", "sft", "eval"]  # recording is planned as an evaluation
BYTES = {"float32": 4, "float64": 8, "bfloat16": 2}
BUFFER = "rollout buffer (frames as uint8)"
FEATURES = "frozen towers' features, kept for the update"
HOSTS = "simulator processes"  # begins the component's name; how many of what size follows
DRAWING = "drawing, by simulator processes"
SCENES = "simulator's scenes, never moved"
BINS = 256  # action bins: logits per token
ACTIVATION_BYTES = 34 / 2  # per token, hidden number and byte of precision
CHECKPOINTED_BYTES = 2 / 2
LAYERWISE_PARAMETERS = 50_000_000  # larger policies are gathered layer by layer while learning
PROCESS_BYTES = 600 * 2**20  # interpreter, torch and its libraries
CUDA_CONTEXT_BYTES = 1300 * 2**20  # with the kernels of its libraries, their workspaces and NCCL: measured on an H200
SCENE_BYTES = 4096  # state of one slot of an in-process simulator
RENDER_BYTES_PER_PIXEL = 64  # colour, depth and ray of one pixel while a frame is drawn


@dataclass(frozen=True)
class Sizes:
    """What the estimate depends on besides recipe and specs. learners: ranks that share the shards. slots: of one rank, which it
    simulates, acts for, learns from and evaluates (0: does not). name: of the ranks that are so."""

    learners: int
    env_slots: int
    policy_slots: int
    sample_slots: int
    evaluation_slots: int
    dtype: str
    device: Literal["cpu", "cuda"]
    name: str = "every rank"


@dataclass(frozen=True)
class _Line:
    """A MemoryRow before its phase. host: beside a GPU; on a CPU machine nothing is beside the device."""

    component: str
    bytes: float
    part: Part | None = None
    host: bool = False


def estimate(
    recipe: Recipe, policy: PolicySpec, env: EnvSpec, rollout: RolloutPlan, update: UpdatePlan, sizes: Sizes, job: Job
) -> tuple[MemoryRow, ...]:
    """Rows per rank, every part on the device. What stays resident is listed in every phase, so that a phase's rows add up to its need."""
    resident = _resident(recipe, policy, env, rollout.stages, sizes, job)
    collected = functools.partial(_collected, policy, env, rollout, BYTES[sizes.dtype] if update.reuse_features else 0)
    phases: dict[Phase, list[_Line]] = {}
    if job != "eval":
        critic = recipe.algorithm.kind == "ppo"
        of_stage = sizes.policy_slots // rollout.stages
        acting = _acting(recipe, policy, env, sizes, of_stage, sizes.env_slots, critic) + collected(sizes.policy_slots)
        # Only a rank that acts with a gathered copy does without its shards meanwhile.
        phases["rollout"] = [replace(line, part=None) if line.part == "weights" and not sizes.policy_slots else line for line in resident]
        phases["rollout"] += acting
        learning = _learning(recipe, policy, update, sizes) + collected(sizes.sample_slots) if sizes.sample_slots else []
        phases["update"] = [replace(line, part=None) for line in resident] + learning
    if sizes.evaluation_slots:
        phases["evaluation"] = resident + _acting(recipe, policy, env, sizes, sizes.evaluation_slots, sizes.evaluation_slots, False)
        if env.slot_bytes:  # an evaluation has simulators of its own
            scenes = _scenes(recipe, env, sizes, sizes.evaluation_slots, 1, " of evaluations")
            stay = env.hosted(sizes.device)  # processes wait for the next evaluation
            phases = {phase: lines + scenes if stay or phase == "evaluation" else lines for phase, lines in phases.items()}
    rows = []
    for phase, line in ((phase, line) for phase, lines in phases.items() for line in lines):
        where: Literal["device", "host"] = "host" if line.host and sizes.device == "cuda" else "device"
        rows.append(MemoryRow(phase, line.component, where, int(line.bytes), sizes.name, line.part))
    return tuple(rows)


def _resident(recipe: Recipe, policy: PolicySpec, env: EnvSpec, stages: int, sizes: Sizes, job: Job) -> list[_Line]:
    """What a rank holds from beginning to end."""
    compute = BYTES[sizes.dtype]
    master = max(4, compute)
    lines = [_Line("process and libraries", PROCESS_BYTES, host=True)]
    if sizes.device == "cuda":
        lines.append(_Line("CUDA context", CUDA_CONTEXT_BYTES))
    if sizes.sample_slots:
        trained = trainable_parameters(recipe, policy) if job != "eval" else 0
        added = trained if recipe.policy.lora is not None else 0  # adapters come on top
        frozen = (policy.parameters - (trained - added)) * compute  # held as it is used, without a master
        lines.append(_Line("weights, sharded", (trained * master + frozen) // sizes.learners, "weights"))
        if job != "eval":
            lines.append(_Line("Adam's moments, sharded", 2 * trained * master // sizes.learners, "optimizer"))
            if recipe.algorithm.kl_coef > 0:
                lines.append(_Line("reference policy, sharded", policy.parameters * compute // sizes.learners, "reference"))
    elif sizes.policy_slots:
        lines.append(_Line("policy, whole, for acting", policy.parameters * compute))
    if sizes.env_slots and job != "eval":
        lines += _scenes(recipe, env, sizes, sizes.env_slots, stages)
    return lines


def _scenes(recipe: Recipe, env: EnvSpec, sizes: Sizes, slots: int, batches: int, whose: str = "") -> list[_Line]:
    """What so many slots of a simulator take up between frames: on the device, in so many batches, or in processes of their own."""
    if env.hosted(sizes.device):
        each = min(recipe.env.slots_per_host, slots // batches)
        hosts = batches * -(-(slots // batches) // each)
        shape = f"{hosts} x {each} env{'s' if each > 1 else ''}, {each * env.slot_bytes / 2**30:.1f} GiB each"
        lines = [_Line(f"{HOSTS}{whose}: {shape}", slots * env.slot_bytes, host=True)]
        if sizes.device == "cuda" and env.process_gpu_bytes:
            lines.append(_Line(f"{DRAWING}{whose}", hosts * env.process_gpu_bytes))
        return lines
    if sizes.device == "cuda" and env.gpu_slot_bytes:
        return [_Line(SCENES, batches * env.gpu_batch_bytes + slots * env.gpu_slot_bytes)]
    return [_Line(SCENES, slots * SCENE_BYTES)]


def _acting(
    recipe: Recipe, policy: PolicySpec, env: EnvSpec, sizes: Sizes, policy_slots: int, env_slots: int, critic: bool
) -> list[_Line]:
    """Acting for so many slots, and simulating so many. critic: whether episodes that just ended are looked at too, all at once at most."""
    compute, lines, engine = BYTES[sizes.dtype], list[_Line](), recipe.policy.engine
    if policy_slots:
        if sizes.sample_slots:
            lines.append(_Line("policy gathered for acting", policy.parameters * compute))
        padded = engine.compile or engine.cuda_graphs
        rows = max(2 * policy_slots if critic or padded else policy_slots, *(engine.batch_sizes or (0,)))
        activations = _acting_bytes(policy, rows, compute)
        lines.append(_Line("activations while acting", activations))
        if engine.cuda_graphs and sizes.device == "cuda":  # they share a pool of their own
            lines.append(_Line("activations of captured CUDA graphs", activations))
    if env_slots:
        lines.append(_Line("camera frames being drawn", env_slots * env.views * env.height * env.width * RENDER_BYTES_PER_PIXEL))
    return lines


def _learning(recipe: Recipe, policy: PolicySpec, update: UpdatePlan, sizes: Sizes) -> list[_Line]:
    """Gradients exist from a minibatch's first backward to its step, so in no other phase."""
    compute, once = BYTES[sizes.dtype], _gathered(policy)
    gradients = trainable_parameters(recipe, policy) * max(4, compute)
    microbatch = max([update.microbatch, *(phase.batch // sizes.learners for phase in recipe.warmstart)])
    lines = [
        _Line("gradients, sharded", gradients // sizes.learners),
        _Line("weights and gradients gathered while learning", once * compute * 2),
        _Line(f"activations of {microbatch} samples", _activation_bytes(recipe, policy, microbatch, compute)),
    ]
    if update.accumulation > 1:
        more = (policy.parameters - once) * compute + max(0, gradients - once * compute)
        lines.append(_Line("the same, kept whole between passes", more, "gradients"))
    return lines


def _collected(policy: PolicySpec, env: EnvSpec, rollout: RolloutPlan, feature_bytes: int, slots: int) -> list[_Line]:
    """The rollout buffer, which lies on the host from the first and goes to the device in microbatches. feature_bytes: of one number of
    the towers' features; 0 where they are not kept."""
    samples = slots * _samples_per_slot(rollout)
    lines = [_Line(BUFFER, samples * _sample_bytes(policy, env), host=True)] if slots else []
    if slots and feature_bytes:
        lines.append(_Line(FEATURES, samples * policy.patches * policy.vision_width * feature_bytes, host=True))
    return lines


def trainable_parameters(recipe: Recipe, policy: PolicySpec) -> int:
    """Without parts that policy.freeze names. LoRA: two factors for each of a layer's seven matrices, 3 hidden sizes each."""
    vision, projector = policy.vision_parameters, policy.projector_parameters
    parts = {"vision": vision, "projector": projector, "language": policy.parameters - vision - projector}
    free = policy.parameters - sum(parts[part] for part in set(recipe.policy.freeze))
    if recipe.policy.lora is None:
        return free
    return min(free, recipe.policy.lora.rank * policy.layers * 7 * 3 * policy.hidden_size)


def checkpoint_bytes(recipe: Recipe, policy: PolicySpec, dtype: str) -> int:
    """Disk for the checkpoints that are kept and one more while it is written: policy folder (of adapters those alone, if their base lies
    somewhere), trained weights and their moments."""
    master, trained, p = max(4, BYTES[dtype]), trainable_parameters(recipe, policy), recipe.policy
    merged = p.checkpoint.startswith("scratch:") or p.adapter is not None and (p.lora is None or p.lora.start == "zero")
    alone = p.lora is not None and not merged
    one = (trained if alone else policy.parameters) * master + trained * master * 3
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
    """Without gradients one layer's activations live at a time; of a decoder with a cache, keys and values of all layers."""
    cache = slots * policy.sequence_length * 2 * policy.hidden_size * policy.layers * compute if policy.kv_cache else 0
    one_layer = slots * policy.sequence_length * policy.hidden_size * compute * ACTIVATION_BYTES
    return one_layer + cache + slots * policy.chunk * policy.action_dim * BINS * max(4, compute) * 3


def _samples_per_slot(rollout: RolloutPlan) -> int:
    steps = rollout.chunk_steps or rollout.episodes_per_slot * rollout.chunks_per_episode
    return (steps + 1) * rollout.rounds


def _sample_bytes(policy: PolicySpec, env: EnvSpec) -> int:
    tokens = policy.chunk * policy.action_dim
    frame = env.views * env.height * env.width * 3 + env.state_dim * 4
    return frame + tokens * (8 + 4) + policy.chunk * (4 + 4 + 3) + 16  # token, log-prob; value, reward, flags; indices
