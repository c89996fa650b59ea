"""The pipeline benchmarks compute what they claim to measure."""

import itertools

import jax
import numpy as np
import pytest

import alpa_lite
from alpa_lite.passes.schedules import TaskTimes, simulate
from benchmarks import pipeline_memory
from benchmarks.pipeline_bubble import Emulation
from benchmarks.pipeline_model import HandWrittenPipeline, Model, one_f_one_b

SMALL = Model(num_stages=2, leaves_per_stage=2, num_microbatches=4)


@pytest.mark.parametrize(("stages", "microbatches"), [(2, 1), (2, 4), (4, 8), (8, 3)])
def test_order_by_hand_is_1f1b(stages, microbatches):
    order = one_f_one_b(stages, microbatches)
    assert len(set(order)) == len(order) == (2 * stages - 1) * microbatches
    at = {task: i for i, task in enumerate(order)}
    for kind, s, m in order:
        if kind == "forward" and s:
            assert at["forward", s - 1, m] < at[kind, s, m]
        elif kind == "backward":
            after = "forward" if s + 1 == stages - 1 else "backward"
            assert at["forward", s, m] < at[kind, s, m] > at[after, s + 1, m]
    for s in range(stages - 1):
        held = itertools.accumulate(1 if k == "forward" else -1 for k, t, _ in order if t == s)
        assert max(held) == min(stages - s, microbatches)


def test_loop_by_hand_trains_as_one_device_does():
    by_hand = HandWrittenPipeline(SMALL, jax.devices())
    state, expected, batch = by_hand.place(SMALL.init()), SMALL.init(), SMALL.batch()
    step = jax.jit(SMALL.step)
    for _ in range(2):
        state, loss = by_hand.step(state, batch)
        expected, expected_loss = step(expected, batch)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    for x, y in zip(*map(jax.tree.leaves, (state[0], expected["params"])), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def executable():
    parallel = alpa_lite.parallelize(SMALL.step, method=SMALL.method(1, "1f1b"))
    return parallel.compile(SMALL.init(), SMALL.batch())


def test_state_comes_back_in_the_layouts_of_the_next_call(executable):
    state, _ = executable(SMALL.init(), SMALL.batch())
    for x, sharding in zip(jax.tree.leaves(state), executable.inputs.shardings, strict=True):
        assert x.sharding is sharding


def test_emulated_devices_run_the_schedule(executable):
    schedule = executable.pipeline.schedule
    times = TaskTimes(
        forward_s=(0.005, 0.01), backward_s=(0.01, 0.015), forward_transfer_s=(0.002,),
        backward_transfer_s=(0.002,),
    )  # fmt: skip
    expected, loss = executable(SMALL.init(), SMALL.batch())
    with Emulation(executable, times) as emulated:
        state, found = emulated.run(jax.tree.leaves((SMALL.init(), SMALL.batch())))
    assert float(found) == float(loss)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y)
    for mesh, tasks in enumerate(schedule.tasks):
        records = sorted((r for r in emulated.records if r.mesh == mesh), key=lambda r: r.start_s)
        assert [r.task for r in records] == list(tasks)
        for a, b in itertools.pairwise(records):
            assert a.end_s <= b.start_s
        for r in records:
            assert r.end_s - r.start_s >= times.of_kind(r.task.kind)[r.task.stage]
    makespan_s = max(r.end_s for r in emulated.records) - min(r.start_s for r in emulated.records)
    assert makespan_s >= simulate(schedule, times).makespan_s


@pytest.mark.slow
def test_live_bytes_are_as_predicted():
    rows = pipeline_memory.measure_all()
    peaks = {(r["schedule"], r["mesh"]): r["measured_kib"] for r in rows}
    assert all(abs(r["ratio"] - 1) < 0.02 for r in rows), rows
    assert all(peaks["1f1b", m] < 0.7 * peaks["gpipe", m] for m in range(4))
    assert peaks["1f1b", 0] > peaks["1f1b", 3]
