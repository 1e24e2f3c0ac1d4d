"""Owns stored value heads: whose names they have, how many values they give, and whether one is taken over. Torch-free."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vlarl.policies.weight_files import VALUE_HEAD, Stored

LAST = f"{VALUE_HEAD}mlp.4.weight"  # a row per value
# RL4VLA's names of the same three layers. RLinf's are ours.
RENAMED = {f"{VALUE_HEAD}head_l{n}.": f"{VALUE_HEAD}mlp.{2 * n - 2}." for n in (1, 2, 3)}


@dataclass(frozen=True)
class Wanted:
    """The value head that a policy is built with. shapes: of all the module's tensors. outputs: what the folder's own settings say that
    the stored head has; None where it has no such settings: its head is somebody else's. asked: whether the recipe chose the number."""

    shapes: Mapping[str, tuple[int, ...]]
    outputs: int | None
    asked: bool


def with_our_names(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors of a folder, a value head's by our names."""
    named: dict[str, Stored] = {}
    for name, tensor in stored.items():
        old = next((old for old in RENAMED if name.startswith(old)), "")
        named[RENAMED[old] + name.removeprefix(old) if old else name] = tensor
    return named


def stored_outputs(stored: Mapping[str, Stored]) -> int:
    """How many values the stored head gives; 0 where there is none, or one of another kind."""
    last = with_our_names(stored).get(LAST)
    return last.shape[0] if last is not None and len(last.shape) == 2 else 0


def settle_head(stored: Mapping[str, Stored], wanted: Wanted) -> tuple[dict[str, Stored], str]:
    """The tensors to load, by our names, without a value head that is of no use here; and a line that says so ("": none is left out).

    Somebody else's head may be of any kind, and never keeps a policy from loading. One of ours must be what its folder says; it is of no
    use where the recipe has another number of actions per chunk than it was made for. Whatever else is wrong is for `check_fit` to name.
    """
    named = with_our_names(stored)
    found = {name: tensor.shape for name, tensor in named.items() if name.startswith(VALUE_HEAD)}
    shapes = {name: shape for name, shape in wanted.shapes.items() if name.startswith(VALUE_HEAD)}
    if not found or found == shapes:
        return named, ""
    if wanted.outputs is not None:
        intact = LAST in shapes and found == {**shapes, LAST: (wanted.outputs, *shapes[LAST][1:])}
        if wanted.asked or not intact:
            return named, ""
    differs = next(name for name in (*found, *shapes) if found.get(name) != shapes.get(name))
    has, asked = (f"is {table[differs]}" if differs in table else "is not there" for table in (found, shapes))
    line = f"value head left out, a fresh one starts: {differs} {has} in the checkpoint, and {asked} in this policy"
    return {name: tensor for name, tensor in named.items() if not name.startswith(VALUE_HEAD)}, line
