"""Sends and receives between the tasks."""

import hypothesis
import pytest
from hypothesis import strategies as st

from alpa_lite.passes.schedules import (
    Receive,
    ScheduleError,
    Send,
    dependencies,
    equal_times,
    global_order,
    instruction_lists,
    make_schedule,
    simulate,
    transfers,
    verify_instructions,
)
from tests.passes.schedules.samples import schedules, task, times_for


def lists_of(schedule):
    return instruction_lists(simulate(schedule, equal_times(schedule.num_stages)))


def lists_in_order_of_use(schedule):
    """Send right after, receive right before use: what one would write without thinking."""
    sent = transfers(schedule)
    arriving = {transfer.consumer: transfer for transfer in sent.values()}
    lists = []
    for row in schedule.tasks:
        lists.append([])
        for each in row:
            if each in arriving:
                lists[-1].append(Receive(arriving[each].producer, arriving[each].source))
            lists[-1].append(each)
            if each in sent:
                lists[-1].append(Send(each, sent[each].target))
    return lists


def test_lists_of_a_small_schedule():
    schedule = make_schedule("1f1b", 2, 2)
    assert lists_of(schedule) == (
        (
            task("0F0"),
            Send(task("0F0"), 1),
            task("0F1"),
            Send(task("0F1"), 1),
            Receive(task("1B0"), 1),
            task("0B0"),
            Receive(task("1B1"), 1),
            task("0B1"),
        ),
        (
            Receive(task("0F0"), 0),
            task("1F0"),
            Receive(task("0F1"), 0),
            task("1B0"),
            Send(task("1B0"), 0),
            task("1F1"),
            task("1B1"),
            Send(task("1B1"), 0),
        ),
    )


@hypothesis.settings(max_examples=40)
@hypothesis.given(st.data(), schedules(max_meshes=8, max_microbatches=16), st.booleans())
def test_lists_do_not_block_whatever_the_times(data, schedule, overlap):
    """Times of zero included, where starting times alone do not order the tasks."""
    timeline = simulate(schedule, data.draw(times_for(schedule, 2)), overlap_transfers=overlap)
    seen = set()
    for each in global_order(timeline):
        assert seen.issuperset(dependencies(schedule)[each])
        seen.add(each)
    assert len(seen) == sum(map(len, schedule.tasks))
    verify_instructions(schedule, instruction_lists(timeline))
    verify_instructions(schedule, instruction_lists(timeline), buffered_sends=True)


def test_receiving_in_order_of_use_does_not_match_in_a_v():
    """Mesh 1 uses the gradient of stage 3 before the forward of microbatch 2, sent earlier."""
    schedule = make_schedule("zbv", 2, 3)
    with pytest.raises(
        ScheduleError,
        match="matched in order, but instruction 8 of mesh 1 is the receive of the backward_input of "
        "stage 3, microbatch 0 from mesh 0, and what comes next is instruction 5 of mesh 0, the send "
        "of the forward of stage 0, microbatch 2 to mesh 1",
    ) as error:
        verify_instructions(schedule, lists_in_order_of_use(schedule), buffered_sends=True)
    assert (error.value.mesh, error.value.position) == (1, 8)


def test_receiving_in_order_of_use_deadlocks_in_1f1b():
    """Two neighbours send to each other, and neither receives: if sends last until received."""
    schedule = make_schedule("1f1b", 2, 3)
    lists = lists_in_order_of_use(schedule)
    verify_instructions(schedule, lists, buffered_sends=True)
    with pytest.raises(
        ScheduleError,
        match="the instructions deadlock.*: mesh 0 at instruction 3, the send of the forward of stage "
        "0, microbatch 1 to mesh 1; mesh 1 at instruction 3, the send of the backward of stage 1, "
        "microbatch 0 to mesh 0",
    ) as error:
        verify_instructions(schedule, lists)
    assert (error.value.mesh, error.value.position) == (0, 3)


def test_receiving_in_order_of_use_is_fine_in_gpipe():
    schedule = make_schedule("gpipe", 3, 3)
    verify_instructions(schedule, lists_in_order_of_use(schedule))


def changed(mesh, at, *new, remove=1):
    """Lists of a small schedule with some instructions of one mesh replaced."""
    lists = [list(row) for row in lists_of(make_schedule("1f1b", 2, 2))]
    lists[mesh][at : at + remove] = new
    return lists


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (
            changed(0, 0, Send(task("0F0"), 1), task("0F0"), remove=2),
            "instruction 0 of mesh 0, the send of the forward of stage 0, microbatch 0 to mesh 1, "
            "needs the result of the forward of stage 0, microbatch 0, which this mesh has neither",
        ),
        (
            changed(0, 4, task("0B0"), Receive(task("1B0"), 1), remove=2),
            "instruction 4 of mesh 0, the backward of stage 0, microbatch 0, needs the result of the "
            "backward of stage 1, microbatch 0, which this mesh",
        ),
        (
            changed(0, 3),
            "deadlock.*mesh 1 at instruction 2, the receive of the forward of stage 0, .* 1",
        ),
        (
            changed(1, 7),
            "deadlock.*mesh 0 at instruction 6, the receive of the backward of stage 1",
        ),
        (
            changed(0, 3, Send(task("0F0"), 1)),
            "matched in order, but instruction 2 of mesh 1 is the",
        ),
        (
            changed(0, 2),
            "mesh 0 .*task 1 should be: forward of stage 0, microbatch 1; found: backward",
        ),
        (changed(0, 7), "mesh 0 .*task 3 should be: backward of stage 0, .* 1; found: no more"),
        (changed(0, 8, task("0B1")), "task 4 should be: no more; found: backward of stage 0"),
        (changed(0, 0)[:1], "the schedule has 2 meshes, found 1 instruction lists"),
    ],
)
@pytest.mark.parametrize("buffered_sends", [False, True])
def test_broken_lists(lists, message, buffered_sends):
    with pytest.raises(ScheduleError, match=message):
        verify_instructions(make_schedule("1f1b", 2, 2), lists, buffered_sends=buffered_sends)


def test_send_that_nobody_receives():
    lists = changed(1, 8, Send(task("1B1"), 0))
    with pytest.raises(
        ScheduleError, match="instruction 8 of mesh 1, the send .* is received nowhere"
    ):
        verify_instructions(make_schedule("1f1b", 2, 2), lists, buffered_sends=True)
    with pytest.raises(ScheduleError, match="deadlock.*: mesh 1 at instruction 8, the send"):
        verify_instructions(make_schedule("1f1b", 2, 2), lists)
