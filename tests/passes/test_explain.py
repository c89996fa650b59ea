"""Every figure of an explanation is what planning again gives."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import alpa_lite
from alpa_lite.cost_model import Cluster, MeshCostModel
from alpa_lite.errors import InfeasibleError, PlanError
from alpa_lite.passes.explain import MEMORY, METHOD, NOTHING, PIN, explain_decision, price_baselines
from alpa_lite.passes.explain import sensitivity as explain_sensitivity
from alpa_lite.passes.explain_pipeline import PipelineVariants, explain_stage, pipeline_sensitivity
from alpa_lite.passes.explain_text import describe_decision, describe_explanation, describe_stage
from alpa_lite.passes.pipeline import StepArgs, plan_step
from alpa_lite.passes.pipeshard import plan_pipeline
from alpa_lite.passes.pricing import Workload, compute_s
from alpa_lite.passes.report import chosen_strategies
from alpa_lite.passes.rules import RuleTable
from alpa_lite.passes.stages.stage_planner import StageCache
from alpa_lite.passes.variants import Variants, faster_links

WIDTH = 512
ROWS = 256
CLUSTER = Cluster.parse("h100:2x4")
MESH = {"dp": 2, "tp": 4}
TABLE = RuleTable()  # rules of primitives, which no test changes


def step(params, batch):
    def loss(params):
        x = batch
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2)

    value, grads = jax.value_and_grad(loss)(params)
    return [w - 0.1 * g for w, g in zip(params, grads, strict=True)], value


CALL = StepArgs(
    fun=step,
    args=([jax.ShapeDtypeStruct((WIDTH, WIDTH), "float32")] * 3,
          jax.ShapeDtypeStruct((ROWS, WIDTH), "float32")),
    arg_names=("params", "batch"), batch_argnums=(1,), donate_argnums=(0,), name="step",
)  # fmt: skip


def variants(method, cluster=CLUSTER):
    return Variants.of(plan_step(CALL, method, cluster, table=TABLE), method)


def planned(method, cluster=CLUSTER):
    return plan_step(CALL, method, cluster, table=TABLE).plan


@pytest.fixture(scope="module")
def free():
    return variants(alpa_lite.ShardParallel(mesh_shape=MESH, num_microbatches=1))


@pytest.fixture(scope="module")
def tight():
    """A plan that memory keeps from being faster: parameters alone are 3 MiB, and so are sums."""
    method = alpa_lite.ShardParallel(
        mesh_shape=MESH, num_microbatches=1, memory_budget_bytes=3.2 * 2**20
    )
    return variants(method)


def test_solved_again_a_plan_is_what_it_is(free, tight):
    for each in (free, tight):
        again = each.solve()
        assert again.predicted == each.plan.predicted
        assert again.decisions == each.plan.decisions == each.records


def test_costs_add_up_to_the_plan(free, tight):
    for each in (free, tight):
        costs = [each.cost(d.name) for d in each.records]
        predicted = each.plan.predicted
        assert sum(c.reading_s for c in costs) == pytest.approx(predicted.communication_s)
        # Operations without a choice, scalars here, are no decisions.
        inputs, names = each.inputs, {d.name for d in each.records}
        decided = {inputs.classes[n.id] for n in inputs.contraction.nodes if n.name in names}
        rest = Workload(tuple(op for op in inputs.work.ops if op.cls not in decided), {})
        chosen = chosen_strategies(inputs, each.decisions)
        mesh = each.plan.mesh
        rest_s = compute_s(rest, chosen, mesh, MeshCostModel(CLUSTER, mesh.axes))
        assert sum(c.compute_s for c in costs) + rest_s == pytest.approx(predicted.compute_s)
        held = sum(c.peak_bytes for c in costs)
        assert 0.95 * predicted.peak_bytes < held <= predicted.peak_bytes * (1 + 1e-9)


def test_memory_over_the_step(free, tight):
    for each in (free, tight):
        moments, curves = each.memory()
        total = sum(curves.values())
        predicted = each.plan.predicted
        assert len(moments) == len(total)
        assert total.max() == pytest.approx(predicted.peak_bytes)
        at = int(total.argmax())
        assert moments[at] == predicted.peak_at
        found = {name: float(curve[at]) for name, curve in curves.items()}
        assert found == pytest.approx(dict(predicted.memory_bytes))


@pytest.mark.parametrize("which", ["free", "tight"])
def test_runner_up_is_the_best_of_all_other_layouts(which, request):
    """Against pinning the parameter to every layout there is, one after the other."""
    found = request.getfixturevalue(which)
    path = "params.1"
    name = found.decision_of_input(path)
    own = found.plan.inputs[path]
    axes = [None, "dp", "tp", ("dp", "tp")]
    objectives = {}
    for spec in [P(a, b) for a in axes for b in axes]:
        method = alpa_lite.ManualParallel(
            {path: spec}, mesh_shape=MESH, num_microbatches=1,
            memory_budget_bytes=found.plan.memory_budget_bytes,
        )  # fmt: skip
        try:
            plan = planned(method)
        except (PlanError, InfeasibleError):
            continue
        objectives[plan.inputs[path]] = plan.solve.objective_s
    assert len(objectives) > 3
    assert objectives.pop(own) == pytest.approx(found.plan.solve.objective_s)
    without = found.solve(without=name)
    assert without.inputs[path] != own
    assert without.solve.objective_s == pytest.approx(min(objectives.values()))
    explained = explain_decision(found, name)
    assert explained.runner_up.outcome.step_s == without.predicted.step_s
    assert explained.runner_up.outcome.peak_bytes == without.predicted.peak_bytes
    changed = {
        a.name
        for a, b in zip(found.plan.decisions, without.decisions, strict=True)
        if a.axes != b.axes
    }
    assert {name, *explained.runner_up.also_changed} == changed


@pytest.mark.parametrize("which", ["free", "tight"])
def test_sensitivity_is_planning_again(which, request):
    found = request.getfixturevalue(which)
    told = explain_sensitivity(found)
    method, budget = found.inputs.method, found.plan.memory_budget_bytes
    more = planned(replace(method, memory_budget_bytes=budget + 2**30))
    assert told.more_memory.step_s == more.predicted.step_s
    assert told.more_memory.peak_bytes == more.predicted.peak_bytes
    unlimited = planned(replace(method, memory_budget_bytes=1e17))
    assert told.unlimited_memory.step_s == unlimited.predicted.step_s
    faster = planned(method, faster_links(CLUSTER, 2.0))
    assert told.more_bandwidth.step_s == faster.predicted.step_s
    assert told.binding == (MEMORY if which == "tight" else NOTHING)
    if which == "tight":
        assert told.more_memory.step_s < found.plan.predicted.step_s


def test_twice_the_bandwidth_halves_what_bytes_take():
    cluster = replace(CLUSTER, collective_overhead_s=0.0)
    before, after = (
        MeshCostModel(each, tuple(MESH.items())) for each in (cluster, faster_links(cluster, 2.0))
    )
    for axes in (("dp",), ("tp",)):
        of_bytes = [
            m.collective_s("all_gather", 2**32, axes) - m.collective_s("all_gather", 2**31, axes)
            for m in (before, after)
        ]
        assert of_bytes[0] == pytest.approx(2 * of_bytes[1])


def test_what_binds_a_decision(free, tight):
    name = free.decision_of_input("params.1")
    assert explain_decision(free, name).binding == NOTHING
    bound = [explain_decision(tight, d.name) for d in tight.records if d.name.startswith("params")]
    assert MEMORY in {each.binding for each in bound}
    recipe = variants(alpa_lite.DataParallel(num_microbatches=1))
    prescribed = explain_decision(recipe, recipe.decision_of_input("params.0"))
    assert prescribed.binding == METHOD and prescribed.num_choices == 1
    assert prescribed.runner_up.axes is None
    assert prescribed.runner_up.outcome.reason.endswith("has no other choice")
    method = alpa_lite.ManualParallel({"params.1": P("tp")}, mesh_shape=MESH, num_microbatches=1)
    pinned = variants(method)
    assert explain_decision(pinned, pinned.decision_of_input("params.1")).binding == PIN


def test_baselines_are_the_plans_of_their_methods():
    budget = float(CLUSTER.usable_hbm_bytes)
    found = price_baselines(CALL, CLUSTER, budget, 4, table=TABLE)
    expected = {
        "data parallel": alpa_lite.DataParallel(),
        "ZeRO-1": alpa_lite.Zero1Parallel(),
        "FSDP (ZeRO-3)": alpa_lite.Zero3Parallel(),
        "searched, one mesh": alpa_lite.AutoParallel(),
        "Megatron, dp=2, tp=4": alpa_lite.ThreeDParallel(dp=2, tp=4, pp=1, num_microbatches=4),
        "Megatron, tp=4, pp=2": alpa_lite.ThreeDParallel(dp=1, tp=4, pp=2, num_microbatches=4),
    }
    assert {each.name for each in found} == set(expected)
    for each in found:
        step = alpa_lite.parallelize(CALL.fun, method=expected[each.name], cluster=CLUSTER)
        plan = step.plan(*CALL.args)
        assert each.outcome.step_s == plan.predicted.step_s, each.name
        assert each.outcome.peak_bytes == plan.predicted.peak_bytes, each.name


def test_a_baseline_that_does_not_fit_says_why():
    found = price_baselines(CALL, CLUSTER, 2.0 * 2**20, 1, table=TABLE)
    first = next(each for each in found if each.name == "data parallel")
    assert first.outcome.step_s is None and "MiB" in first.outcome.reason and first.layout == ""


def test_texts_show_the_figures(tight):
    told = explain_sensitivity(tight)
    text = describe_explanation(tight.plan, told, ())
    assert "Memory: with more of it another plan on the same mesh would be faster." in text
    bound = next(
        found for d in tight.records if (found := explain_decision(tight, d.name)).binding == MEMORY
    )
    lines = describe_decision(bound, "a title").splitlines()
    assert lines[0] == "a title"
    assert any(line.startswith("  binds ") and "memory: unlimited" in line for line in lines)


# Pipelines.


def manual(cuts=((0,), (1, 2)), **options):
    options = {"num_microbatches": 4, "layer_num": 3, "remat": "none"} | options
    return alpa_lite.ManualPipeline(layers=cuts, submeshes=[(1, 4), (1, 4)], **options)


@pytest.fixture(scope="module")
def pipeline():
    method = manual()
    return PipelineVariants(
        plan_pipeline(CALL, method, CLUSTER, table=TABLE), method, TABLE, StageCache()
    )


def test_changes_of_a_stage_are_pipelines_planned_again(pipeline):
    found = explain_stage(pipeline, 1)
    by_name = {c.change: c.outcome for c in found.changes}
    moved = plan_pipeline(CALL, manual(((0, 1), (2,))), CLUSTER, table=TABLE).plan
    # The stages' logical meshes are those of the plan, whether or not others suit the new cut.
    shapes = [s.plan.mesh.shape for s in pipeline.plan.stages]
    same = plan_pipeline(
        CALL, manual(((0, 1), (2,)), mesh_shapes=shapes), CLUSTER, table=TABLE
    ).plan
    assert by_name["layer 1 on stage 0"].step_s == same.predicted.step_s
    assert same.predicted.step_s >= moved.predicted.step_s * 0.99
    assert {"remat dots", "remat full"} < set(by_name)
    times = [c.outcome.step_s for c in found.changes if c.outcome.step_s is not None]
    assert times == sorted(times) and found.runner_up.outcome.step_s == times[0]
    assert found.step_s == pipeline.plan.predicted.step_s
    assert found.slowest
    stage = pipeline.plan.stages[1]
    assert found.busy_s == pytest.approx(4 * (stage.forward_s + stage.backward_s))
    text = describe_stage(found)
    assert "so it sets the pace" in text and "layer 1 on stage 0" in text


def test_other_meshes_of_a_stage_are_tried(pipeline):
    changes = {c.change for c in explain_stage(pipeline, 0).changes}
    own = pipeline.plan.stages[0].plan.mesh.shape
    every = {"logical mesh 4": (4,), "logical mesh 2x2": (2, 2)}
    assert {name for name, shape in every.items() if shape != own} <= changes


def test_pipeline_sensitivity_is_planning_again(pipeline):
    told = pipeline_sensitivity(pipeline)
    shapes = [s.plan.mesh.shape for s in pipeline.plan.stages]
    faster = plan_pipeline(
        CALL, manual(mesh_shapes=shapes), faster_links(CLUSTER, 2.0), table=TABLE
    ).plan
    assert told.more_bandwidth.step_s == faster.predicted.step_s
    assert told.binding == NOTHING
    assert told.more_memory.step_s == pytest.approx(pipeline.plan.predicted.step_s, rel=0.005)


def test_a_decision_of_a_stage(pipeline):
    stage = pipeline.plan.stages[1]
    found = Variants.of(pipeline.pipeline.planned[1], pipeline.method, stage.in_flight)
    again = found.solve()
    assert again.predicted.step_s == pytest.approx(stage.plan.predicted.step_s, rel=0.005)
    assert again.predicted.peak_bytes == pytest.approx(stage.peak_bytes, rel=0.05)
    name = found.decision_of_input("params.1")
    told = explain_decision(found, name)
    assert told.step_s == stage.plan.predicted.step_s
    assert told.runner_up.outcome.step_s == found.solve(without=name).predicted.step_s
