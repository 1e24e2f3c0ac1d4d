"""Owns evaluation protocols: a frozen record that fixes the list of episodes, whoever plays them and how many at a time. Torch-free."""
from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from vlarl.envs.spec import EVAL_INIT_STATE, EpisodeSpec


@dataclass(frozen=True)
class Protocol:
    """Everything about an evaluation but the policy. Two results may be compared if their protocols are equal.

    tasks: names; EpisodeSpec.task indexes them. variation: distribution of scenes. episodes: over all tasks. horizon: control steps.
    image_size: pixels. views: cameras. chunk: actions executed per forward pass. temperature: 0 is greedy. seed: of scenes and sampling.
    options: what else the simulator was told, as `name=value`.
    """

    name: str
    simulator: str
    tasks: tuple[str, ...]
    variation: str
    episodes: int
    horizon: int
    image_size: int
    views: int
    chunk: int
    temperature: float
    seed: int
    options: tuple[str, ...] = ()


def episodes(protocol: Protocol) -> tuple[EpisodeSpec, ...]:
    """The protocol's episodes in the order of their uid 0, 1, ...: tasks in turn, a new initial state after each round of tasks."""
    tasks, seed = len(protocol.tasks), protocol.seed
    return tuple(EpisodeSpec(uid=n, task=n % tasks, init_state=EVAL_INIT_STATE + n // tasks, seed=seed) for n in range(protocol.episodes))


def digest(protocol: Protocol) -> str:
    """16 hexadecimal digits that differ between protocols that differ in anything but their name."""
    content = {key: value for key, value in asdict(protocol).items() if key != "name"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
