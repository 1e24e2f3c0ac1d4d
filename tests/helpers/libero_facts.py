"""Owns the facts about the LIBERO adapter that its contract test judges: `python libero_facts.py SRC OUT`, run by LIBERO's interpreter.

Everything is played through the adapter's own interface, but for `reference`, which is LIBERO's own wrapper, used as its benchmark does.
"""
from __future__ import annotations

import json
import sys
import time

import numpy as np

sys.path.insert(0, sys.argv[1])
from vlarl.envs.libero import setup  # noqa: E402
from vlarl.envs.libero.env import Libero, axis_angle  # noqa: E402
from vlarl.envs.libero.spec import env_spec, reset_seed, stored_state  # noqa: E402
from vlarl.envs.spec import EpisodeSpec  # noqa: E402

SIZE, SETTLE = 64, 3
EPISODE = EpisodeSpec(0, 0, 3, 7)  # stored state 3
SPEC = env_spec(("libero_spatial-4", "libero_object-0"), 200, SIZE, True, "auto")  # the first has a drawer that is open from the start
ACTIONS = np.random.RandomState(0).uniform(-1, 1, (4, 7)).astype(np.float32)


def settings(**changes):
    options = {"gl": "auto", "assets": None, "render": "full", "settle_steps": SETTLE, "reset": "hard"}
    return {"libero": dict(options, **changes)}


def look(libero):
    image, state = np.zeros((2, SIZE, SIZE, 3), np.uint8), np.zeros(8, np.float32)
    libero.observe(image, state)
    return image, state


def played(libero, episode, chunks):
    """Frames and states after the reset and at the end of some chunks."""
    libero.reset(episode)
    seen = [look(libero)]
    for chunk in chunks:
        libero.play(chunk)
    seen.append(look(libero))
    return {"image": np.stack([i for i, _ in seen]), "state": np.stack([s for _, s in seen])}


def reference():
    """What LIBERO's own wrapper shows in the same episode; the gripper in robosuite's terms (-1 opens)."""
    make = setup.bring_up("auto", None, False)
    name = setup.task_names("libero_spatial")[4]
    env = make(bddl_file_name=setup.bddl_file("libero_spatial", name), camera_heights=SIZE, camera_widths=SIZE)
    env.env.object_property_initializers.clear()  # see Libero._place
    env.seed(reset_seed(EPISODE.seed, EPISODE.init_state))
    env.reset()
    obs = env.set_init_state(setup.stored_states("libero_spatial", name)[stored_state(EPISODE.init_state)])
    for _ in range(SETTLE):
        obs, _, _, _ = env.step([0, 0, 0, 0, 0, 0, -1])
    seen = [obs]
    for action in ACTIONS.astype(np.float64):
        action[6] = -1 if action[6] > 0.5 else 1
        obs, _, _, _ = env.step(action)
    seen.append(obs)
    env.close()
    images = [np.stack([o[k][::-1, ::-1] for k in ("agentview_image", "robot0_eye_in_hand_image")]) for o in seen]
    states = [np.concatenate([o["robot0_eef_pos"], axis_angle(o["robot0_eef_quat"]), o["robot0_gripper_qpos"]]) for o in seen]
    return {"image": np.stack(images), "state": np.stack(states).astype(np.float32)}


def where_it_is(libero, thing):
    """The pixel (row, column) at which a thing is seen, found by making it transparent; and the one of an upright picture, by the
    camera's own geometry."""
    sim, body = libero._env.sim, libero._env.obj_body_id[thing]
    seen = look(libero)[0][0].astype(int)
    parts = [g for g in range(sim.model.ngeom) if sim.model.geom_bodyid[g] == body]
    sim.model._model.geom_rgba[parts, 3] = 0
    changed = np.argwhere(np.abs(look(libero)[0][0] - seen).sum(-1) > 30)
    camera = sim.model.camera_name2id("agentview")
    right, up, back = sim.data.cam_xmat[camera].reshape(3, 3).T @ (sim.data.body_xpos[body] - sim.data.cam_xpos[camera])
    scale = -back * np.tan(np.radians(sim.model.cam_fovy[camera]) / 2)
    upright = SIZE / 2 * np.array([1 - up / scale, 1 + right / scale])
    return {"seen": changed.mean(0).tolist(), "upright": upright.tolist(), "size": len(changed)}


def pictures_in_a_chunk(libero):
    """How often a camera is rendered by a reset and a chunk, and by a look at what both cameras see."""
    libero.reset(EPISODE)
    taken, render = [], libero._env.sim.render
    libero._env.sim.render = lambda **how: (taken.append(1), render(**how))[1]
    libero.play(ACTIONS)
    within = len(taken)
    look(libero)
    del libero._env.sim.render
    return [within, len(taken) - within]


def main(out):
    start = time.perf_counter()
    note = lambda what: print(f"{time.perf_counter() - start:7.1f} s  {what}", flush=True)  # noqa: E731
    libero = Libero(settings(), SPEC)
    arrays = {"chunk": played(libero, EPISODE, [ACTIONS]), "single": played(libero, EPISODE, [ACTIONS[k : k + 1] for k in range(4)])}
    note("episodes")
    arrays["other"] = played(libero, EpisodeSpec(0, 0, 53, 7), [])  # the same stored state, other fixtures
    libero._options["reset"] = "soft"
    arrays["soft"] = played(libero, EPISODE, [ACTIONS])
    note("soft")
    facts = {"pictures": pictures_in_a_chunk(libero), "sentence": libero.reset(EpisodeSpec(0, 1, 0, 0))}
    facts |= {"seen": [where_it_is(libero, f"{name}_1") for name in ("tomato_sauce", "milk")], "torch": "torch" in sys.modules}
    note("pictures")
    libero.close()
    arrays["reference"] = reference()
    note("reference")
    fast = Libero(settings(render="fast"), SPEC)
    arrays["fast"] = played(fast, EPISODE, [ACTIONS])
    np.savez(out, facts=json.dumps(facts), **{f"{a}_{b}": v for a, part in arrays.items() for b, v in part.items()})


main(sys.argv[2])
