import dataclasses
import itertools
import math
import re
import time

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from alpa_lite.passes.inter_op import auto_layer_num, cluster_layers, crossing_bytes
from alpa_lite.passes.inter_op.cluster import SCOPE_DISCOUNT, balanced_flops

seeds = st.integers(0, 10_000)


def random_instance(seed):
    """At most 9 ops and 4 layers; FLOPs and bytes with many ties and zeros."""
    rng = np.random.default_rng(seed)
    num_ops = int(rng.integers(2, 10))
    flops = rng.integers(0, 5, num_ops)
    flops[rng.integers(num_ops)] += rng.choice([1, 20])
    flops = flops * rng.choice([1.0, 1e9])
    crossing = rng.integers(0, rng.choice([2, 6, 1000]), num_ops + 1)
    crossing[[0, -1]] = 0
    scopes = rng.random(num_ops + 1) < 0.4
    num_layers = int(rng.integers(1, min(4, np.count_nonzero(flops)) + 1))
    return flops, crossing, scopes, num_layers


def all_clusterings(flops, crossing, scopes, num_layers):
    """Cuts, deviation, discounted bytes and squares of every clustering, from the definitions."""
    counted = balanced_flops(flops, num_layers)
    mean = counted.sum() / num_layers
    weight = [100 - SCOPE_DISCOUNT if scope else 100 for scope in scopes]
    for cuts in itertools.combinations(range(1, len(flops)), num_layers - 1):
        layers = [counted[a:b].sum() / mean for a, b in itertools.pairwise([0, *cuts, len(flops)])]
        deviation = max(abs(layer - 1) for layer in layers)
        cost = sum(int(crossing[cut] + 1) * weight[cut] for cut in cuts)
        yield cuts, deviation, cost, sum(layer**2 for layer in layers)


@pytest.mark.parametrize("first", range(0, 300, 100))
def test_same_as_brute_force(first):
    for seed in range(first, first + 100):
        instance = random_instance(seed)
        delta = [0.0, 0.2, 0.5, 1.0][seed % 4]
        found = cluster_layers(*instance[:3], layer_num=instance[3], delta=delta)
        every = list(all_clusterings(*instance))
        smallest = min(deviation for _, deviation, _, _ in every)
        assert found.delta == pytest.approx(max(delta, smallest), abs=1e-7)
        assert found.relaxed == (found.delta > delta)
        allowed = [plan for plan in every if plan[1] <= max(delta, smallest) + 1e-7]
        chosen = next(plan for plan in every if plan[0] == found.cuts)
        assert chosen[1] <= found.delta + 1e-7
        best = min(plan[2] for plan in allowed)
        assert chosen[2] == best
        squares = min(plan[3] for plan in allowed if plan[2] == best)
        assert chosen[3] == pytest.approx(squares)


@hypothesis.given(seed=seeds, delta=st.floats(0, 1), more=st.floats(0, 1))
@hypothesis.settings(max_examples=80)
def test_larger_delta_is_never_worse(seed, delta, more):
    flops, crossing, scopes, num_layers = random_instance(seed)
    scopes[:] = False  # no discount: the bytes are the objective
    tight = cluster_layers(flops, crossing, scopes, layer_num=num_layers, delta=delta)
    loose = cluster_layers(flops, crossing, scopes, layer_num=num_layers, delta=delta + more)
    if not tight.relaxed or delta + more >= tight.delta:
        assert loose.boundary_bytes <= tight.boundary_bytes


@hypothesis.given(seed=seeds)
def test_crossing_bytes_from_the_definition(seed):
    rng = np.random.default_rng(seed)
    num_ops, num_values = int(rng.integers(1, 8)), int(rng.integers(0, 12))
    producer, last_reader = rng.integers(0, num_ops, (2, num_values))
    size = rng.integers(0, 100, num_values)
    expected = [
        sum(int(s) for p, r, s in zip(producer, last_reader, size, strict=True) if p < cut <= r)
        for cut in range(num_ops + 1)
    ]
    assert crossing_bytes(producer, last_reader, size, num_ops).tolist() == expected


def test_crossing_bytes_refuses_positions_outside():
    with pytest.raises(ValueError, match="positions of the 2 ops"):
        crossing_bytes(np.array([0]), np.array([2]), np.array([8]), 2)


def test_hand_computed():
    # Means of 6: {4, 2 | 4, 2} has cut bytes 7, {4, 2, 4 | 2} deviates by 2/3.
    flops, crossing = np.array([4.0, 2, 4, 2]), np.array([0, 9, 7, 1, 0])
    found = cluster_layers(flops, crossing, layer_num=2, delta=0.5)
    assert (found.cuts, found.boundary_bytes, found.layer_flops) == ((2,), 7, (6.0, 6.0))
    assert (found.delta, found.relaxed, found.bounds) == (0.5, False, (0, 2, 4))
    assert cluster_layers(flops, crossing, layer_num=2, delta=0.7).cuts == (3,)


def test_relaxes_no_further_than_needed():
    # Means of 5: the cut after the first op deviates by 1/5, the others by more.
    found = cluster_layers(np.array([4.0, 5, 1]), np.array([0, 9, 1, 0]), layer_num=2, delta=0.1)
    assert (found.cuts, found.relaxed) == ((1,), True)
    assert found.delta == pytest.approx(0.2)


@pytest.mark.parametrize(("inside", "cut"), [(95, 2), (81, 2), (79, 1)])
def test_leaves_scopes_only_for_a_fifth_of_the_bytes(inside, cut):
    scopes = np.array([False, False, True, False])
    found = cluster_layers(np.ones(3), np.array([0, inside, 100, 0]), scopes, layer_num=2)
    assert found.cuts == (cut,)
    assert found.cuts_inside_scopes == (cut != 2)


def test_scope_boundary_wins_where_nothing_crosses():
    scopes = np.array([False, False, True, False])
    assert cluster_layers(np.ones(3), np.zeros(4, dtype=int), scopes, layer_num=2).cuts == (2,)


def test_scalars_behind_the_loss_are_no_layers():
    flops, crossing = np.array([8.0] * 8 + [0.001] * 8), np.array([0] + [100] * 7 + [4] * 8 + [0])
    assert cluster_layers(flops, crossing, layer_num=4).cuts == (2, 4, 6)


def block_model(num_blocks, head):
    """Embedding, blocks of 4 ops, norm, head, loss; the residual stream crosses every cut."""
    flops = [0.0, 0.0] + [3.0, 0.0, 6.0, 0.1] * num_blocks + [0.01] + [head] + [0.02, 0.0]
    scopes = np.zeros(len(flops) + 1, dtype=bool)
    scopes[[2 + 4 * block for block in range(num_blocks + 1)]] = True
    scopes[[-4, -3]] = True
    crossing = np.full(len(flops) + 1, 100)
    crossing[3::4] = 150
    crossing[-3:] = 4
    crossing[[0, -1]] = 0
    return np.array(flops), crossing, scopes


@pytest.mark.parametrize(("num_blocks", "head", "count"), [(2, 1, 2), (2, 60, 3), (126, 6, 127)])
def test_auto_keeps_blocks_whole(num_blocks, head, count):
    flops, crossing, scopes = block_model(num_blocks, head)
    found = cluster_layers(flops, crossing, scopes)
    assert (found.num_layers, found.cuts_inside_scopes) == (count, 0)
    starts = {2 + 4 * block for block in range(1, num_blocks)}
    assert starts <= set(found.cuts)


def test_auto_shares_layers_beyond_the_limit():
    flops, _, scopes = block_model(300, 0)
    assert auto_layer_num(flops, scopes) == 100


def test_auto_without_scopes_counts_heavy_ops():
    flops = np.array([10.0, 0, 0.1, 8] * 6)
    assert auto_layer_num(flops, np.zeros(25, dtype=bool)) == 4
    assert auto_layer_num(np.zeros(3), np.zeros(4, dtype=bool)) == 1


def test_one_layer():
    found = cluster_layers(np.zeros(3), np.array([0, 5, 5, 0]), layer_num=1)
    assert (found.cuts, found.boundary_bytes, found.relaxed) == ((), 0, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_num": 3}, "between 1 and 2, the ops with FLOPs"),
        ({"layer_num": 0}, "between 1 and 2"),
        ({"delta": -1.0}, "delta is -1.0"),
        ({"delta": math.nan}, "delta is nan"),
        ({"flops": np.array([1.0, math.nan, 1])}, "flops must hold"),
        ({"boundary_bytes": np.zeros(3, dtype=int)}, "boundary_bytes has shape (3,)"),
        ({"boundary_bytes": np.zeros(4)}, "must be non-negative integers"),
        ({"boundary_bytes": np.full(4, 1 << 60)}, "too large"),
        ({"scope_boundary": np.zeros(3, dtype=bool)}, "scope_boundary has shape"),
    ],
)
def test_bad_input(change, message):
    arguments = {"flops": np.array([1.0, 0, 1]), "boundary_bytes": np.zeros(4, dtype=int)} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        cluster_layers(**arguments)


def test_result_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        cluster_layers(np.ones(2), np.zeros(3, dtype=int), layer_num=1).cuts = ()


@pytest.mark.parametrize("spread", [0.0, 0.9])
def test_fast_enough_for_large_models(spread):
    rng = np.random.default_rng(0)
    flops = np.where(rng.random(5000) < spread, 0.0, rng.random(5000) * 1e9)
    crossing = rng.integers(0, 10**9, 5001)
    start_s = time.process_time()
    found = cluster_layers(flops, crossing, rng.random(5001) < 0.03, layer_num=128)
    assert found.num_layers == 128 and not found.relaxed
    assert time.process_time() - start_s < 5
