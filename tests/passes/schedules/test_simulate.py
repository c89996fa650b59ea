"""The simulator: against drawings, against a slow one, and what it refuses."""

import dataclasses

import hypothesis
import pytest
from hypothesis import strategies as st

from alpa_lite.passes.schedules import (
    Schedule,
    ScheduleError,
    TaskTimes,
    equal_times,
    make_schedule,
    simulate,
)
from tests.passes.schedules.samples import (
    by_task,
    naive_times,
    schedules,
    straight_schedule,
    tasks,
    times_for,
)

TWO = {"forward_s": (1.0, 2.0), "backward_s": (3.0, 4.0)}


def test_two_stages_by_hand():
    """
    mesh 0   0 F0 1 F1 2            7 B0 10     13 B1 16
    mesh 1       1 F0 3   B0   7 F1 9   B1   13
    """
    timeline = simulate(make_schedule("1f1b", 2, 2), TaskTimes(**TWO))
    assert timeline.start_s == ((0, 1, 7, 13), (1, 3, 7, 9))
    assert timeline.end_s == ((1, 2, 10, 16), (3, 7, 9, 13))
    assert timeline.send_end_s == timeline.send_start_s == timeline.end_s
    assert timeline.busy_s == (8, 12)
    assert timeline.step_s == timeline.makespan_s == 16
    assert timeline.bubble_share == 1 - 20 / 32
    assert timeline.waiting_s == (8, 0)


def test_transfers_by_hand():
    """A transfer of 5 s: the second one waits for the first, and the meshes go on meanwhile."""
    times = TaskTimes(**TWO, forward_transfer_s=(5.0,), backward_transfer_s=(0.5,))
    timeline = simulate(make_schedule("1f1b", 2, 2), times)
    assert timeline.start_s[0][:2] == (0, 1)
    assert timeline.send_start_s[0][:2] == (1, 6)
    assert timeline.send_end_s[0][:2] == (6, 11)
    assert timeline.start_s[1] == (6, 8, 12, 14)
    assert timeline.send_end_s[1] == (8, 12.5, 14, 18.5)
    assert timeline.start_s[0][2:] == (12.5, 18.5)
    assert timeline.step_s == 21.5


def test_transfers_that_block_by_hand():
    """The sender stands still for 5 s, so its second forward starts at 6."""
    times = TaskTimes(**TWO, forward_transfer_s=(5.0,), backward_transfer_s=(0.5,))
    timeline = simulate(make_schedule("1f1b", 2, 2), times, overlap_transfers=False)
    assert timeline.start_s[0][:2] == (0, 6)
    assert timeline.send_end_s[0][:2] == (6, 12)
    assert timeline.start_s[1] == (6, 8, 12.5, 14.5)
    assert timeline.busy_s == (8, 12)  # standing still is not being busy


def test_directions_of_a_link_do_not_wait_for_each_other():
    schedule = make_schedule("1f1b", 2, 2)
    times = equal_times(2, transfer_s=10.0)
    timeline = simulate(schedule, times)
    there = timeline.send_start_s[0][1], timeline.send_end_s[0][1]
    back = timeline.send_start_s[1][1], timeline.send_end_s[1][1]
    assert there == (11, 21)
    assert back == (14, 24)


def test_stages_on_one_mesh_send_nothing():
    slow = dataclasses.replace(equal_times(2), forward_transfer_s=(9.0,))
    schedule = make_schedule("interleaved_1f1b", 1, 3, 2)
    assert simulate(schedule, slow).makespan_s == 3 * 2 * 3


def test_tail_follows_the_last_task_of_each_mesh():
    times = TaskTimes(**TWO, tail_s=(1.0, 9.0))
    timeline = simulate(make_schedule("1f1b", 2, 2), times)
    assert timeline.tail_start_s == (16, 13)
    assert timeline.step_s == 22
    assert timeline.makespan_s == 16


def test_tail_waits_for_the_other_copy():
    """Both meshes hold both stages; no microbatch goes up, and mesh 1 is done first."""
    down, up = (0, 1), (1, 0)
    lists = tasks("0F0 0B0\n1F0 1B0")
    times = dataclasses.replace(equal_times(2), tail_s=(1.0, 5.0))
    timeline = simulate(Schedule("custom", (down, up), (0,), lists), times)
    assert [ends[-1] for ends in timeline.end_s] == [6, 4]
    assert timeline.tail_start_s == (6, 6)
    assert timeline.step_s == 11
    assert simulate(Schedule("custom", (down,), (0,), lists), times).tail_start_s == (6, 4)


@hypothesis.settings(max_examples=150)
@hypothesis.given(
    st.data(), schedules(max_meshes=4, max_microbatches=6, max_virtual=3), st.booleans()
)
def test_equals_the_slow_simulator(data, schedule, overlap):
    times = data.draw(times_for(schedule))
    timeline = simulate(schedule, times, overlap_transfers=overlap)
    expected = naive_times(schedule, times, overlap)
    assert by_task(timeline) == {each: list(expected[each]) for each in expected}
    assert timeline.step_s == max(map(sum, zip(timeline.tail_start_s, times.tail_s, strict=True)))


@hypothesis.settings(max_examples=40)
@hypothesis.given(st.data(), schedules(max_meshes=6, max_microbatches=12))
def test_makespan_bounds(data, schedule):
    """No shorter than the busiest mesh, no longer than everything one after the other."""
    times = data.draw(times_for(schedule))
    timeline = simulate(schedule, times)
    sent = sum(
        end - start
        for starts, ends in zip(timeline.send_start_s, timeline.send_end_s, strict=True)
        for start, end in zip(starts, ends, strict=True)
    )
    assert max(timeline.busy_s) <= timeline.makespan_s <= sum(timeline.busy_s) + sent
    assert 0 <= timeline.bubble_share <= 1 - 1 / schedule.num_meshes or sent


def test_steps_without_time():
    timeline = simulate(make_schedule("1f1b", 2, 2), TaskTimes(forward_s=(0, 0), backward_s=(0, 0)))
    assert timeline.makespan_s == timeline.step_s == timeline.bubble_share == 0


def test_idle_mesh():
    schedule = straight_schedule("0F0 0B0")
    schedule = dataclasses.replace(schedule, tasks=(*schedule.tasks, ()))
    timeline = simulate(schedule, equal_times(1))
    assert timeline.busy_s == (3, 0)
    assert timeline.waiting_s == (0, 0)
    assert timeline.bubble_share == 0.5


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (
            TaskTimes(forward_s=(1.0, 1.0)),
            "backward_s has 0 entries, .*'1f1b' with 2 stages .* needs 2",
        ),
        (TaskTimes(forward_s=(1.0,), backward_s=(1.0, 1.0)), "forward_s has 1 entries, .* needs 2"),
        (TaskTimes(**TWO, backward_weight_s=(1.0,)), "backward_weight_s has 1 entries"),
        (TaskTimes(**TWO, forward_transfer_s=(1.0, 1.0)), "forward_transfer_s has 2 .* needs 1"),
        (TaskTimes(**TWO, tail_s=(1.0,)), "tail_s has 1 entries, .* on 2 meshes needs 2"),
    ],
)
def test_times_that_do_not_fit(times, message):
    with pytest.raises(ValueError, match=message):
        simulate(make_schedule("1f1b", 2, 2), times)


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_times_that_are_none(seconds):
    with pytest.raises(ValueError, match="backward_s must be finite and not negative"):
        TaskTimes(forward_s=(1.0,), backward_s=(seconds,))


def test_deadlock_names_the_cycle():
    rows = """
        0F0 0B0 0F1 0B1
        1F1 1F0 1B0 1B1
    """
    with pytest.raises(
        ScheduleError,
        match="deadlocks: mesh 0 waits at position 1 with the backward of stage 0, microbatch 0 for "
        "the backward of stage 1, microbatch 0, position 2 of mesh 1; mesh 1 waits at position 0 "
        "with the forward of stage 1, microbatch 1 for the forward of stage 0, microbatch 1, "
        "position 2 of mesh 0",
    ):
        simulate(straight_schedule(rows), equal_times(2))


def test_deadlock_with_oneself():
    with pytest.raises(
        ScheduleError,
        match="the schedule deadlocks: mesh 1 waits at position 0 with the backward of stage 1, "
        "microbatch 0 for the forward of stage 1, microbatch 0, position 1 of mesh 1$",
    ):
        simulate(straight_schedule("0F0 0B0\n1B0 1F0"), equal_times(2))


def test_deadlock_for_want_of_a_task():
    with pytest.raises(ScheduleError, match="position 0 with the backward .* that no task makes"):
        simulate(straight_schedule("0F0 0B0\n1B0"), equal_times(2))
