"""Owns the table of policy families: what builds one, and what the planner and the reader of a folder need to know of it. Torch-free."""
from __future__ import annotations

from typing import Any, NamedTuple

from vlarl.errors import CheckpointError

LLAMA_BLANK = 29871  # the lone "▁" of Llama's vocabulary
ALOHA_DIM = 14  # numbers of an action of two arms


class Family(NamedTuple):
    """factory: "module:function", (config, value outputs) -> PolicyModule.

    kv_cache: whether it decodes token after token and keeps keys and values of all layers meanwhile. one_action: whether its chunks are
    one action. chunk, stop_token, epsilon: as its authors have them, for published folders, which do not say (see OpenVLAConfig).
    """

    factory: str
    kv_cache: bool
    one_action: bool
    chunk: int
    stop_token: bool
    epsilon: bool


# By the kind that recipes and folders name.
POLICIES = {
    "openvla": Family("vlarl.policies.openvla:build_openvla", kv_cache=True, one_action=True, chunk=1, stop_token=False, epsilon=False),
    "openvla-oft": Family(
        "vlarl.policies.openvla_oft:build_openvla_oft", kv_cache=False, one_action=False, chunk=8, stop_token=True, epsilon=True
    ),
}


def family(kind: str, where: str) -> Family:
    """The table's row. CheckpointError names the known kinds. where: the folder or file that is of this kind."""
    if kind not in POLICIES:
        raise CheckpointError(f"{where}: policy kind {kind!r} is not known.", f"Known: {', '.join(POLICIES)}.")
    return POLICIES[kind]


def usual_settings(kind: str, action_dim: int, proprio_dim: int, head: str, where: str) -> dict[str, Any]:
    """The settings that are not in published files, as each family's authors have them: `EXTRAS` of layout.py."""
    row = family(kind, where)
    usual = {
        "kind": kind,
        "chunk": row.chunk,
        "action_dim": action_dim,
        "views": 1,
        "proprio_dim": proprio_dim,
        "stop_token": row.stop_token,
        "normalization": "quantiles",
        "epsilon": row.epsilon,
        "blank_id": LLAMA_BLANK,
        "value_outputs": 0,
        "resize": "pil",
        "crop": False,
        "head": head,
        "towers": {},
    }
    return usual | _usual_of_regression(action_dim) if head == "l1" else usual


def _usual_of_regression(action_dim: int) -> dict[str, Any]:
    """What differs where an L1 head lies beside the weights: only OpenVLA-OFT's authors publish those, and their evaluation resizes by
    lanczos and crops. Their LIBERO policies see two views, their ALOHA ones (two arms: 14 numbers) three, with settings of their own."""
    frames: dict[str, Any] = {"resize": "lanczos", "crop": True}
    if action_dim == ALOHA_DIM:
        return frames | {"views": 3, "chunk": 25, "normalization": "bounds"}
    return frames | {"views": 2}
