"""Which episode is played where: schedule, training feed with its allowance, list feed."""
from __future__ import annotations

import pytest

from helpers.fakes import episode
from vlarl.envs.spec import EVAL_INIT_STATE
from vlarl.rollout.episodes import ListFeed, TrainingFeed, TrainingSchedule


def test_uids_number_episodes_by_turns() -> None:
    schedule = TrainingSchedule(seed=3, slots=4, tasks=3, group_size=1)
    uids = [schedule.episode(slot, cursor).uid for cursor in range(3) for slot in range(4)]
    assert uids == list(range(12))


def test_tasks_take_turns_over_slots_and_in_each_slot() -> None:
    schedule = TrainingSchedule(seed=3, slots=4, tasks=3, group_size=1)
    assert [schedule.episode(slot, 0).task for slot in range(4)] == [0, 1, 2, 0]
    assert [schedule.episode(1, cursor).task for cursor in range(4)] == [1, 2, 0, 1]  # 1 + 4 cursor mod 3


def test_training_scenes_stay_below_evaluation_scenes_and_depend_on_the_seed() -> None:
    first = [TrainingSchedule(1, 4, 2, 1).episode(s, c).init_state for s in range(4) for c in range(50)]
    second = [TrainingSchedule(2, 4, 2, 1).episode(s, c).init_state for s in range(4) for c in range(50)]
    assert all(0 <= i < EVAL_INIT_STATE for i in first)
    assert len(set(first)) > 195  # 200 draws from a million: a repetition is a rarity
    assert first != second


def test_a_group_is_consecutive_slots_that_start_alike() -> None:
    schedule = TrainingSchedule(seed=3, slots=6, tasks=2, group_size=3)
    for cursor in range(3):
        specs = [schedule.episode(slot, cursor) for slot in range(6)]
        assert [s.group for s in specs] == [2 * cursor] * 3 + [2 * cursor + 1] * 3
        for group in (specs[:3], specs[3:]):
            assert len({(s.task, s.init_state, s.seed) for s in group}) == 1
        assert specs[0].init_state != specs[3].init_state
        assert [s.uid for s in specs] == [6 * cursor + slot for slot in range(6)]


def test_ungrouped_episodes_have_no_group() -> None:
    assert TrainingSchedule(3, 6, 2, 1).episode(2, 1).group == -1


def test_training_feed_never_ends_without_an_allowance() -> None:
    schedule = TrainingSchedule(1, 8, 2, 1)
    feed = TrainingFeed(schedule, range(4, 8))
    assert [feed.next(5) for _ in range(3)] == [schedule.episode(5, c) for c in range(3)]
    assert feed.next(7) == schedule.episode(7, 0)
    assert feed.cursor == [0, 3, 0, 1]


def test_training_feed_keeps_to_its_allowance_and_goes_on_after_the_next() -> None:
    schedule = TrainingSchedule(1, 2, 2, 1)
    feed = TrainingFeed(schedule, range(2))
    feed.allow(2)
    assert [feed.next(0) for _ in range(3)] == [schedule.episode(0, 0), schedule.episode(0, 1), None]
    assert feed.next(1) == schedule.episode(1, 0)
    feed.allow(1)  # counts from where each slot is
    assert [feed.next(0), feed.next(0)] == [schedule.episode(0, 2), None]
    assert [feed.next(1), feed.next(1)] == [schedule.episode(1, 1), None]
    assert feed.cursor == [3, 2]


def test_a_restored_cursor_goes_on_with_the_same_episodes() -> None:
    schedule = TrainingSchedule(1, 2, 2, 1)
    feed, resumed = TrainingFeed(schedule, range(2)), TrainingFeed(schedule, range(2))
    feed.next(0)
    resumed.cursor = list(feed.cursor)
    assert [resumed.next(0), resumed.next(1)] == [feed.next(0), feed.next(1)]


@pytest.mark.parametrize("slots", [1, 7, 50])
def test_list_feed_hands_out_every_row_once(slots: int) -> None:
    rows = [episode(uid, 3, True) for uid in range(20)]
    feed = ListFeed(rows, slots)
    played: list[int] = []
    for slot in reversed(range(slots)):  # whoever asks first
        while (spec := feed.next(slot)) is not None:
            assert spec.uid % slots == slot
            played.append(spec.uid)
        assert feed.next(slot) is None
    assert sorted(played) == list(range(20))
