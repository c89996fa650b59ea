"""Every schedule is what the papers say of it."""

import math

import hypothesis
import pytest
from hypothesis import strategies as st

from alpa_lite.passes.schedules import (
    BACKWARD,
    BACKWARD_INPUT,
    FORWARD,
    SCHEDULES,
    dependencies,
    dualpipe_bubble_s,
    equal_times,
    make_schedule,
    max_in_flight,
    simulate,
    verify_schedule,
)
from alpa_lite.passes.schedules.bubble import (
    chimera_bubble_share,
    interleaved_bubble_share,
    one_f_one_b_bubble_share,
    zb_h1_bubble_share,
)
from tests.passes.schedules.samples import EVEN, schedules

SMALL = [
    (name, meshes, microbatches, virtual)
    for name, family in SCHEDULES.items()
    for meshes in range(1, 6)
    for microbatches in range(1, 13)
    for virtual in ((1, 2, 3) if family.num_virtual is None else (family.num_virtual,))
    if name not in EVEN or meshes % 2 == microbatches % 2 == 0
]


def test_all_small_schedules_pass_the_check():
    for shape in SMALL:
        verify_schedule(make_schedule(*shape))
    assert len(SMALL) > 500


@pytest.mark.parametrize("name", SCHEDULES)
@hypothesis.settings(max_examples=25)
@hypothesis.given(data=st.data())
def test_schedules_pass_the_check(name, data):
    """Complete, without deadlock, in flight and bubble as in the closed forms."""
    verify_schedule(data.draw(schedules(names=(name,))))


@hypothesis.settings(max_examples=50)
@hypothesis.given(
    schedules(names=("gpipe", "1f1b", "eager_1f1b", "interleaved_1f1b")),
    st.integers(1, 9),
    st.integers(1, 9),
)
def test_bubble_share_whatever_a_backward_takes(schedule, forward_s, backward_s):
    times = equal_times(schedule.num_stages, forward_s=forward_s, backward_s=backward_s)
    share = simulate(schedule, times).bubble_share
    meshes, microbatches = schedule.num_meshes, schedule.num_microbatches
    if schedule.name == "interleaved_1f1b":
        virtual = schedule.num_stages // meshes
        expected = interleaved_bubble_share(meshes, microbatches, virtual)
    else:
        expected = one_f_one_b_bubble_share(meshes, microbatches)
    assert math.isclose(share, expected, abs_tol=1e-12)


def test_closed_forms_as_published():
    assert one_f_one_b_bubble_share(4, 8) == 3 / 11
    assert interleaved_bubble_share(4, 8, 2) == 3 / 19
    assert zb_h1_bubble_share(4, 8) == 3 / 27
    assert chimera_bubble_share(4, 4) == 2 / 10
    assert chimera_bubble_share(8, 16) == 6 / 38


def test_makespans_of_four_stages_and_eight_microbatches():
    """A forward of 1 and a backward of 2, or of two halves of 1."""
    times = equal_times(4)
    assert simulate(make_schedule("1f1b", 4, 8), times).makespan_s == 33
    assert simulate(make_schedule("zb-h1", 4, 8), times).makespan_s == 27


def test_in_flight_of_eight_meshes_and_many_microbatches():
    def count(name, virtual=None):
        return max_in_flight(make_schedule(name, 8, 64, virtual))

    assert count("gpipe") == (64,) * 8
    assert count("1f1b") == count("zb-h1") == (8, 7, 6, 5, 4, 3, 2, 1)
    assert count("eager_1f1b") == (15, 13, 11, 9, 7, 5, 3, 1)
    assert count("interleaved_1f1b", 3) == (31, 29, 27, 25, 23, 21, 19, 17)  # S v + S - 1 first
    assert count("zbv") == (16,) * 8  # halves of stages, so as much as 8 whole ones
    assert count("dualpipev") == (17,) * 8
    assert count("dualpipe") == (9,) * 8
    assert count("chimera") == (5, 6, 7, 8, 8, 7, 6, 5)
    assert count("inference") == (1,) * 8


# Zero bubble.


@hypothesis.given(
    st.integers(1, 12), st.integers(0, 20), st.integers(1, 6), st.integers(0, 4), st.integers(0, 4)
)
def test_zb_h1_with_the_weight_part_the_shortest(meshes, more, weight_s, forward_more, input_more):
    microbatches = meshes + more
    halves = {
        "forward_s": weight_s + forward_more,
        "backward_input_s": weight_s + input_more,
        "backward_weight_s": weight_s,
    }
    timeline = simulate(make_schedule("zb-h1", meshes, microbatches), equal_times(meshes, **halves))
    expected = zb_h1_bubble_share(meshes, microbatches, **halves)
    assert math.isclose(timeline.bubble_share, expected, abs_tol=1e-12)


def test_zb_h1_has_no_closed_form_with_a_long_weight_part():
    """Qi et al., table 2, would give 3 times -1 here; the lists cannot fill that."""
    assert zb_h1_bubble_share(4, 8, 1.0, 1.0, 3.0) is None
    times = equal_times(4, backward_weight_s=3.0)
    assert simulate(make_schedule("zb-h1", 4, 8), times).bubble_share > 0


@pytest.mark.parametrize("meshes", [1, 2, 5, 8])
@pytest.mark.parametrize("microbatches", [1, 3, 8, 20])
def test_zb_h1_keeps_as_many_microbatches_on_all_meshes(meshes, microbatches):
    """Qi et al., section 2.1: until the weight part, all meshes have the same number."""
    schedule = make_schedule("zb-h1", meshes, microbatches)
    assert max_in_flight(schedule, until_weight=True) == (min(meshes, microbatches),) * meshes


@hypothesis.settings(max_examples=30)
@hypothesis.given(st.integers(1, 12), st.integers(0, 40))
def test_zbv_never_waits(meshes, more):
    schedule = make_schedule("zbv", meshes, 2 * meshes - 1 + more)
    timeline = simulate(schedule, equal_times(2 * meshes))
    assert timeline.waiting_s == (0.0,) * meshes
    assert [starts[0] for starts in timeline.start_s] == list(range(meshes))


def test_other_schedules_wait():
    for name in ("1f1b", "zb-h1", "chimera"):
        timeline = simulate(make_schedule(name, 4, 8), equal_times(4))
        assert sum(timeline.waiting_s) > 0, name


# Two directions.


@pytest.mark.parametrize("meshes", [2, 4, 6, 8, 16])
@pytest.mark.parametrize(("forward_s", "backward_s"), [(1, 1), (1, 2), (2, 3), (3, 1)])
def test_chimera_of_one_unit(meshes, forward_s, backward_s):
    """The D - 2 idle slots take as long as the longer kind; 4 meshes, 1 and 2: 4 of 16 slots."""
    schedule = make_schedule("chimera", meshes, meshes)
    times = equal_times(meshes, forward_s=forward_s, backward_s=backward_s)
    work_s = (forward_s + backward_s) * meshes
    idle_s = (meshes - 2) * max(forward_s, backward_s)
    assert simulate(schedule, times).makespan_s == work_s + idle_s


def test_chimera_has_half_the_bubble_of_1f1b():
    """Li and Hoefler: up to 50 % fewer; exactly (D - 2) slots where 1F1B has 2 (D - 1)."""
    for meshes in (2, 4, 8, 16):
        equal = equal_times(meshes, backward_s=1.0)
        both = [
            simulate(make_schedule(name, meshes, 2 * meshes), equal).makespan_s - 4 * meshes
            for name in ("chimera", "1f1b")
        ]
        assert both == [meshes - 2, 2 * (meshes - 1)]


@pytest.mark.parametrize(("meshes", "microbatches"), [(2, 4), (4, 10), (4, 17), (8, 20)])
@pytest.mark.parametrize(("half_s", "weight_s"), [(1, 1), (2, 1), (2, 2), (5, 1), (5, 2)])
def test_dualpipev_has_the_published_bubble(meshes, microbatches, half_s, weight_s):
    """With a forward and a backward of the main phase as one task, as the table counts them."""
    schedule = make_schedule("dualpipev", meshes, microbatches)
    seconds = {FORWARD: half_s, BACKWARD: half_s + weight_s, BACKWARD_INPUT: half_s}
    pair_s = seconds[FORWARD] + seconds[BACKWARD]
    makespan_s = makespan_in_pairs(schedule, seconds, weight_s)
    work_s = 2 * microbatches * pair_s
    expected = dualpipe_bubble_s(2 * meshes, pair_s, seconds[BACKWARD], weight_s)
    assert makespan_s - work_s == expected


def makespan_in_pairs(schedule, seconds, weight_s):
    """All results of a forward and the whole backward behind it come out when both are done.

    Except the first such pair of the last mesh, which DualPipe does not overlap.
    """
    needs = dependencies(schedule)
    units = []
    for mesh, row in enumerate(schedule.tasks):
        units.append([])
        index, apart = 0, mesh == schedule.num_meshes - 1
        while index < len(row):
            paired = [each.kind for each in row[index : index + 2]] == [FORWARD, BACKWARD]
            size = 2 if paired and not apart else 1
            apart = apart and not paired
            units[-1].append(row[index : index + size])
            index += size
    end, free, done = {}, [0] * len(units), [0] * len(units)
    while any(done[mesh] < len(row) for mesh, row in enumerate(units)):
        for mesh, row in enumerate(units):
            if done[mesh] == len(row):
                continue
            unit = row[done[mesh]]
            before = [need for each in unit for need in needs[each]]
            if all(need in end for need in before):
                start = max([free[mesh], *(end[need] for need in before)])
                free[mesh] = start + sum(seconds.get(each.kind, weight_s) for each in unit)
                end.update(dict.fromkeys(unit, free[mesh]))
                done[mesh] += 1
    return max(free)


def test_dualpipe_is_two_mirrored_dualpipevs():
    whole = make_schedule("dualpipe", 8, 20)
    half = make_schedule("dualpipev", 4, 10)
    times = equal_times(8)
    both = simulate(whole, times)
    assert both.start_s[:4] == both.start_s[:3:-1] == simulate(half, times).start_s


# Transfers.


@hypothesis.given(st.integers(2, 8), st.integers(1, 30), st.integers(1, 4), st.integers(1, 4))
def test_eager_1f1b_hides_transfers(meshes, microbatches, transfer_s, more):
    """Only the way there and back of the first and the last microbatch is not hidden."""
    forward_s, backward_s = transfer_s + more, transfer_s + 2 * more
    times = equal_times(
        meshes, forward_s=forward_s, backward_s=backward_s, transfer_s=float(transfer_s)
    )
    eager = simulate(make_schedule("eager_1f1b", meshes, microbatches), times).makespan_s
    rounds = microbatches + meshes - 1
    assert eager == rounds * (forward_s + backward_s) + 2 * (meshes - 1) * transfer_s


def test_1f1b_does_not_hide_transfers():
    times = equal_times(4, forward_s=4.0, backward_s=8.0, transfer_s=1.0)
    eager, plain = (
        simulate(make_schedule(name, 4, 16), times).makespan_s for name in ("eager_1f1b", "1f1b")
    )
    assert eager == 19 * 12 + 6
    assert plain == 19 * 12 + 28
