"""What a caller can do wrong with options, arguments and plans, and what the planner says then."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import alpa_lite
from alpa_lite import AutoParallel, DataParallel, ManualParallel, ShardParallel
from alpa_lite.cost_model.checks import ClusterError
from alpa_lite.errors import InfeasibleError, PlanError, StepError
from alpa_lite.models import build
from alpa_lite.passes import build as build_module
from alpa_lite.passes.intra_op import solve_intra_op
from alpa_lite.passes.plan import Plan
from tests.passes.small_step import W, X, floats, good_step, solve_plan, step_with_aux

# Mesh shapes and other options.


@pytest.mark.parametrize("shape", [(2, 3), (8,), {"dp": 2, "tp": 4}, (3, -1)])
def test_mesh_shape_must_fill_the_cluster(shape: Any) -> None:
    with pytest.raises(PlanError, match="but the cluster has 4; axis sizes must multiply to 4"):
        solve_plan(method=ShardParallel(mesh_shape=shape))


@pytest.mark.parametrize("shape", [(), (1, 1, 1, 2, 2), dict.fromkeys("abcde", 1)])
def test_mesh_shape_has_one_to_four_axes(shape: Any) -> None:
    with pytest.raises(ValueError, match="mesh_shape must have 1 to 4 axes"):
        ShardParallel(mesh_shape=shape)


@pytest.mark.parametrize("shape", [(2, -3), (0, 4), (2.0, 2), (True, 4), ("2", 2), {"dp": None}])
def test_mesh_shape_holds_positive_integers(shape: Any) -> None:
    with pytest.raises(ValueError, match="sizes must be positive integers"):
        ShardParallel(mesh_shape=shape)


@pytest.mark.parametrize("shape", [4, "22", object()])
def test_mesh_shape_is_a_sequence_or_mapping(shape: Any) -> None:
    with pytest.raises(ValueError, match="mesh_shape must be a sequence of sizes, or a mapping"):
        ShardParallel(mesh_shape=shape)


def test_mesh_shape_has_one_open_size_at_most() -> None:
    assert solve_plan(method=ShardParallel(mesh_shape=(2, -1))).mesh.shape == (2, 2)
    with pytest.raises(PlanError, match="at most one -1"):
        solve_plan(method=ShardParallel(mesh_shape=(-1, -1)))


def test_mesh_axis_names_are_identifiers() -> None:
    with pytest.raises(ValueError, match="axis names must be identifiers"):
        ShardParallel(mesh_shape={"a b": 4})


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("num_microbatches", 0, 'must be a positive integer or "auto", found 0'),
        ("num_microbatches", 2.0, 'must be a positive integer or "auto", found 2.0'),
        ("num_microbatches", True, 'must be a positive integer or "auto", found True'),
        (
            "memory_budget_bytes",
            -1,
            "memory_budget_bytes must be a positive number below 1e+18, found -1",
        ),
        ("memory_budget_bytes", math.nan, "memory_budget_bytes must be a positive number"),
        ("memory_budget_bytes", 10**400, "must be a positive number below 1e+18, found 1000"),
        ("memory_budget_bytes", float("inf"), "below 1e+18, found inf"),
        ("memory_budget_bytes", "8 GiB", "must be a positive number below 1e+18, found '8 GiB'"),
        ("time_limit_s", 0, "time_limit_s must be a positive number below 1e+18, found 0"),
        ("time_limit_s", None, "time_limit_s must be a positive number below 1e+18, found None"),
    ],
)
def test_options_of_methods_are_checked(option: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        AutoParallel(**{option: value})


def test_sizes_of_numpy_are_sizes() -> None:
    assert ShardParallel(mesh_shape=(np.int64(4),)) == ShardParallel(mesh_shape=(4,))


@pytest.mark.parametrize("specs", [{3: P("tp")}, P("tp"), [("w", P("tp"))]], ids=str)
def test_pins_are_a_mapping_from_patterns(specs: Any) -> None:
    with pytest.raises(TypeError, match="takes a mapping from path patterns to PartitionSpecs"):
        ManualParallel(specs, mesh_shape={"tp": 4})


def test_unknown_solver() -> None:
    with pytest.raises(ValueError, match="nope.*available: highs"):
        solve_plan(method=AutoParallel(solver="nope"))


def test_method_is_a_method() -> None:
    with pytest.raises(TypeError, match="method must be"):
        solve_plan(method="auto")


def test_a_short_time_limit_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the integer programs of all meshes together; what they find until then is the plan."""
    limits = []

    def limited(problem: Any, *, time_limit_s: float, **options: Any) -> Any:
        limits.append(time_limit_s)
        return solve_intra_op(problem, time_limit_s=time_limit_s, **options)

    monkeypatch.setattr(build_module, "solve_intra_op", limited)
    plan = solve_plan(method=AutoParallel(time_limit_s=1e-3), cluster="cpu:8")
    assert len(limits) == len(plan.alternatives) == 2
    assert sum(limits) <= 1e-3
    assert plan.solve.status in ("optimal", "within_gap", "time_limit")


# Clusters and models.


def test_unknown_cluster_preset() -> None:
    with pytest.raises(ClusterError, match="unknown kind 'h1000'.*did you mean h100"):
        solve_plan(cluster="h1000:4")
    with pytest.raises(ClusterError, match="has not the form KIND:HOSTSxDEVICES"):
        solve_plan(cluster="h100")


def test_missing_cluster_file(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"nothing\.json: the cluster file cannot be read"):
        solve_plan(cluster=str(tmp_path / "nothing.json"))


def test_cluster_of_another_type() -> None:
    with pytest.raises(TypeError, match="a cluster is a Cluster, text or a path, found int"):
        solve_plan(cluster=4)


def test_unknown_model_preset() -> None:
    with pytest.raises(ValueError, match="Unknown preset 'gpt-nope'. Did you mean 'gpt-test'"):
        build("gpt-nope")


# Memory.


def test_too_small_a_budget_says_how_much_is_missing_and_what_would_help() -> None:
    budget = 50 * 2**20
    args = floats(4096, 4096), floats(4096, 4096)
    with pytest.raises(InfeasibleError) as caught:
        solve_plan(args=args, method=AutoParallel(memory_budget_bytes=budget, num_microbatches=1))
    error, text = caught.value, str(caught.value)
    short = re.search(r"fits ([\d.]+) MiB.* peak is ([\d.]+) MiB, ([\d.]+) MiB too much", text)
    assert short is not None, text
    have, need, missing = map(float, short.groups())
    assert have == pytest.approx(budget / 2**20)
    assert missing == pytest.approx(need - have, abs=1)
    assert (
        "more microbatches" in text and "memory_budget_bytes" in text and "Largest there: " in text
    )
    assert error.budget_bytes == budget
    assert error.need_bytes is not None and error.need_bytes > budget
    assert list(error.breakdown.values()) == sorted(error.breakdown.values(), reverse=True)


def test_methods_that_replicate_need_more_memory() -> None:
    """A state of 64 MiB and its gradient, and a budget that holds them only in parts."""
    args = floats(4096, 4096), floats(16, 4096)
    plan = solve_plan(args=args, method=AutoParallel(memory_budget_bytes=60 * 2**20))
    assert plan.predicted.peak_bytes <= 60 * 2**20
    with pytest.raises(InfeasibleError, match=r"\d+ (B|MiB) too much"):
        solve_plan(args=args, method=DataParallel(memory_budget_bytes=60 * 2**20))


def test_microbatches_that_are_no_way_out_do_not_hide_the_reason() -> None:
    """The step does not fit, and its outputs do not allow microbatches: the first is the reason."""
    step = step_with_aux(lambda w, x: (x @ w).T)
    with pytest.raises(InfeasibleError, match=r"\d+ (B|MiB) too much"):
        solve_plan(step, method=AutoParallel(memory_budget_bytes=100))


# Batches.


def test_batch_is_not_divisible_by_microbatches() -> None:
    message = re.escape("dim 0 of the batch (16, 8) cannot be split into 3 microbatches")
    with pytest.raises(StepError, match=message):
        solve_plan(method=AutoParallel(num_microbatches=3))


def test_the_indivisible_batch_leaf_is_named() -> None:
    def step(w: jax.Array, batch: dict[str, jax.Array]) -> Any:
        return good_step(w, batch["x"] * batch["scale"][0])

    batch = {"x": X, "scale": floats(1)}
    with pytest.raises(StepError, match=r"batch leaf scale \(1,\) cannot be split into 2"):
        solve_plan(step, (W, batch), method=AutoParallel(num_microbatches=2))


def test_a_scalar_in_the_batch_cannot_be_split() -> None:
    def step(w: jax.Array, batch: dict[str, jax.Array]) -> Any:
        return good_step(w, batch["x"] * batch["scale"])

    batch = {"x": X, "scale": floats()}
    assert solve_plan(step, (W, batch)).num_microbatches == 1
    with pytest.raises(StepError, match=r"leaf scale is a scalar and cannot .* batch_argnums"):
        solve_plan(step, (W, batch), method=AutoParallel(num_microbatches=2))


def test_batch_is_not_divisible_by_the_devices_of_data_parallel() -> None:
    with pytest.raises(
        InfeasibleError,
        match=r"DataParallel splits the batch over all 4 devices, but dim 0 of x \(6, 8\)",
    ):
        solve_plan(args=(W, floats(6, 8)), method=DataParallel())
    with pytest.raises(InfeasibleError, match=r"dim 0 of one of 4 microbatches of x \(2, 8\)"):
        solve_plan(args=(W, floats(8, 8)), method=DataParallel(num_microbatches=4))


def test_batch_is_not_divisible_by_a_pinned_axis() -> None:
    method = ManualParallel({"x": P(("dp", "tp"))}, mesh_shape={"dp": 2, "tp": 2})
    message = r"dim 0 of x \(6, 8\) is split .* of size 4, and 4 does not divide 6"
    with pytest.raises(PlanError, match=message):
        solve_plan(args=(W, floats(6, 8)), method=method)


# Pins.


def pinned(specs: dict[str, Any]) -> ManualParallel:
    return ManualParallel(specs, mesh_shape={"dp": 2, "tp": 2})


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ({"nothing.*": P("tp")}, r"the pin 'nothing\.\*' matches no input; inputs are w, x$"),
        ({"w": P("ep")}, r"of w names axis 'ep'; the mesh is dp=2xtp=2"),
        ({"w": P("dp", "tp", None)}, r"has 3 entries but w has 2 dims"),
        ({"w": P("tp", "tp")}, r"of w names a mesh axis twice"),
        ({"w": P(("tp", "dp"))}, r"follow the order of the mesh, .* Write \('dp', 'tp'\)"),
        ({"w": P(P.UNCONSTRAINED)}, r"a dim takes None, an axis or a tuple of axes"),
    ],
    ids=str,
)
def test_impossible_pins(specs: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        solve_plan(method=pinned(specs))


def test_a_pin_that_does_not_divide() -> None:
    args = floats(6, 5), floats(16, 6)
    with pytest.raises(PlanError, match=r"dim 0 of w \(6, 5\) is split .* 4 does not divide 6"):
        solve_plan(args=args, method=pinned({"w": P(("dp", "tp"))}))
    with pytest.raises(PlanError, match=r"dim 1 of w \(6, 5\) is split .* 2 does not divide 5"):
        solve_plan(args=args, method=pinned({"w": P(None, "tp")}))


def test_long_lists_of_inputs_are_cut() -> None:
    state = {f"w{i}": W for i in range(12)}

    def step(state: dict[str, jax.Array], x: jax.Array) -> Any:
        return jax.tree.map(lambda w: good_step(w, x)[0], state), jnp.sum(x)

    with pytest.raises(PlanError, match=r"inputs are state\.w0, .*, \.\.\.$"):
        solve_plan(step, (state, X), method=pinned({"nothing": P()}))


def test_pins_need_named_axes() -> None:
    with pytest.raises(ValueError, match="mesh_shape must be a mapping such as"):
        ManualParallel({"w": P("tp")}, mesh_shape=(2, 2))
    with pytest.raises(TypeError, match="the pin of 'w' must be a PartitionSpec, found 'tp'"):
        ManualParallel({"w": "tp"}, mesh_shape={"tp": 4})
    with pytest.raises(TypeError, match="ManualParallel has no option 'pins'"):
        ManualParallel({}, pins={})


# Argument numbers.


@pytest.mark.parametrize("kind", ["batch", "donate"])
def test_argument_numbers_out_of_range(kind: str) -> None:
    message = f"{kind}_argnums names argument 5, but the step was called with 2 arguments"
    with pytest.raises(StepError, match=message):
        solve_plan(**{f"{kind}_argnums": (5,)})


@pytest.mark.parametrize("kind", ["batch", "donate"])
def test_argument_numbers_count_from_the_end_as_in_jax_or_are_refused(kind: str) -> None:
    last = {"batch": -1, "donate": -2}[kind]
    try:
        plan = solve_plan(**{f"{kind}_argnums": (last,)})
    except StepError as error:
        assert f"{kind}_argnums" in str(error)
    else:
        assert set(plan.inputs) == {"w", "x"}


def test_static_argument_numbers_out_of_range() -> None:
    with pytest.raises(StepError, match="static_argnums names argument 7"):
        solve_plan(static_argnums=(7,))


@pytest.mark.parametrize(
    ("names", "kind", "message"),
    [
        ("power", ValueError, "static_argnames names 'power', but the step takes w, x"),
        ((0,), TypeError, "static_argnames must be names of arguments, found 0"),
    ],
)
def test_static_argument_names_are_those_of_the_step(
    names: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        alpa_lite.parallelize(good_step, static_argnames=names)


def test_an_argument_cannot_be_static_and_state() -> None:
    with pytest.raises(StepError, match="argument 0 cannot be both static and in donate_argnums"):
        solve_plan(static_argnums=(0,))


# Plans given for something else.


@pytest.fixture(scope="module")
def plan() -> Plan:
    return solve_plan(method=DataParallel())


def test_a_plan_for_another_graph(plan: Plan) -> None:
    def other_step(w: jax.Array, x: jax.Array) -> Any:
        return good_step(w, x * 2)

    message = "the plan 'good_step' was made for another step: its graph hash is .* plan again"
    with pytest.raises(PlanError, match=message):
        solve_plan(other_step, plan=plan)
    with pytest.raises(PlanError, match=message):
        solve_plan(args=(W, floats(32, 8)), plan=plan)
    assert solve_plan(plan=plan) == plan


def test_a_plan_for_another_cluster(plan: Plan) -> None:
    with pytest.raises(PlanError, match="made for cpu:.*4 devices, not for cpu:.*8; plan again"):
        solve_plan(cluster="cpu:8", plan=plan)


def test_a_plan_for_more_devices_than_there_are() -> None:
    step = alpa_lite.parallelize(good_step, cluster="cpu:16", method=DataParallel())
    assert step.plan(W, X).mesh.num_devices == 16
    with pytest.raises(PlanError, match=r"needs 16 devices; 8 are attached \(cpu\)"):
        step.compile(W, X)


def test_edits_that_the_step_does_not_allow(plan: Plan) -> None:
    axis = plan.mesh.names[0]
    with pytest.raises(PlanError, match=r"inputs\['w'\] has 1 dims in the plan and 2 in the step"):
        solve_plan(plan=plan.with_inputs({"w": [[axis]]}))
    odd = solve_plan(args=(floats(8, 6), X), method=DataParallel())
    with pytest.raises(PlanError, match="w: a dim of size 6 is split into 4 shards"):
        solve_plan(args=(floats(8, 6), X), plan=odd.with_inputs({"w": [[], [axis]]}))
