"""Bytes over time."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from alpa_lite.passes.schedules import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    StageBytes,
    TaskTimes,
    equal_times,
    make_schedule,
    max_in_flight,
    memory_over_time,
    simulate,
    transfers,
)
from tests.passes.schedules.samples import by_task, schedules, times_for


def peaks(name, meshes, microbatches, virtual=None, **sizes):
    schedule = make_schedule(name, meshes, microbatches, virtual)
    timeline = simulate(schedule, equal_times(schedule.num_stages))
    every = {key: (size,) * schedule.num_stages for key, size in sizes.items()}
    return tuple(each.peak_bytes for each in memory_over_time(timeline, StageBytes(**every)))


def test_two_stages_by_hand():
    """
    mesh 0   0 F0 1 F1 2            7 B0 10     13 B1 16
    mesh 1       1 F0 3   B0   7 F1 9   B1   13
    """
    times = TaskTimes(forward_s=(1.0, 2.0), backward_s=(3.0, 4.0))
    timeline = simulate(make_schedule("1f1b", 2, 2), times)
    sizes = StageBytes(resident_bytes=(100, 200), activation_bytes=(10, 20))
    first, second = memory_over_time(timeline, sizes)
    assert first.times_s.tolist() == [0, 1, 10, 16]
    assert first.bytes_in_use.tolist() == [110, 120, 110, 100]
    assert (first.peak_bytes, first.peak_s) == (120, 1)
    assert second.times_s.tolist() == [0, 1, 13]  # at 7 s one goes and one comes
    assert second.bytes_in_use.tolist() == [200, 220, 200]
    assert (second.peak_bytes, second.peak_s) == (220, 1)


def test_workspace_is_there_while_a_task_runs():
    timeline = simulate(make_schedule("1f1b", 2, 1), equal_times(2))
    sizes = StageBytes(resident_bytes=(5, 5), activation_bytes=(10, 10), workspace_bytes=(3, 4))
    first, second = memory_over_time(timeline, sizes)
    assert first.times_s.tolist() == [0, 1, 4, 6]
    assert first.bytes_in_use.tolist() == [18, 15, 18, 5]
    assert second.times_s.tolist() == [0, 1, 4]
    assert second.bytes_in_use.tolist() == [5, 19, 5]


def test_transfers_take_memory_on_both_sides():
    """The first is sent at 1 and read at 4, the second waits for the link until then."""
    times = TaskTimes(forward_s=(1.0, 2.0), forward_transfer_s=(3.0,))
    timeline = simulate(make_schedule("inference", 2, 2), times)
    sender, receiver = memory_over_time(timeline, StageBytes(forward_transfer_bytes=(7,)))
    assert sender.times_s.tolist() == [0, 1, 2, 4, 7]
    assert sender.bytes_in_use.tolist() == [0, 7, 14, 7, 0]
    assert receiver.times_s.tolist() == [0, 1, 7]
    assert receiver.bytes_in_use.tolist() == [0, 7, 0]
    assert (receiver.peak_bytes, receiver.peak_s) == (7, 1)


def test_received_activations_pile_up_before_a_slow_stage():
    times = TaskTimes(forward_s=(1.0, 4.0))
    timeline = simulate(make_schedule("inference", 2, 8), times)
    _, receiver = memory_over_time(timeline, StageBytes(forward_transfer_bytes=(1,)))
    assert receiver.peak_bytes == 6  # at 8 s: all are sent, one is read, and one is running


def test_peak_is_what_is_in_flight():
    assert peaks("gpipe", 3, 8, activation_bytes=1) == (8, 8, 8)
    assert peaks("1f1b", 4, 8, activation_bytes=1) == (4, 3, 2, 1)
    assert peaks("zbv", 3, 8, activation_bytes=1, stash_bytes=1) == (6, 6, 6)
    assert peaks("chimera", 4, 8, activation_bytes=1) == (3, 4, 4, 3)


def test_zb_h1_peak_as_published():
    """Qi et al. 2023, section 2.3: (p - i) M_B + i M_W on mesh i, counted from 0."""
    found = peaks("zb-h1", 4, 12, activation_bytes=100, stash_bytes=30)
    assert found == (400, 330, 260, 190)
    assert peaks("zb-h1", 4, 12, activation_bytes=100, stash_bytes=100) == (400,) * 4


def test_a_stage_with_two_copies_is_resident_twice():
    timeline = simulate(make_schedule("chimera", 4, 4), equal_times(4))
    sizes = StageBytes(resident_bytes=(1, 10, 100, 1000))
    found = [each.bytes_in_use[0] for each in memory_over_time(timeline, sizes)]
    assert found == [1001, 110, 110, 1001]


@hypothesis.settings(max_examples=40)
@hypothesis.given(schedules(max_meshes=8, max_microbatches=16))
def test_peak_of_equal_stages_is_in_flight(schedule):
    timeline = simulate(schedule, equal_times(schedule.num_stages))
    sizes = StageBytes(activation_bytes=(1,) * schedule.num_stages)
    found = memory_over_time(timeline, sizes)
    assert tuple(each.peak_bytes for each in found) == max_in_flight(schedule)
    assert all(each.bytes_in_use[-1] == 0 for each in found)


@st.composite
def sizes_for(draw, schedule):
    def per(length):
        return tuple(draw(st.lists(st.integers(0, 5), min_size=length, max_size=length)))

    stages = schedule.num_stages
    return StageBytes(
        resident_bytes=per(stages),
        activation_bytes=per(stages),
        stash_bytes=per(stages),
        workspace_bytes=per(stages),
        forward_transfer_bytes=per(stages - 1),
        backward_transfer_bytes=per(stages - 1),
    )


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    st.data(), schedules(max_meshes=4, max_microbatches=5, max_virtual=2), st.booleans()
)
def test_equals_the_sum_at_every_moment(data, schedule, overlap):
    times, sizes = data.draw(times_for(schedule)), data.draw(sizes_for(schedule))
    timeline = simulate(schedule, times, overlap_transfers=overlap)
    found = memory_over_time(timeline, sizes)
    intervals = held(timeline, sizes)
    for mesh, memory in enumerate(found):
        resident = sum(sizes.resident_bytes[s] for s in schedule.stages_of_mesh(mesh))
        most = resident
        # Between any two moments at which something changes.
        moments = sorted({0.0, *(t for m, a, b, _ in intervals if m == mesh for t in (a, b))})
        for before, after in zip(moments, [*moments[1:], moments[-1] + 1], strict=True):
            middle = (before + after) / 2
            expected = resident + sum(
                size for m, a, b, size in intervals if m == mesh and a < middle < b
            )
            at = np.searchsorted(memory.times_s, middle) - 1
            assert memory.bytes_in_use[at] == expected
            most = max(most, expected)
        assert memory.peak_bytes == most
        assert memory.bytes_in_use[np.searchsorted(memory.times_s, memory.peak_s)] == most


def held(timeline, sizes):
    """(mesh, from, to, bytes) of everything but what is resident, from its definition."""
    schedule, at = timeline.schedule, by_task(timeline)
    kinds = {(each.kind, each.stage, each.microbatch): each for each in at}
    sent = transfers(schedule)
    found = []
    for mesh, row in enumerate(schedule.tasks):
        for each in row:
            start, end, send_start, send_end = at[each]
            stage, key = each.stage, (each.stage, each.microbatch)
            found.append((mesh, start, end, sizes.workspace_bytes[stage]))
            if each.kind == FORWARD:
                last = kinds.get((BACKWARD, *key)) or kinds.get((BACKWARD_INPUT, *key)) or each
                found.append((mesh, start, at[last][1], sizes.activation_bytes[stage]))
            if each.kind == BACKWARD_INPUT:
                weight_end = at[kinds[BACKWARD_WEIGHT, *key]][1]
                found.append((mesh, end, weight_end, sizes.stash_bytes[stage]))
            if each in sent:
                if each.kind == FORWARD:
                    size = sizes.forward_transfer_bytes[stage]
                else:
                    size = sizes.backward_transfer_bytes[stage - 1]
                found.append((mesh, end, send_end, size))
                found.append((sent[each].target, send_start, at[sent[each].consumer][0], size))
    return found


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            StageBytes(activation_bytes=(1,)),
            "activation_bytes must be 2 byte counts.*'1f1b' with 2",
        ),
        (StageBytes(forward_transfer_bytes=(1, 1)), "forward_transfer_bytes must be 1 byte counts"),
        (StageBytes(resident_bytes=(1, -1)), r"none negative, .*; found \(1, -1\)"),
    ],
)
def test_sizes_that_do_not_fit(sizes, message):
    timeline = simulate(make_schedule("1f1b", 2, 2), equal_times(2))
    with pytest.raises(ValueError, match=message):
        memory_over_time(timeline, sizes)
