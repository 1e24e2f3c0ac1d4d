"""Owns the torch-free facts about simulators: EpisodeSpec and EnvSpec. Stdlib only, Python 3.8 grammar (env hosts import it)."""
from __future__ import annotations

from dataclasses import dataclass

EVAL_INIT_STATE = 2**20  # training draws its initial states below this number, evaluation from it upwards


@dataclass(frozen=True)
class EpisodeSpec:
    """Everything that fixes one episode. Nothing in a simulator advances a counter of its own.

    uid: unique number of the episode within a run or an evaluation; keys the sampling noise.
    task: index into `EnvSpec.tasks`.
    init_state: id of the initial state; training and evaluation use disjoint ranges.
    seed: the simulator's seed for whatever `init_state` does not fix.
    group: GRPO group number, -1 where there is none. Episodes of a group share task, init_state and seed.
    """

    uid: int
    task: int
    init_state: int
    seed: int
    group: int = -1


@dataclass(frozen=True)
class EnvSpec:
    """What a simulator offers, for `plan` to hold against a policy's PolicySpec.

    tasks: names, indexed by EpisodeSpec.task. views: number of RGB cameras. height, width: pixels.
    state_dim: length of the proprioceptive vector (0: none). action_dim: numbers per action, each in [-1, 1]
    before un-normalisation. horizon: control steps after which an episode is truncated. slot_bytes: memory of a slot that is played in a
    process of its own; 0: slots live in the rank. gpu_batch_bytes, gpu_slot_bytes: device memory where a rank with a GPU plays the slots
    itself instead, of a batch and of every slot in it; 0: a GPU makes no difference. process_gpu_bytes: device memory of a process of
    slots that draws on a GPU.
    """

    name: str
    tasks: tuple[str, ...]
    views: int
    height: int
    width: int
    state_dim: int
    action_dim: int
    horizon: int
    slot_bytes: int = 0
    gpu_batch_bytes: int = 0
    gpu_slot_bytes: int = 0
    process_gpu_bytes: int = 0

    def hosted(self, device: str) -> bool:
        """Whether a rank on `device` (cpu, cuda) has the slots played in processes of their own."""
        return self.slot_bytes > 0 and not (device == "cuda" and self.gpu_slot_bytes > 0)
