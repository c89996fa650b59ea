import hypothesis
import pytest
from hypothesis import strategies as st

from alpa_lite.passes.inter_op import (
    Placement,
    Submesh,
    host_distances,
    place_submeshes,
    verify_placement,
)


def corners(text, hosts, devices=8):
    """Places shapes written as `1x4 2x8`; returns the first host and device of each."""
    shapes = [Submesh(*map(int, shape.split("x"))) for shape in text.split()]
    placed = place_submeshes(shapes, hosts, devices)
    verify_placement(placed, hosts, devices)
    assert [placement.submesh for placement in placed] == shapes
    return [(placement.first_host, placement.first_device) for placement in placed]


@pytest.mark.parametrize(
    ("shapes", "hosts", "expected"),
    [
        ("1x8 2x8 1x8", 4, [(0, 0), (1, 0), (3, 0)]),
        ("1x4 1x2 1x2 1x8", 2, [(0, 0), (0, 4), (0, 6), (1, 0)]),
        ("1x1 1x4 1x2 1x1", 1, [(0, 0), (0, 4), (0, 2), (0, 1)]),
        # No host to spare: the last half goes back to the first host.
        ("1x4 1x8 1x8 1x4", 3, [(0, 0), (1, 0), (2, 0), (0, 4)]),
        # One to spare: it stays next to its neighbour.
        ("1x4 1x8 1x8 1x4", 4, [(0, 0), (1, 0), (2, 0), (3, 0)]),
    ],
)
def test_by_hand(shapes, hosts, expected):
    assert corners(shapes, hosts) == expected


def test_sizes_that_are_no_powers_of_two():
    assert corners("1x3 1x1 1x6 1x3", 3, 6) == [(0, 0), (0, 3), (1, 0), (2, 0)]
    assert corners("1x1 1x1 1x1 1x3", 1, 6) == [(0, 0), (0, 1), (0, 2), (0, 3)]


@st.composite
def pipelines(draw):
    hosts, devices = draw(st.integers(1, 6)), draw(st.sampled_from([1, 2, 4, 6, 8, 12]))
    parts = [part for part in (1, 2, 4) if devices % part == 0 and part < devices]
    sizes = [(1, part) for part in parts] + [(count, devices) for count in range(1, hosts + 1)]
    shapes, left = [], hosts * devices
    for _ in range(draw(st.integers(1, 40))):
        fitting = [size for size in sizes if size[0] * size[1] <= left]
        if not fitting:
            break
        shapes.append(Submesh(*draw(st.sampled_from(fitting))))
        left -= shapes[-1].num_devices
    return shapes, hosts, devices


@hypothesis.given(pipelines())
@hypothesis.settings(max_examples=400)
def test_everything_that_fits_by_count_is_placed(pipeline):
    shapes, hosts, devices = pipeline
    placed = place_submeshes(shapes, hosts, devices)
    verify_placement(placed, hosts, devices)
    assert [placement.submesh for placement in placed] == shapes
    assert placed == place_submeshes(shapes, hosts, devices)
    whole = all(shape.devices_per_host == devices for shape in shapes)
    spare = hosts >= sum(shape.num_hosts for shape in shapes)
    if whole or spare:
        assert max(host_distances(placed), default=0) <= 1


def test_too_many_devices():
    with pytest.raises(ValueError, match="24 devices do not fit on a cluster of 2x8"):
        corners("1x8 2x8", 2)


def test_sizes_that_do_not_combine():
    with pytest.raises(ValueError, match="with 2 and 3 devices"):
        corners("1x2 1x3", 1, 6)


@pytest.mark.parametrize(
    ("placements", "message"),
    [
        (
            [Placement(0, 0, Submesh(1, 2)), Placement(0, 1, Submesh(1, 1))],
            "share device 1 of host 0",
        ),
        ([Placement(1, 0, Submesh(2, 4))], "Stage 0 leaves the cluster of 2x4"),
        ([Placement(0, 3, Submesh(1, 2))], "Stage 0 leaves"),
        ([Placement(-1, 0, Submesh(1, 2))], "Stage 0 leaves"),
    ],
)
def test_checker(placements, message):
    with pytest.raises(ValueError, match=message):
        verify_placement(placements, 2, 4)


def test_distances():
    placed = [
        Placement(host, 0, Submesh(size, 4))
        for host, size in [(0, 1), (0, 1), (1, 2), (5, 1), (2, 1)]
    ]
    assert host_distances(placed) == (0, 1, 3, 3)
