"""Measured steps of pipelines."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import alpa_lite
from alpa_lite.cost_model import Cluster
from alpa_lite.passes.schedules import (
    BACKWARD,
    FORWARD,
    Task,
    make_schedule,
    simulate,
)
from alpa_lite.runtime.metrics import measured_times, peak_s
from alpa_lite.runtime.timing import TimedInstruction, bytes_per_device

NUM_LAYERS = 4
WIDTH = 16
BATCH = 16
MICROBATCHES = 4


def step(params, batch):
    def loss(params):
        x = batch["x"]
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.mean((x - batch["y"]) ** 2)

    value, grads = jax.value_and_grad(loss)(params)
    return [w - 0.1 * g for w, g in zip(params, grads, strict=True)], value


def make_args():
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((WIDTH, WIDTH), np.float32) / 4 for _ in range(NUM_LAYERS)]
    batch = {k: rng.standard_normal((BATCH, WIDTH), np.float32) for k in ("x", "y")}
    return weights, batch


@pytest.fixture(scope="module")
def profiled():
    """(executable, result, metrics, steps that ran)."""
    method = alpa_lite.ManualPipeline(
        layers=[[0, 1], [2, 3]], submeshes=[(1, 2), (1, 2)], mesh_shapes=[(2,), (2,)],
        num_microbatches=MICROBATCHES, layer_num=NUM_LAYERS,
    )  # fmt: skip
    parallel = alpa_lite.parallelize(step, method=method)
    args = make_args()
    executable = parallel.compile(*args)
    result, metrics = alpa_lite.profile_step(
        executable, args, steps=2, repeats=2, tokens_per_step=96
    )
    return executable, result, metrics, 2 + 2 + 2 + 1


def test_profiling_trains_as_the_step_does(profiled):
    _, (params, loss), _, steps = profiled
    expected, batch = make_args()
    for _ in range(steps):
        expected, expected_loss = jax.jit(step)(expected, batch)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    for x, y in zip(params, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_every_instruction_is_counted_once(profiled):
    executable, _, metrics, _ = profiled
    counts = {(i.mesh, i.kind): i.count for i in metrics.instructions}
    assert sum(counts.values()) == metrics.num_instructions
    assert metrics.num_instructions == len(executable.program.instructions)
    for mesh in (0, 1):
        assert counts[mesh, "forward"] == counts[mesh, "backward"] == MICROBATCHES
        assert counts[mesh, "move"] == MICROBATCHES
        assert counts[mesh, "update"] == 1
    assert all(0 < i.median_s <= i.total_s for i in metrics.instructions)


def test_rates(profiled):
    _, _, metrics, _ = profiled
    flops = 3 * 2 * BATCH * WIDTH**2 * NUM_LAYERS
    assert metrics.flops_per_step == {"float32": flops}
    assert metrics.tokens_per_s == pytest.approx(96 / metrics.step_s)
    assert metrics.examples_per_s == pytest.approx(BATCH / metrics.step_s)
    cluster = metrics.plan.cluster
    peak = cluster.device.peak_flops_per_s("float32") * 8 * cluster.shared_compute
    assert metrics.mfu == pytest.approx(flops / metrics.step_s / peak)
    assert 0 < metrics.dispatch_s <= metrics.step_s
    assert metrics.idle_share == pytest.approx(1 - sum(metrics.busy_s) / (2 * metrics.step_s))
    text = metrics.describe()
    assert "tokens/s" in text and "MFU" in text and "backward" in text


def test_bubble_is_that_of_the_schedule_with_measured_times(profiled):
    executable, _, metrics, _ = profiled
    replayed = simulate(executable.pipeline.schedule, metrics.times)
    assert metrics.bubble_share == replayed.bubble_share
    assert all(s > 0 for s in (*metrics.times.forward_s, *metrics.times.backward_transfer_s))
    assert 0 < metrics.bubble_share < 1


def test_recording_keeps_the_order_of_every_mesh_and_link(profiled):
    executable, _, metrics, _ = profiled
    recorded = metrics.recording.instructions
    assert [r.name for r in recorded] == [i.name for i in executable.program.instructions]
    lanes, ready = {}, {}
    for each, timed in zip(executable.program.instructions, recorded, strict=True):
        lane = timed.mesh, timed.target
        assert timed.start_s <= timed.end_s <= metrics.recording.step_s
        assert timed.start_s >= lanes.get(lane, 0.0)
        assert all(timed.start_s >= ready.get(s, 0.0) for s in each.reads)
        lanes[lane] = timed.end_s
        ready.update(dict.fromkeys(each.writes, timed.end_s))


def test_recorded_memory_ends_with_what_the_step_returns(profiled):
    executable, result, metrics, _ = profiled
    state = [0, 0]
    for x in result[0]:
        on_first = x.sharding.device_set <= set(executable.meshes[0].devices.flat)
        state[0 if on_first else 1] += bytes_per_device(x.shape, x.dtype, x.sharding)
    state[1] += result[1].dtype.itemsize
    for mesh, curve in enumerate(metrics.recording.memory):
        moments = [t for t, _ in curve]
        assert moments == sorted(set(moments))
        in_use = [b for _, b in curve]
        assert max(in_use) > in_use[-1]
        # Numbers of microbatches stay on the devices that read them.
        assert state[mesh] <= in_use[-1] <= state[mesh] + 4 * MICROBATCHES


def timed(seconds, kind, mesh, target=None, stage=None, microbatch=None):
    task = None if stage is None else Task(kind, stage, microbatch)
    return TimedInstruction(
        name="", kind=kind, mesh=mesh, target=target, task=task, start_s=1.0, end_s=1.0 + seconds,
        dispatch_s=0.0,
    )  # fmt: skip


def test_measured_times_by_hand():
    instructions = [
        timed(0.5, "move", 0, target=1),  # of an input, before any task
        timed(0.25, "prepare", 1),
        timed(1.0, FORWARD, 0, stage=0, microbatch=0),
        timed(0.1, "move", 0, target=1),
        timed(0.2, "move", 0, target=1),  # of the same task
        timed(2.0, FORWARD, 1, stage=1, microbatch=0),
        timed(3.0, FORWARD, 0, stage=0, microbatch=1),
        timed(0.5, "move", 0, target=1),
        timed(4.0, BACKWARD, 1, stage=1, microbatch=0),
        timed(0.75, "move", 1, target=0),
        timed(5.0, BACKWARD, 0, stage=0, microbatch=0),
        timed(1.0, "update", 1),
        timed(2.0, "move", 1, target=0),  # for the update
    ]
    times = measured_times(make_schedule("1f1b", 2, 2), instructions)
    assert times.forward_s == (2.0, 2.0)
    assert times.backward_s == (5.0, 4.0)
    assert times.forward_transfer_s == pytest.approx((0.4,))
    assert times.backward_transfer_s == (0.75,)
    assert times.tail_s == (0.5, 3.25)


def test_peak_seconds_by_dtype():
    cluster = Cluster.resolve("h100:2x8")
    rates = cluster.device.peak_flops_per_s
    assert rates("bfloat16") != rates("float32")
    found = peak_s({"bfloat16": 16 * rates("bfloat16"), "float32": 8 * rates("float32")}, cluster)
    assert found == pytest.approx(1.5)


def test_only_pipelines_are_profiled():
    args = make_args()
    executable = alpa_lite.parallelize(step, method=alpa_lite.DataParallel()).compile(*args)
    with pytest.raises(TypeError, match="what a step with pipeline stages compiles to"):
        alpa_lite.profile_step(executable, args)


def test_wrong_arguments(profiled):
    executable, *_ = profiled
    weights, batch = make_args()
    with pytest.raises(TypeError, match="compiled for arguments"):
        alpa_lite.profile_step(executable, (weights[:-1], batch))
    with pytest.raises(ValueError, match="at least 1"):
        alpa_lite.profile_step(executable, (weights, batch), repeats=0)
