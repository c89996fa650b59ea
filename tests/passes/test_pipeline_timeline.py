"""The simulated step of a pipeline plan, from the plan alone."""

import jax
import jax.numpy as jnp
import pytest

import alpa_lite
from alpa_lite.cost_model import Cluster
from alpa_lite.passes.pipeline import StepArgs
from alpa_lite.passes.pipeline_timeline import plan_bytes, plan_schedule, plan_timeline
from alpa_lite.passes.pipeshard import plan_pipeline
from alpa_lite.passes.rules import RuleTable
from alpa_lite.passes.schedules import memory_over_time

NUM_LAYERS = 4
WIDTH = 16


def step(params, batch):
    def loss(params):
        x = batch["x"]
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.mean((x - batch["y"]) ** 2)

    value, grads = jax.value_and_grad(loss)(params)
    return [w - 0.1 * g for w, g in zip(params, grads, strict=True)], value


def planned(schedule, num_virtual=1):
    """A `PlannedPipeline` of two submeshes."""
    method = alpa_lite.ManualPipeline(
        layers=[[0, 1], [2, 3]] if num_virtual == 1 else [[0], [1], [2], [3]],
        submeshes=[(1, 1), (1, 1)], schedule=schedule, num_virtual=num_virtual,
        num_microbatches=4, layer_num=NUM_LAYERS,
    )  # fmt: skip
    row = jax.ShapeDtypeStruct((16, WIDTH), "float32")
    weights = [jax.ShapeDtypeStruct((WIDTH, WIDTH), "float32")] * NUM_LAYERS
    call = StepArgs(
        fun=step, args=(weights, {"x": row, "y": row}), arg_names=("params", "batch"),
        batch_argnums=(1,), donate_argnums=(0,), name="step",
    )  # fmt: skip
    return plan_pipeline(call, method, Cluster.resolve("h100:1x2"), table=RuleTable())


@pytest.mark.parametrize(
    ("schedule", "num_virtual"),
    [("1f1b", 1), ("zb-h1", 1), ("chimera", 1), ("interleaved_1f1b", 2)],
)
def test_a_saved_plan_gives_the_timeline_it_was_made_from(schedule, num_virtual, tmp_path):
    pipeline = planned(schedule, num_virtual)
    pipeline.plan.save(tmp_path / "plan.json")
    plan = alpa_lite.PipelinePlan.load(tmp_path / "plan.json")
    assert plan_schedule(plan) == pipeline.schedule
    assert plan_timeline(plan) == pipeline.timeline
    assert plan_timeline(plan).step_s == plan.predicted.step_s
    assert sum(s.send_s + s.return_s for s in plan.stages) > 0
    assert plan.stages[-1].send_s == plan.stages[0].return_s == 0


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_simulated_memory_peaks_at_the_planned_peak(schedule):
    plan = planned(schedule).plan
    memory = memory_over_time(plan_timeline(plan), plan_bytes(plan))
    for mesh, stage in zip(memory, plan.stages, strict=True):
        assert mesh.peak_bytes == pytest.approx(stage.peak_bytes, abs=stage.in_flight)
        assert stage.stash_bytes > 0
