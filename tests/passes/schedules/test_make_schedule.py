"""Schedules of small sizes, drawn by hand."""

import re

import pytest

from alpa_lite.passes.schedules import (
    SCHEDULES,
    equal_times,
    make_schedule,
    schedule_name,
    simulate,
)
from tests.passes.schedules.samples import tasks

# Points are slots in which the mesh has nothing to run when all tasks are equally long.
DRAWN = {
    ("gpipe", 3, 2, None): """
        0F0 0F1 .   .   .   .   0B0 0B1
        .   1F0 1F1 .   .   1B0 1B1 .
        .   .   2F0 2F1 2B0 2B1 .   .
    """,
    ("1f1b", 4, 4, None): """
        0F0 0F1 0F2 0F3 .   .   .   0B0 .   0B1 .   0B2 .   0B3
        .   1F0 1F1 1F2 .   .   1B0 1F3 1B1 .   1B2 .   1B3 .
        .   .   2F0 2F1 .   2B0 2F2 2B1 2F3 2B2 .   2B3 .   .
        .   .   .   3F0 3B0 3F1 3B1 3F2 3B2 3F3 3B3 .   .   .
    """,
    ("1f1b", 3, 1, None): """
        0F0 . . . . 0B0
        . 1F0 . . 1B0 .
        . . 2F0 2B0 . .
    """,
    ("eager_1f1b", 3, 6, None): """
        0F0 0F1 0F2 0F3 0F4 0B0 0F5 0B1 0B2 0B3 0B4 0B5
        1F0 1F1 1F2 1B0 1F3 1B1 1F4 1B2 1F5 1B3 1B4 1B5
        2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3 2F4 2B4 2F5 2B5
    """,
    ("interleaved_1f1b", 2, 4, 2): """
        0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 2B2 2B3 0B2 0B3
        1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3
    """,
    # Three microbatches do not divide by two meshes: one group of three.
    ("interleaved_1f1b", 2, 3, 2): """
        0F0 0F1 0F2 2F0 2F1 2F2 2B0 2B1 2B2 0B0 0B1 0B2
        1F0 1F1 1F2 3F0 3B0 3F1 3B1 3F2 3B2 1B0 1B1 1B2
    """,
    ("zb-h1", 4, 6, None): """
        0F0 0F1 0F2 0F3 .   .   .   0I0 0W0 0F4 0I1 0W1 0F5 0I2 0W2 0I3 0W3 0I4 0W4 0I5 0W5
        .   1F0 1F1 1F2 .   .   1I0 1F3 1I1 1W0 1F4 1I2 1W1 1F5 1I3 1W2 1I4 1W3 1I5 1W4 1W5
        .   .   2F0 2F1 .   2I0 2F2 2I1 2F3 2I2 2W0 2F4 2I3 2W1 2F5 2I4 2W2 2I5 2W3 2W4 2W5
        .   .   .   3F0 3I0 3F1 3I1 3F2 3I2 3F3 3I3 3W0 3F4 3I4 3W1 3F5 3I5 3W2 3W3 3W4 3W5
    """,
    # Mesh 1 begins one slot later and then never waits.
    ("zbv", 2, 3, None): """
        0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0I0 0W0 3F2 3I2 3W2 0I1 0W1 0I2 0W2
        .   1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1I1 2I2 1I2 1W1 2W2 1W2
    """,
    ("chimera", 4, 4, None): """
        0F0 0F2 .   3F1 3B1 3F3 3B3 0B0 .   0B2
        .   1F0 2F1 1F2 2F3 2B1 1B0 2B3 1B2 .
        .   1F1 2F0 1F3 2F2 2B0 1B1 2B2 1B3 .
        0F1 0F3 .   3F0 3B0 3F2 3B2 0B1 .   0B3
    """,
    ("dualpipev", 2, 4, None): """
        0F0 0F1 0F2 3F0 3I0 3W0 3F1 0F3 3B1 3F2 0B0 3B2 3F3 0B1 3B3 0I2 0W2 0I3 0W3
        1F0 2F0 1F1 2F1 1F2 2B0 2F2 1B0 1F3 2B1 2F3 1B1 2B2 1B2 2I3 1I3 2W3 1W3
    """,
    # The two halves mirror each other; even microbatches enter at mesh 0, odd ones at mesh 3.
    ("dualpipe", 4, 8, None): """
        0F0 0F2 0F4 3F1 3I1 3W1 3F3 0F6 3B3 3F5 0B0 3B5 3F7 0B2 3B7 0I4 0W4 0I6 0W6
        1F0 2F1 1F2 2F3 1F4 2B1 2F5 1B0 1F6 2B3 2F7 1B2 2B5 1B4 2I7 1I6 2W7 1W6
        1F1 2F0 1F3 2F2 1F5 2B0 2F4 1B1 1F7 2B2 2F6 1B3 2B4 1B5 2I6 1I7 2W6 1W7
        0F1 0F3 0F5 3F0 3I0 3W0 3F2 0F7 3B2 3F4 0B1 3B4 3F6 0B3 3B6 0I5 0W5 0I7 0W7
    """,
    ("inference", 2, 3, None): """
        0F0 0F1 0F2 .
        .   1F0 1F1 1F2
    """,
}


@pytest.mark.parametrize(("name", "meshes", "microbatches", "virtual"), DRAWN)
def test_lists_are_those_drawn(name, meshes, microbatches, virtual):
    schedule = make_schedule(name, meshes, microbatches, virtual)
    assert schedule.name == name
    assert schedule.tasks == tasks(DRAWN[name, meshes, microbatches, virtual])


@pytest.mark.parametrize(
    ("name", "meshes", "microbatches", "virtual"), [key for key in DRAWN if "." in DRAWN[key]]
)
def test_times_are_those_drawn(name, meshes, microbatches, virtual):
    """Of the drawings with points, where a slot is a second."""
    schedule = make_schedule(name, meshes, microbatches, virtual)
    timeline = simulate(schedule, equal_times(schedule.num_stages, backward_s=1.0))
    for row, starts in zip(
        DRAWN[name, meshes, microbatches, virtual].split("\n")[1:], timeline.start_s, strict=False
    ):
        assert list(starts) == [slot for slot, cell in enumerate(row.split()) if cell != "."]


def test_every_schedule_is_drawn():
    assert {name for name, *_ in DRAWN} == set(SCHEDULES)


def test_placements():
    assert make_schedule("1f1b", 3, 1).placements == ((0, 1, 2),)
    assert make_schedule("interleaved_1f1b", 2, 1, 3).placements == ((0, 1, 0, 1, 0, 1),)
    assert make_schedule("zbv", 3, 1).placements == ((0, 1, 2, 2, 1, 0),)
    chimera = make_schedule("chimera", 4, 6)
    assert chimera.placements == ((0, 1, 2, 3), (3, 2, 1, 0))
    assert chimera.pipeline_of == (0, 1, 0, 1, 0, 1)
    assert [chimera.meshes_of_stage(stage) for stage in range(4)] == [
        (0, 3),
        (1, 2),
        (1, 2),
        (0, 3),
    ]
    assert chimera.stages_of_mesh(3) == (0, 3)
    assert chimera.mesh_of(1, 4) == 1 and chimera.mesh_of(1, 5) == 2


def test_one_virtual_stage_is_1f1b():
    assert make_schedule("interleaved_1f1b", 5, 9, 1).tasks == make_schedule("1f1b", 5, 9).tasks


def test_virtual_stages_by_default():
    assert make_schedule("interleaved_1f1b", 3, 4).num_stages == 6
    assert make_schedule("dualpipev", 3, 4).num_stages == 6
    assert make_schedule("1f1b", 3, 4).num_stages == 3


@pytest.mark.parametrize(
    ("spelt", "name"),
    [
        ("1F1B", "1f1b"),
        ("GPipe", "gpipe"),
        ("ZB-V", "zbv"),
        ("zb_h1", "zb-h1"),
        ("DualPipe-V", "dualpipev"),
        ("Interleaved1F1B", "interleaved_1f1b"),
        ("1f1b_overlap_friendly", "eager_1f1b"),
        ("pipedream_flush", "1f1b"),
        ("ZBVZeroBubble", "zbv"),
    ],
)
def test_spellings(spelt, name):
    assert schedule_name(spelt) == name
    assert make_schedule(spelt, 2, 2).name == name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hanayo", 2, 2), "there is no schedule 'hanayo'; use one of gpipe, 1f1b, "),
        (("chimera", 3, 4), "number of meshes must be even, found 3; use 4, or"),
        (("chimera", 4, 5), "number of microbatches must be even, found 5; use 6, or"),
        (("dualpipe", 5, 4), "number of meshes must be even, found 5"),
        (("1f1b", 0, 4), "1f1b needs a number of meshes from 1 on, found 0"),
        (("1f1b", 2, -1), "a number of microbatches from 1 on, found -1"),
        (("1f1b", True, 4), "a number of meshes from 1 on, found True"),
        (("1f1b", 2.0, 4), "a number of meshes from 1 on, found 2.0"),
        (("interleaved_1f1b", 2, 4, 0), "a number of stages per mesh from 1 on, found 0"),
        (("zbv", 2, 4, 3), "zbv has 2 stage(s) per mesh, found num_virtual=3"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_schedule(*arguments)
