"""Alpa's black-box acceptance cases, at the level of the planner.

Alpa asserted counts of collectives in optimised HLO, on four devices. Here the same models on the
same logical meshes are planned, and what is asserted are the *bytes* per collective kind and mesh
axis and the *layouts* of the parameters. Counts depend on what a backend combines, bytes do not.

Alpa priced communication only, with axis costs per byte such as (1, 0.1), gave replicated products
infinite cost, and broke ties by small constants. `four_devices` is a cluster with these properties:

- 1 GFLOP/s for matrix products: one product done twice costs more than all communication of any
  case, so all devices share every product, as in Alpa. The time is the same for every such plan.
- 1e17 operations and bytes per second for everything else: cheap ops cost some 1e-12 s, which
  decides nothing but ties, in favour of splitting (ZeRO).
- No latency; 1 GB/s within a host. With `slow_first_axis` the devices are two hosts of two and the
  links between hosts ten times slower: Alpa's (1, 0.1) on a (2, 2) mesh.
- 1e-9 s per collective: decides ties in favour of fewer collectives, so that one all-reduce is
  taken before a reduce-scatter and an all-gather of the same bytes, as in Alpa's cost tables.
  Without it (`prefer_reduce_scatter=True`, Alpa's option) the tie goes to split optimizer state.

All-reduces over both axes of a two-level mesh are priced in stages (reduce-scatter on fast links,
all-reduce of the rest on slow ones, all-gather on fast ones), which Alpa did not have. Where that,
or another strategy Alpa lacked, beats Alpa's expected pattern, the test asserts that the plan costs
no more than that pattern under the same prices, and the property that defines the case.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import alpa_lite
from alpa_lite.cost_model import MeshCostModel
from alpa_lite.ir.sharding import ShardingSpec
from alpa_lite.passes.methods import Method
from alpa_lite.passes.pipeline import PlannedStep, StepArgs, plan_step
from alpa_lite.passes.plan import Plan
from alpa_lite.passes.rules import RuleTable
from tests.passes.acceptance_models import (
    FLOAT_BYTES,
    Case,
    four_devices,
)

LOSS_BYTES = FLOAT_BYTES
"""The scalar loss is the one value every data-parallel plan all-reduces besides gradients."""

ONE_AXIS = {"x": 4}
LINES = [{"x": 4}, {"x": 4, "y": 1}, {"x": 1, "y": 4}]
"""One axis of devices; Alpa wrote the same as a (4, 1) and as a (1, 4) mesh."""

SQUARE = {"slow": 2, "fast": 2}
BOTH = ("slow", "fast")


@functools.cache
def rule_table() -> RuleTable:
    """One cache of sharding rules for all cases; rules do not depend on mesh or cluster."""
    return RuleTable()


def solve(
    case: Case,
    mesh: Mapping[str, int],
    *,
    method: type[Method] = alpa_lite.ShardParallel,
    prefer_reduce_scatter: bool = False,
    **options: Any,
) -> PlannedStep:
    """Plan a case; the slow axis of `SQUARE` crosses hosts."""
    cluster = four_devices(
        slow_first_axis="slow" in mesh, prefer_reduce_scatter=prefer_reduce_scatter
    )
    call = StepArgs(
        fun=case.step, args=(case.state, case.batch), arg_names=("state", "batch"),
        batch_argnums=(1,), donate_argnums=(0,), name="step",
    )  # fmt: skip
    planned = plan_step(call, method(mesh_shape=mesh, **options), cluster, table=rule_table())
    assert planned.plan.solve.status == "optimal"
    return planned


def solve_plan(case: Case, mesh: Mapping[str, int], **options: Any) -> Plan:
    return solve(case, mesh, **options).plan


def traffic(plan: Plan) -> dict[tuple[str, tuple[str, ...]], float]:
    """Bytes per step by collective kind and mesh axes."""
    return {(c.kind, c.axes): c.bytes_per_step for c in plan.predicted.collectives}


def by_kind(plan: Plan) -> dict[str, float]:
    """Bytes per step by collective kind."""
    totals: dict[str, float] = {}
    for c in plan.predicted.collectives:
        totals[c.kind] = totals.get(c.kind, 0.0) + c.bytes_per_step
    return totals


def seconds(plan: Plan, kind: str, num_bytes: float, axes: tuple[str, ...]) -> float:
    """One collective under the prices the plan was made with."""
    return MeshCostModel(plan.cluster, plan.mesh.axes).collective_s(kind, num_bytes, axes)


def gradients_s(plan: Plan, case: Case, axes: tuple[str, ...]) -> float:
    """One all-reduce per parameter, and one of the loss: data parallel over the axes."""
    sizes = [FLOAT_BYTES * math.prod(s) for n, s in case.leaves().items() if ".params." in n]
    return sum(seconds(plan, "all_reduce", b, axes) for b in (*sizes, LOSS_BYTES))


def params(plan: Plan, pattern: str = "") -> dict[str, ShardingSpec]:
    """Specs of the parameters whose path contains the pattern."""
    return {n: s for n, s in plan.inputs.items() if ".params." in n and pattern in n}


def optimizer_tensors(plan: Plan, case: Case) -> dict[str, ShardingSpec]:
    """Specs of optimizer-state leaves of at least four elements."""
    shapes = case.leaves()
    state = {n: s for n, s in plan.inputs.items() if ".opt_state." in n}
    return {n: s for n, s in state.items() if math.prod(shapes[n]) >= 4}


def kernel_pattern(plan: Plan, axis: str) -> str:
    """One letter per kernel: `c`olumn (last dim), `r`ow (any other dim), `-` not split."""
    letters = []
    for spec in params(plan, "kernel").values():
        where = [d for d, axes in enumerate(spec.dims) if axis in axes]
        letters.append("-" if not where else "c" if where[0] == len(spec.dims) - 1 else "r")
    return "".join(letters)
