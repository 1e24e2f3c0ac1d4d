"""Owns what is known of published checkpoints before they are downloaded, so that a run with one can be planned anywhere. Stdlib only."""
from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

# What config.json of openvla/openvla-7b says about its shape; everything listed below was fine-tuned from it and has the same 982 tensors.
OPENVLA_7B: dict[str, Any] = {
    "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
    "image_sizes": [224, 224],
    "image_resize_strategy": "resize-naive",
    "text_config": {"model_type": "llama", "pad_token_id": 32000, "vocab_size": 32064},
    "pad_token_id": 32000,
    "pad_to_multiple_of": 64,
    "n_action_bins": 256,
}


class Published(NamedTuple):
    """unnorm_key: of the action statistics it is used with. action_dim, proprio_dim: numbers per action, and of the state that it reads."""

    kind: str
    unnorm_key: str
    action_dim: int = 7
    proprio_dim: int = 0


ROBOTWIN_TASKS = (
    *("beat_block_hammer", "handover_block", "lift_pot", "move_can_pot", "pick_dual_bottles", "place_container_plate", "place_empty_cup"),
)  # RLinf's seven
# By Hub id. All emit action tokens, from one view.
PUBLISHED = {
    "gen-robot/openvla-7b-rlvla-warmup": Published("openvla", "bridge_orig"),
    "RLinf/RLinf-OpenVLAOFT-ManiSkill-Base-Main": Published("openvla-oft", "bridge_orig"),
    "Haozhan72/Openvla-oft-SFT-libero-spatial-traj1": Published("openvla-oft", "libero_spatial_no_noops"),
    "Haozhan72/Openvla-oft-SFT-libero-object-traj1": Published("openvla-oft", "libero_object_no_noops"),
    "Haozhan72/Openvla-oft-SFT-libero-goal-traj1": Published("openvla-oft", "libero_goal_no_noops"),
    "Haozhan72/Openvla-oft-SFT-libero10-traj1": Published("openvla-oft", "libero_10_no_noops"),
    "RLinf/RLinf-OpenVLAOFT-LIBERO-90-Base-Lora": Published("openvla-oft", "libero_90_no_noops_trajall"),
    "RLinf/RLinf-OpenVLAOFT-LIBERO-130-Base-Lora": Published("openvla-oft", "libero_130_no_noops_trajall"),
    **{f"RLinf/RLinf-OpenVLAOFT-RoboTwin-SFT-{task}": Published("openvla-oft", f"{task}_1k", 14, 14) for task in ROBOTWIN_TASKS},
}


def download_hint(name: str, otherwise: str) -> str:
    """`otherwise`, and how to get a policy or an adapter that is not on this machine where its name may be a Hub id; where it rather is a
    folder's, mistyped, what there is of nearly that name."""
    parent = Path(name).expanduser().parent
    if name.startswith((".", "/", "~", "runs/")) or ("/" in name and parent.is_dir()):
        return f"{otherwise} {_near(Path(name).expanduser())}"
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is None:
        return otherwise
    return f"{otherwise} From the Hub: `hf download {name} --local-dir {name}`."


def _near(path: Path) -> str:
    """Folders beside `path` with names like its own, or what of the path is missing already."""
    if not path.parent.is_dir():
        return f"There is no folder {path.parent} either."
    beside = sorted(p.name for p in path.parent.iterdir() if p.is_dir() and not p.name.startswith("."))
    close = get_close_matches(path.name, beside, n=3, cutoff=0.5) or beside[:5]
    return f"In {path.parent} there is: {', '.join(close)}." if close else f"{path.parent} holds no folders."
