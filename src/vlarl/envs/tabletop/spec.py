"""Owns the torch-free facts about tabletop: task families, variations, sentences and its EnvSpec. Stdlib only."""
from __future__ import annotations

from vlarl.envs.spec import EnvSpec
from vlarl.errors import RecipeError

TASKS = ("put", "push", "touch")
VARIATIONS = ("train", "vision", "semantics", "execution")
COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("cube", "ball", "can")
DIRECTIONS = ("left", "right", "forward", "back")  # as the camera sees them; forward is away from it
STATE_DIM = 8
ACTION_DIM = 7
EVAL_INIT_STATE = 2**20  # training draws init_state below, evaluation from here on

# Per family: the sentence of training first, then the paraphrases kept for the `semantics` set.
TEMPLATES = {
    "put": (
        "put the {object} on the {goal} plate",
        "place the {object} onto the {goal} plate",
        "set the {object} down on top of the {goal} plate",
        "move the {object} to the {goal} plate",
    ),
    "push": (
        "push the {object} {goal}",
        "shove the {object} {goal}",
        "slide the {object} {goal}",
        "make the {object} move {goal}",
    ),
    "touch": (
        "touch the {object}",
        "reach for the {object}",
        "bring the gripper to the {object}",
        "tap the {object}",
    ),
}


def sentence(family: str, template: int, colour: str, shape: str, goal: str) -> str:
    """The instruction of one episode. goal: the plate's colour (put) or a direction (push); unused for touch."""
    return TEMPLATES[family][template].format(object=f"{colour} {shape}", goal=goal)


def sentences(tasks: tuple[str, ...], variation: str) -> tuple[str, ...]:
    """Every instruction that a variation can give, for tokenizers and tests."""
    shapes = SHAPES if variation == "semantics" else SHAPES[:1]
    goals = {"put": COLOURS, "push": DIRECTIONS, "touch": ("",)}
    out = []
    for family in tasks:
        numbers = range(1, len(TEMPLATES[family])) if variation == "semantics" else range(1)
        out += [sentence(family, n, c, s, g) for n in numbers for c in COLOURS for s in shapes for g in goals[family]]
    return tuple(out)


def check_names(tasks: tuple[str, ...], variation: str) -> None:
    """Raises RecipeError for an unknown or repeated task family or an unknown variation."""
    problems = [f"env.tasks: got {t!r}, expected families among {', '.join(TASKS)}." for t in tasks if t not in TASKS]
    if len(set(tasks)) != len(tasks) or not tasks:
        problems.append(f"env.tasks: got {tasks!r}, expected one or more different families. Name each family once.")
    if variation not in VARIATIONS:
        problems.append(f"env.variation: got {variation!r}, expected one of {', '.join(VARIATIONS)}.")
    if problems:
        raise RecipeError(problems, "tabletop")


def env_spec(tasks: tuple[str, ...], horizon: int, image_size: int, wrist_camera: bool) -> EnvSpec:
    """What `plan` checks a policy against. Raises RecipeError for an unknown family."""
    check_names(tasks, "train")
    views = 2 if wrist_camera else 1
    return EnvSpec("tabletop", tuple(tasks), views, image_size, image_size, STATE_DIM, ACTION_DIM, horizon)
