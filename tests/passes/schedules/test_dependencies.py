"""What a runtime reads from a schedule."""

import hypothesis

from alpa_lite.passes.schedules import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    Transfer,
    dependencies,
    input_gradients,
    make_schedule,
    programs,
    releases,
    transfers,
)
from tests.passes.schedules.samples import schedules, straight_schedule, task


def needs(schedule, text):
    return dependencies(schedule)[task(text)]


def test_dependencies():
    schedule = make_schedule("1f1b", 3, 2)
    assert needs(schedule, "0F1") == ()
    assert needs(schedule, "1F1") == (task("0F1"),)
    assert needs(schedule, "2B1") == (task("2F1"),)
    assert needs(schedule, "1B0") == (task("1F0"), task("2B0"))


def test_dependencies_of_a_split_backward():
    schedule = make_schedule("zb-h1", 3, 2)
    assert needs(schedule, "2I1") == (task("2F1"),)
    assert needs(schedule, "1I1") == (task("1F1"), task("2I1"))
    assert needs(schedule, "1W1") == (task("1I1"),)


def test_dependencies_between_whole_and_split_backwards():
    rows = """
        0F0 0F1 0B0 0I1 0W1
        1F0 1I0 1W0 1F1 1B1
    """
    schedule = straight_schedule(rows)
    assert needs(schedule, "0B0") == (task("0F0"), task("1I0"))
    assert needs(schedule, "0I1") == (task("0F1"), task("1B1"))
    assert input_gradients(schedule)[0, 1] == task("0I1")
    assert input_gradients(schedule)[1, 1] == task("1B1")


def test_transfers():
    schedule = make_schedule("1f1b", 2, 1)
    assert transfers(schedule) == {
        task("0F0"): Transfer(task("0F0"), task("1F0"), 0, 1),
        task("1B0"): Transfer(task("1B0"), task("0B0"), 1, 0),
    }


def test_the_turn_of_a_v_sends_nothing():
    sent = transfers(make_schedule("zbv", 2, 1))
    assert {str(producer): (each.source, each.target) for producer, each in sent.items()} == {
        "forward of stage 0, microbatch 0": (0, 1),
        "forward of stage 2, microbatch 0": (1, 0),
        "backward_input of stage 3, microbatch 0": (0, 1),
        "backward_input of stage 1, microbatch 0": (1, 0),
    }


def test_transfers_of_two_directions():
    sent = transfers(make_schedule("chimera", 4, 4))
    assert (sent[task("0F0")].source, sent[task("0F0")].target) == (0, 1)
    assert (sent[task("0F1")].source, sent[task("0F1")].target) == (3, 2)
    assert (sent[task("3B1")].source, sent[task("3B1")].target) == (0, 1)


def test_releases():
    assert releases(make_schedule("1f1b", 2, 1)) == {
        task("0F0"): task("0B0"),
        task("1F0"): task("1B0"),
    }
    assert releases(make_schedule("zb-h1", 1, 1)) == {task("0F0"): task("0W0")}
    assert releases(make_schedule("inference", 1, 1)) == {task("0F0"): task("0F0")}


def test_programs():
    whole, halves = {BACKWARD}, {BACKWARD_INPUT, BACKWARD_WEIGHT}
    assert programs(make_schedule("inference", 2, 3)) == (frozenset({FORWARD}),) * 2
    assert programs(make_schedule("1f1b", 2, 3)) == (frozenset({FORWARD} | whole),) * 2
    assert programs(make_schedule("zb-h1", 2, 3)) == (frozenset({FORWARD} | halves),) * 2
    assert (
        programs(make_schedule("dualpipev", 2, 9)) == (frozenset({FORWARD} | whole | halves),) * 4
    )


@hypothesis.settings(max_examples=30)
@hypothesis.given(schedules(max_meshes=6, max_microbatches=12))
def test_transfers_are_the_dependencies_between_meshes(schedule):
    mesh_of = {each: mesh for mesh, row in enumerate(schedule.tasks) for each in row}
    expected = {
        (need, each, mesh_of[need], mesh_of[each])
        for each, before in dependencies(schedule).items()
        for need in before
        if mesh_of[need] != mesh_of[each]
    }
    found = transfers(schedule)
    assert {(t.producer, t.consumer, t.source, t.target) for t in found.values()} == expected
    assert all(producer == transfer.producer for producer, transfer in found.items())
