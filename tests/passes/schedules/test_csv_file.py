"""Schedules as CSV."""

import hypothesis
import pytest
from hypothesis import strategies as st

from alpa_lite.passes.schedules import (
    ScheduleError,
    make_schedule,
    schedule_from_csv,
    schedule_to_csv,
)
from alpa_lite.passes.schedules import csv_file as module
from tests.passes.schedules.samples import schedules


def test_text():
    assert schedule_to_csv(make_schedule("1f1b", 2, 2)) == "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n"
    assert schedule_to_csv(make_schedule("zb-h1", 1, 1)) == "0F0,0I0,0W0\n"


@hypothesis.settings(max_examples=40)
@hypothesis.given(schedules(max_meshes=8, max_microbatches=16))
def test_round_trip(schedule):
    assert schedule_from_csv(schedule_to_csv(schedule), name=schedule.name) == schedule


def test_grid_with_empty_cells_and_spaces():
    text = "0F0,0F1,,,0B0, ,0B1\r\n,1F0,1B0,1F1,1B1,,\r\n\r\n,,\r\n"
    schedule = schedule_from_csv(text, name="1f1b")
    assert schedule == make_schedule("1f1b", 2, 2)


def test_pairs_side_by_side():
    text = "0F0,3F0,0F1,3B0,0B0,(3F1;0B0)OVERLAP_F_B"
    plain = "0F0,1F0,(0F1;1B0)OVERLAP_F_B,(1F1;0B0)OVERLAP_F_B,1B1,0B1\n"
    schedule = schedule_from_csv(plain)
    assert schedule_to_csv(schedule) == "0F0,1F0,0F1,1B0,1F1,0B0,1B1,0B1\n"
    assert schedule.name == "custom"
    with pytest.raises(ScheduleError, match="first that is missing is 1F0"):
        schedule_from_csv(text)


def test_mesh_without_tasks():
    schedule = schedule_from_csv("0F0,0B0\n\n1F0,1B0\n")
    assert schedule.placements == ((0, 2),)
    assert schedule_to_csv(schedule) == "0F0,0B0\n\n1F0,1B0\n"


def test_name_has_to_be_true():
    text = schedule_to_csv(make_schedule("gpipe", 2, 3))
    with pytest.raises(ScheduleError, match="activations in flight, but 1f1b"):
        schedule_from_csv(text, name="1f1b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "with 1 stages and 1 microbatches there must be 1 forwards, found 0; .* is 0F0"),
        ("0F0,0X0", "line 1, cell 2: a cell is stage, .* found '0X0'"),
        ("0F0,0B0\n1F0,1SEND_F0\n", "line 2, cell 2: .* found '1SEND_F0'"),
        ("0F0,0B", "line 1, cell 2: .* found '0B'"),
        ("-1F0", "line 1, cell 1: .* found '-1F0'"),
        ("0F0,0F1234567", "line 1, cell 2: .* numbers up to 999999; found '0F1234567'"),
        ("\u0660F0", "line 1, cell 1"),
        ("0F0;0B0", "line 1, cell 1"),
        ("(0F0;0B0;0F1)OVERLAP_F_B", "line 1, cell 1"),
        ("(0F0;)OVERLAP_F_B", "line 1, cell 1"),
        ("0F0,'0B0", "line 1, cell 2"),
        ('0F0,"0B0', "line 1: not CSV: unexpected end of data"),
        ('0F0,"0B0"x', "line 1: not CSV"),
        ("x" * 200_000, "line 1: not CSV: field larger than field limit"),
        ("y" * 100_000, "found '" + "y" * 40 + "...'$"),
        ("0F0,0B0,0F0", "position 2 of mesh 0: .* is there already, at position 0 of mesh 0"),
        ("0F0\n0B0\n", "position 0 of mesh 1: the backward of stage 0, .* belongs on mesh 0"),
        ("0F0,0B0\n0F0,0B0\n", "position 0 of mesh 0: .* belongs on mesh 1"),
        (
            "0F0,1B0",
            "the backward of stage 1, microbatch 0 is of no stage of the schedule, which has 1",
        ),
        ("0F0,0B1", "microbatch 1 is of no microbatch of the schedule, which has 1"),
        ("0B0,0F0", "the schedule deadlocks"),
        # Would be a million million cells if it were believed.
        ("999999F999999", "must be 1000000000000 forwards, found 1; .* is 0F0"),
    ],
)
def test_text_that_is_no_schedule(text, message):
    with pytest.raises(ScheduleError, match=message):
        schedule_from_csv(text)


def test_length_is_limited(monkeypatch):
    monkeypatch.setattr(module, "MAX_CHARACTERS", 10)
    with pytest.raises(ScheduleError, match="may have 10 characters, found 16"):
        schedule_from_csv("0F0,0F1,0B0,0B1\n")


@hypothesis.settings(max_examples=200)
@hypothesis.given(st.text("012FBIW,;()\n\r\0\"' OVERLAP_", max_size=40))
def test_any_text_is_read_or_refused(text):
    try:
        schedule = schedule_from_csv(text)
    except ScheduleError:
        return
    assert schedule_from_csv(schedule_to_csv(schedule)) == schedule
