"""What the rest of vlarl relies on in tabletop: exact episodes in any batch, flags, pictures, and an expert that solves every family."""
from __future__ import annotations

import pytest
import torch

from vlarl.envs.spec import EpisodeSpec
from vlarl.envs.tabletop import render
from vlarl.envs.tabletop.env import Tabletop
from vlarl.envs.tabletop.spec import EVAL_INIT_STATE, TASKS, VARIATIONS, env_spec, sentences
from vlarl.errors import RecipeError
from vlarl.types import ChunkResult

CPU = torch.device("cpu")


def make(slots: int, tasks: tuple[str, ...] = TASKS, variation: str = "train", horizon: int = 48, size: int = 64, wrist: bool = False,
         reward: str = "sparse") -> Tabletop:
    return Tabletop(slots, tasks, variation, horizon, size, wrist, reward, CPU)


def specs(count: int, first: int = 0, tasks: int = 3) -> list[EpisodeSpec]:
    return [EpisodeSpec(uid=i, task=i % tasks, init_state=i, seed=5) for i in range(first, first + count)]


def everyone(sim: Tabletop) -> torch.Tensor:
    return torch.ones(sim.num_slots, dtype=torch.bool)


def actions(slots: int, steps: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(slots, steps, 7, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def play_expert(sim: Tabletop, clumsiness: float = 0.0, noise: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """(success_B, length_B) of one episode per slot, in chunks of 4; noise disturbs what is executed in a third of the chunks."""
    success, length = torch.zeros(sim.num_slots, dtype=torch.bool), torch.zeros(sim.num_slots, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(-(-sim.spec.horizon // 4)):
        chunk = sim.expert_chunk(4, clumsiness)
        disturbed = torch.rand(sim.num_slots, 1, 1, generator=generator) < 1 / 3
        result = sim.step_chunk(chunk + noise * torch.randn(chunk.shape, generator=generator) * disturbed, everyone(sim))
        success |= result.success_B
        length += result.valid_BK.sum(1)
    return success, length


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("variation", VARIATIONS)
def test_expert_solves_every_family_in_every_variation(task: str, variation: str) -> None:
    sim = make(100, (task,), variation, horizon=32)
    sim.reset(torch.arange(100), specs(100, first=EVAL_INIT_STATE, tasks=1))
    success, length = play_expert(sim)
    assert success.sum() >= 95
    if variation == "train":
        assert length[success].max() <= {"put": 24, "push": 16, "touch": 8}[task]


@pytest.mark.parametrize("task", TASKS)
def test_expert_recovers_from_disturbed_actions_and_misses_when_clumsy(task: str) -> None:
    sim = make(100, (task,))
    sim.reset(torch.arange(100), specs(100, tasks=1))
    assert play_expert(sim, noise=0.7)[0].sum() >= 95
    sim.reset(torch.arange(100), specs(100, tasks=1))
    assert play_expert(sim, clumsiness=1.0)[0].sum() == 0
    sim.reset(torch.arange(100), specs(100, tasks=1))
    assert 20 <= play_expert(sim, clumsiness=0.6)[0].sum() <= 60


@pytest.mark.parametrize("variation", VARIATIONS)
def test_episode_is_bit_identical_alone_and_in_any_slot_of_a_batch(variation: str) -> None:
    """Slot 0 of 1 against slot 4 of 7 with other episodes around it: pictures, state, flags and expert."""
    alone, crowd = make(1, variation=variation, wrist=True), make(7, variation=variation, wrist=True)
    for task in range(3):
        spec = EpisodeSpec(uid=99, task=task, init_state=123, seed=8)
        others = specs(7)
        others[4] = spec
        alone.reset(torch.tensor([0]), [spec])
        crowd.reset(torch.arange(7), others)
        moves = actions(7, 12, seed=task)
        for t in range(3):
            chunk = moves[:, 4 * t : 4 * t + 4]
            assert torch.equal(alone.expert_chunk(4, 0.3)[0], crowd.expert_chunk(4, 0.3)[4])
            one, many = alone.step_chunk(chunk[4:5], everyone(alone)), crowd.step_chunk(chunk, everyone(crowd))
            for field in ("reward_BK", "terminated_BK", "truncated_BK", "valid_BK", "success_B"):
                assert torch.equal(getattr(one, field)[0], getattr(many, field)[4]), field
            see_one, see_many = alone.observe(torch.tensor([0])), crowd.observe(torch.arange(7))
            assert torch.equal(see_one.image_BVHWC[0], see_many.image_BVHWC[4])
            assert torch.equal(see_one.state_BD[0], see_many.state_BD[4])
            assert see_one.instruction[0] == see_many.instruction[4]


def test_the_same_family_draws_the_same_scene_whatever_tasks_are_listed() -> None:
    listed, single = make(1), make(1, ("push",))
    listed.reset(torch.tensor([0]), [EpisodeSpec(0, 1, 7, 3)])
    single.reset(torch.tensor([0]), [EpisodeSpec(0, 0, 7, 3)])
    assert listed.instruction(torch.tensor([0])) == single.instruction(torch.tensor([0]))
    assert torch.equal(listed.observe(torch.tensor([0])).image_BVHWC, single.observe(torch.tensor([0])).image_BVHWC)


def test_partial_reset_leaves_the_others_alone() -> None:
    sim = make(4)
    sim.reset(torch.arange(4), specs(4))
    sim.step_chunk(actions(4, 4), everyone(sim))
    before = sim.observe(torch.tensor([0, 2]))
    untouched = sim.observe(torch.tensor([1]))
    sim.reset(torch.tensor([3, 1]), specs(2, first=20))
    after = sim.observe(torch.tensor([0, 2]))
    assert torch.equal(before.image_BVHWC, after.image_BVHWC) and torch.equal(before.state_BD, after.state_BD)
    assert not torch.equal(untouched.image_BVHWC, sim.observe(torch.tensor([1])).image_BVHWC)


@pytest.mark.parametrize("variation", ["train", "execution"])
def test_a_chunk_is_its_single_steps(variation: str) -> None:
    whole, single = make(6, variation=variation, reward="shaped"), make(6, variation=variation, reward="shaped")
    for sim in (whole, single):
        sim.reset(torch.arange(6), specs(6))
    moves = whole.expert_chunk(24, 0.0)
    together = whole.step_chunk(moves, everyone(whole))
    apart = [single.step_chunk(moves[:, k : k + 1], everyone(single)) for k in range(24)]
    for field in ("reward_BK", "terminated_BK", "truncated_BK", "valid_BK"):
        assert torch.equal(getattr(together, field), torch.cat([getattr(r, field) for r in apart], 1)), field
    assert torch.equal(whole.observe(torch.arange(6)).image_BVHWC, single.observe(torch.arange(6)).image_BVHWC)


def test_flags_at_the_horizon() -> None:
    """Horizon 6 in chunks of 4: actions 4 and 5 of the episode are valid, the flag is on the last, then the slot is idle."""
    sim = make(2, ("put",), horizon=6)
    sim.reset(torch.arange(2), specs(2, tasks=1))
    still = torch.zeros(2, 4, 7)
    first = sim.step_chunk(still, everyone(sim))
    assert first.valid_BK.all() and not first.truncated_BK.any() and not first.terminated_BK.any()
    second = sim.step_chunk(still, torch.tensor([True, False]))
    assert second.valid_BK.tolist() == [[True, True, False, False], [False] * 4]
    assert second.truncated_BK.tolist() == [[False, True, False, False], [False] * 4]
    assert not second.terminated_BK.any() and not second.success_B.any()
    third = sim.step_chunk(still, everyone(sim))
    assert third.valid_BK.tolist() == [[False] * 4, [True, True, False, False]]


def test_flags_at_success() -> None:
    sim = make(3, ("touch",))
    sim.reset(torch.arange(3), specs(3, tasks=1))
    result: ChunkResult = sim.step_chunk(sim.expert_chunk(12, 0.0), everyone(sim))
    assert result.success_B.all() and not result.truncated_BK.any()
    for slot in range(3):
        last = int(result.valid_BK[slot].sum()) - 1
        assert result.valid_BK[slot].tolist() == [k <= last for k in range(12)]
        assert result.terminated_BK[slot].tolist() == [k == last for k in range(12)]
        assert result.reward_BK[slot].tolist() == [float(k == last) for k in range(12)]


def test_success_on_the_last_step_is_not_a_truncation() -> None:
    sim = make(1, ("touch",))
    sim.reset(torch.tensor([0]), specs(1))
    length = int(sim.step_chunk(sim.expert_chunk(12, 0.0), everyone(sim)).valid_BK.sum())
    sim = make(1, ("touch",), horizon=length)
    sim.reset(torch.tensor([0]), specs(1))
    result = sim.step_chunk(sim.expert_chunk(12, 0.0), everyone(sim))
    assert result.terminated_BK.sum() == 1 and not result.truncated_BK.any()


def test_shaped_reward_sums_to_success_plus_gained_progress() -> None:
    """The potential is 1 at success and at most 0.3 at the start of put and push: return in (1.7, 2]."""
    sim = make(30, ("put", "push"), reward="shaped")
    sim.reset(torch.arange(30), specs(30, tasks=2))
    total = sum(sim.step_chunk(sim.expert_chunk(8, 0.0), everyone(sim)).reward_BK.sum(1) for _ in range(6))
    assert (total > 1.69).all() and (total <= 2.0 + 1e-5).all()


def test_nothing_is_rendered_while_stepping(monkeypatch: pytest.MonkeyPatch) -> None:
    sim = make(2)
    sim.reset(torch.arange(2), specs(2))

    def forbidden(*_: object) -> None:
        raise AssertionError("rendered")

    monkeypatch.setattr(render, "picture", forbidden)
    monkeypatch.setattr(render, "background", forbidden)
    sim.step_chunk(actions(2, 8), everyone(sim))
    sim.expert_chunk(4, 0.5)


@pytest.mark.parametrize("size", [64, 100, 224])
def test_pictures_show_the_scene(size: int) -> None:
    sim = make(3, size=size, wrist=True)
    sim.reset(torch.arange(3), specs(3))
    seen = sim.observe(torch.arange(3))
    assert seen.image_BVHWC.shape == (3, 2, size, size, 3) and seen.image_BVHWC.dtype == torch.uint8
    assert seen.state_BD.shape == (3, 8) and seen.state_BD.dtype == torch.float32
    for view in seen.image_BVHWC.flatten(0, 1):
        assert 40 < view.float().mean() < 220 and len(view.flatten(0, 1).unique(dim=0)) > 20
    sim.step_chunk(torch.tensor([0.0, 0.0, -1.0, 0.0, 0.0, 0.0, -1.0]).expand(3, 1, 7), everyone(sim))
    changed = (sim.observe(torch.arange(3)).image_BVHWC != seen.image_BVHWC).flatten(2).any(-1)
    assert changed.all()


def test_observing_twice_or_by_rows_gives_the_same_bits() -> None:
    sim = make(5)
    sim.reset(torch.arange(5), specs(5))
    whole = sim.observe(torch.arange(5))
    rows = sim.observe(torch.tensor([3, 1]))
    assert torch.equal(whole.image_BVHWC[[3, 1]], rows.image_BVHWC)
    assert torch.equal(whole.image_BVHWC, sim.observe(torch.arange(5)).image_BVHWC)


def test_variations_differ_where_they_should() -> None:
    scenes = {}
    for variation in VARIATIONS:
        sim = make(12, variation=variation)
        sim.reset(torch.arange(12), specs(12))
        scenes[variation] = sim.observe(torch.arange(12))
    train = scenes["train"]
    for variation in VARIATIONS[1:]:
        differs = (scenes[variation].image_BVHWC.int() - train.image_BVHWC.int()).abs().float().flatten(1).mean(1)
        assert (differs > 1).all(), variation
    assert scenes["vision"].instruction == train.instruction and torch.equal(scenes["vision"].state_BD, train.state_BD)
    assert not set(scenes["semantics"].instruction) & set(sentences(TASKS, "train"))
    assert not torch.equal(scenes["execution"].state_BD, train.state_BD)
    for variation in VARIATIONS:
        assert set(scenes[variation].instruction) <= set(sentences(TASKS, variation))


def test_state_dict_restores_exactly() -> None:
    sim = make(6, variation="execution")
    sim.reset(torch.arange(6), specs(6))
    sim.step_chunk(actions(6, 10), everyone(sim))
    saved = sim.state_dict()
    expected = sim.step_chunk(actions(6, 8, seed=2), everyone(sim))
    frames = sim.observe(torch.arange(6))
    other = make(6, variation="execution")
    other.load_state_dict(saved)
    result = other.step_chunk(actions(6, 8, seed=2), everyone(other))
    assert torch.equal(expected.valid_BK, result.valid_BK) and torch.equal(expected.reward_BK, result.reward_BK)
    again = other.observe(torch.arange(6))
    assert torch.equal(frames.image_BVHWC, again.image_BVHWC) and torch.equal(frames.state_BD, again.state_BD)
    assert frames.instruction == again.instruction


def test_expert_chunk_leaves_the_state_alone() -> None:
    sim = make(3)
    sim.reset(torch.arange(3), specs(3))
    before = sim.observe(torch.arange(3))
    first, second = sim.expert_chunk(4, 0.0), sim.expert_chunk(4, 0.0)
    assert first.shape == (3, 4, 7) and torch.equal(first, second) and first.abs().max() <= 1
    assert torch.equal(before.image_BVHWC, sim.observe(torch.arange(3)).image_BVHWC)


def test_wrong_names_are_refused() -> None:
    with pytest.raises(RecipeError, match="pusch"):
        make(1, ("pusch",))
    with pytest.raises(RecipeError, match="foggy"):
        make(1, variation="foggy")
    spec = env_spec(("put",), 32, 64, True)
    assert (spec.views, spec.state_dim, spec.action_dim, spec.horizon, spec.tasks) == (2, 8, 7, 32, ("put",))
