"""Schedules that are broken are told what is wrong, and where."""

import dataclasses

import pytest

from alpa_lite.errors import AlpaLiteError
from alpa_lite.passes.schedules import (
    Schedule,
    ScheduleError,
    Task,
    equal_times,
    instruction_lists,
    make_schedule,
    simulate,
    verify,
    verify_schedule,
)
from tests.passes.schedules.samples import straight_schedule, task, tasks

GOOD = """
    0F0 0F1 0B0 0B1
    1F0 1B0 1F1 1B1
"""


def replaced(old: str, new: str, name: str = "custom") -> Schedule:
    """`GOOD` with a part replaced, still of two microbatches."""
    assert old in GOOD
    return Schedule(name, ((0, 1),), (0, 0), tasks(GOOD.replace(old, new)))


def test_good_schedule():
    verify_schedule(straight_schedule(GOOD))
    verify_schedule(straight_schedule(GOOD, name="1f1b"))


@pytest.mark.parametrize(
    ("old", "new", "mesh", "position", "message"),
    [
        (
            "1B0 ",
            "",
            1,
            None,
            "mesh 1 must run stage 1 on microbatch 0 as forward and backward, or as forward, "
            "backward_input and backward_weight; found forward",
        ),
        ("0F1 ", "", 0, None, "stage 0 on microbatch 1 .*; found backward$"),
        ("0F1 0B0 0B1", "0B0", 0, None, "stage 0 on microbatch 1 .*; found nothing$"),
        ("0B0", "0I0", 0, None, "stage 0 on microbatch 0 .*; found forward, backward_input$"),
        (
            "0B0",
            "0B0 0W0",
            0,
            None,
            "stage 0 on microbatch 0 .*; found forward, backward, backward_weight$",
        ),
        (
            "0B1",
            "0B1 0F1",
            0,
            4,
            "position 4 of mesh 0: the forward of stage 0, microbatch 1 is there already, at "
            "position 1 of mesh 0",
        ),
        (
            "0B1",
            "1F1",
            0,
            3,
            "position 3 of mesh 0: the forward of stage 1, microbatch 1 belongs on mesh 1",
        ),
        ("1F1", "2F1", 1, 2, "the forward of stage 2, microbatch 1 is of no stage .*, which has 2"),
        ("1F1", "1F2", 1, 2, "microbatch 2 is of no microbatch of the schedule, which has 2"),
        (
            "1F0 1B0",
            "1B0 1F0",
            1,
            0,
            "the schedule deadlocks: mesh 1 waits at position 0 with the backward of stage 1, "
            "microbatch 0 for the forward of stage 1, microbatch 0, position 1 of mesh 1",
        ),
        (
            "0F1 0B0",
            "0B0 0F1",
            None,
            None,
            None,  # only slower
        ),
        (
            "0F0 0F1 0B0 0B1",
            "0F0 0B0 0B1 0F1",
            0,
            2,
            "the schedule deadlocks: "
            "mesh 0 waits at position 2 with the backward of stage 0, microbatch 1 for the backward "
            "of stage 1, microbatch 1, position 3 of mesh 1; "
            "mesh 1 waits at position 2 with the forward of stage 1, microbatch 1 for the forward of "
            "stage 0, microbatch 1, position 3 of mesh 0",
        ),
    ],
)
def test_broken_schedule(old, new, mesh, position, message):
    schedule = replaced(old, new)
    if message is None:
        verify_schedule(schedule)
        return
    with pytest.raises(ScheduleError, match=message) as error:
        verify_schedule(schedule)
    assert (error.value.mesh, error.value.position) == (mesh, position)
    assert isinstance(error.value, AlpaLiteError) and isinstance(error.value, ValueError)


def test_unknown_kind():
    schedule = replaced("0F1", "0F1")
    wrong = dataclasses.replace(
        schedule, tasks=((Task("update", 0, 0), *schedule.tasks[0]), schedule.tasks[1])
    )
    with pytest.raises(ScheduleError, match="position 0 of mesh 0: the update .* no known kind"):
        verify_schedule(wrong)


def test_weight_part_before_input_part():
    schedule = straight_schedule("0F0 0W0 0I0")
    with pytest.raises(ScheduleError, match="backward_weight .* for the backward_input"):
        verify_schedule(schedule)


def test_partly_split_backward():
    verify_schedule(straight_schedule("0F0 0F1 0B0 0I1 0W1"))


def test_forward_only_or_none():
    verify_schedule(straight_schedule("0F0 0F1"))
    with pytest.raises(ScheduleError, match="stage 0 on microbatch 1 .*; found forward"):
        verify_schedule(straight_schedule("0F0 0F1 0B0"))


def test_more_in_flight_than_the_name_promises():
    rows = """
        0F0 0F1 0F2 0B0 0B1 0B2
        1F0 1B0 1F1 1B1 1F2 1B2
    """
    verify_schedule(straight_schedule(rows))
    with pytest.raises(
        ScheduleError,
        match="mesh 0 has up to 3 activations in flight, but 1f1b with 2 meshes, 3 microbatches and "
        "1 stage.* has 2; give it another name",
    ) as error:
        verify_schedule(straight_schedule(rows, name="1f1b"))
    assert error.value.mesh == 0


def test_fewer_in_flight_than_the_name_promises():
    lists = make_schedule("1f1b", 3, 8)
    with pytest.raises(ScheduleError, match="mesh 0 has up to 3 .*, but eager_1f1b .* has 5"):
        verify_schedule(dataclasses.replace(lists, name="eager_1f1b"))


def test_sends_and_receives_are_verified_too(monkeypatch):
    lists = instruction_lists(simulate(make_schedule("1f1b", 2, 2), equal_times(2)))
    swapped = (lists[0], (lists[1][2], *lists[1][1:2], lists[1][0], *lists[1][3:]))
    monkeypatch.setattr(verify, "instruction_lists", lambda timeline: swapped)
    with pytest.raises(ScheduleError, match="matched in order"):
        verify_schedule(make_schedule("1f1b", 2, 2))


def test_more_bubble_than_the_name_promises():
    """As few in flight as 1F1B, but the second forward comes too late for the steady state."""
    rows = """
        0F0 0F1 0B0 0B1 0F2 0F3 0B2 0B3
        1F0 1B0 1F1 1B1 1F2 1B2 1F3 1B3
    """
    verify_schedule(straight_schedule(rows))
    with pytest.raises(
        ScheduleError, match="the bubble is 0.3.* of 1f1b with 2 meshes.* is 0.2000"
    ):
        verify_schedule(straight_schedule(rows, name="1f1b"))


@pytest.mark.parametrize(
    ("rows", "name", "message"),
    [
        (
            "0F0 0B0\n.",
            "1f1b",
            "1f1b has as many stages on every mesh, found 1 stages on 2 meshes",
        ),
        (
            "0F0 1F0 1B0 0B0",
            "1f1b",
            r"this is no 1f1b, give .*: 1f1b has 1 stage\(s\) per mesh, found",
        ),
        ("0F0 0B0", "dualpipe", "this is no dualpipe, .* meshes must be even, found 1"),
        (
            "0F0 0B0\n1F0 1B0",
            "chimera",
            "this is no chimera, .* microbatches must be even, found 1",
        ),
    ],
)
def test_numbers_that_the_name_does_not_allow(rows, name, message):
    lists = tasks(rows)
    mesh_of = {each.stage: mesh for mesh, row in enumerate(lists) for each in row}
    schedule = Schedule("custom", (tuple(mesh_of.values()),), (0,), lists)
    verify_schedule(schedule)
    with pytest.raises(ScheduleError, match=message):
        verify_schedule(dataclasses.replace(schedule, name=name))


def test_any_swap_of_neighbours_is_noticed_or_harmless():
    """Of each mesh of a small zero-bubble schedule: what passes the check can be simulated."""
    schedule = make_schedule("zbv", 2, 3)
    times = equal_times(schedule.num_stages)
    refused = passed = 0
    for mesh, row in enumerate(schedule.tasks):
        for at in range(len(row) - 1):
            swapped = (*row[:at], row[at + 1], row[at], *row[at + 2 :])
            lists = (*schedule.tasks[:mesh], swapped, *schedule.tasks[mesh + 1 :])
            other = dataclasses.replace(schedule, name="custom", tasks=lists)
            try:
                verify_schedule(other)
            except ScheduleError:
                refused += 1
                with pytest.raises(ScheduleError, match="deadlocks"):
                    simulate(other, times)
            else:
                passed += 1
                simulate(other, times)
    assert refused > 5 and passed > 5


@pytest.mark.parametrize(
    ("placements", "pipeline_of", "message"),
    [
        ((), (0,), "at least one pipeline, one stage and one microbatch"),
        (((0,),), (), "at least one pipeline, one stage and one microbatch"),
        (((0,), (0, 1)), (0,), r"same stages, found \[1, 2\]"),
        (((0, 2),), (0,), "pipeline 0 puts stage 1 on mesh 2, but .* meshes 0 to 1 only"),
        (((0, 1),), (0, 1), "microbatch 1 takes pipeline 1, but there are pipelines 0 to 0 only"),
    ],
)
def test_schedule_with_an_impossible_placement(placements, pipeline_of, message):
    with pytest.raises(ValueError, match=message):
        Schedule("custom", placements, pipeline_of, ((task("0F0"),), (task("1F0"),)))
