"""One mesh: build the integer program, solve it, read the decisions back.

Building, solving and reading are separate. Memory is always on: the program starts with the
moments that look worst, and every solution is checked against its exact profile; a moment that
overflows becomes a further row and the program is solved again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from alpa_lite.cost_model import Cluster, MeshCostModel
from alpa_lite.errors import InfeasibleError
from alpa_lite.ir.sharding import Mesh
from alpa_lite.passes.decision_graph import Contraction
from alpa_lite.passes.decisions import Decisions, decide
from alpa_lite.passes.intra_op import (
    Edge,
    IntraOpProblem,
    IntraOpSolution,
    MemoryRow,
    solve_intra_op,
)
from alpa_lite.passes.memory import (
    Liveness,
    MemoryProfile,
    describe_time,
    first_times,
    memory_row,
    profile_memory,
)
from alpa_lite.passes.methods import Method
from alpa_lite.passes.pricing import (
    PricedGraph,
    UseWork,
    Workload,
    converted_bytes,
    price,
    use_work,
)
from alpa_lite.passes.strategies import Assignment, StrategySet, enumerate_strategies
from alpa_lite.passes.units import format_bytes

_MAX_ROUNDS = 24
_MAX_STRATEGIES = {1: 64, 2: 100, 3: 64, 4: 64}


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PlanningInputs:
    """What every mesh shares.

    Attributes:
      contraction: decision graph.
      classes: share class per node.
      liveness: live ranges.
      work: what has to be priced.
      method: restrictions and options.
      cluster: hardware.
      pins: prescribed layout by input path, as text.
      notes: remarks collected so far.
    """

    contraction: Contraction
    classes: tuple[int, ...]
    liveness: Liveness
    work: Workload
    method: Method
    cluster: Cluster
    pins: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def budget_bytes(self) -> float:
        """Memory a plan may use per device."""
        return float(self.method.memory_budget_bytes or self.cluster.usable_hbm_bytes)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Candidate:
    """A solved mesh.

    Attributes:
      decisions: all layouts.
      solution: the integer program's answer.
      profile: exact memory over time.
      prices: the cost model on this mesh.
      num_strategies: over all decisions.
      num_decisions: classes with a choice.
      pruned: strategies left out by the cap.
      wall_s: seconds of solving.
    """

    decisions: Decisions
    solution: IntraOpSolution
    profile: MemoryProfile
    prices: MeshCostModel
    num_strategies: int
    num_decisions: int
    pruned: int
    wall_s: float


def solve_on_mesh(
    inputs: PlanningInputs, mesh: Mesh, time_limit_s: float, gap: float = 0.0
) -> Candidate:
    """The best decisions on one mesh, or the best found in time.

    Args:
      inputs: what every mesh shares.
      mesh: the mesh.
      time_limit_s: seconds of solving.
      gap: relative distance to the optimum that is good enough.

    Raises:
      InfeasibleError: nothing fits the memory budget, or pins contradict each other.
      SolverTimeoutError: no decisions were found in time.
    """
    started = time.monotonic()
    c = inputs.contraction
    prices = MeshCostModel(inputs.cluster, mesh.axes)
    strategies = class_strategies(c, inputs.classes, mesh)
    masks = inputs.method.allowed(c, inputs.classes, strategies, mesh)
    strategies = tuple(_select(s, m) for s, m in zip(strategies, masks, strict=True))
    times = first_times(c, inputs.liveness)
    limits: dict[UseWork, float] = {}
    while True:
        priced = price(inputs.work, strategies, mesh, prices, limits)
        rows = [memory_row(c, inputs.liveness, t, inputs.classes, strategies, mesh) for t in times]
        problem = build_problem(priced, rows, inputs.budget_bytes)
        left = max(0.0, time_limit_s - (time.monotonic() - started))
        solution = solve_intra_op(problem, time_limit_s=left, gap=gap, solver=inputs.method.solver)
        decisions = read_decisions(c, inputs.classes, strategies, solution, mesh)
        profile = profile_memory(
            c, inputs.liveness, mesh, decisions.result_specs, decisions.operand_specs
        )
        if profile.peak_bytes <= inputs.budget_bytes * (1 + 1e-9):
            break
        late = time.monotonic() - started > time_limit_s
        if late or not _tighten(inputs, decisions, profile, times, limits):
            raise _does_not_fit(inputs, mesh, profile)
    return Candidate(
        decisions=decisions, solution=solution, profile=profile, prices=prices,
        num_strategies=sum(len(s) for s in strategies),
        num_decisions=sum(len(s) > 1 for s in strategies),
        pruned=sum(s.pruned for s in strategies), wall_s=time.monotonic() - started,
    )  # fmt: skip


def class_strategies(
    contraction: Contraction, classes: Sequence[int], mesh: Mesh
) -> tuple[StrategySet, ...]:
    """Strategies of the first node of each class."""
    cap = _MAX_STRATEGIES[len(mesh.axes)]
    found: dict[int, StrategySet] = {}
    for node in contraction.nodes:
        if classes[node.id] not in found:
            found[classes[node.id]] = enumerate_strategies(node, mesh, max_strategies=cap)
    return tuple(found[i] for i in range(len(found)))


def build_problem(
    priced: PricedGraph, rows: Sequence[MemoryRow], budget_bytes: float
) -> IntraOpProblem:
    """The integer program as plain arrays."""
    return IntraOpProblem(
        names=tuple(s.node.name for s in priced.strategies),
        node_cost_s=priced.node_cost_s,
        edges=tuple(
            Edge(u=u, v=v, cost_s=cost) for (u, v), cost in sorted(priced.edge_cost_s.items())
        ),
        memory=tuple(rows),
        memory_budget_bytes=budget_bytes,
    )


def read_decisions(
    contraction: Contraction, classes: Sequence[int], strategies: Sequence[StrategySet],
    solution: IntraOpSolution, mesh: Mesh,
) -> Decisions:  # fmt: skip
    """Assignments of all nodes from the choices of their classes."""
    chosen = [s.assignments[i] for s, i in zip(strategies, solution.choice, strict=True)]
    assignments: list[Assignment] = [chosen[classes[n.id]] for n in contraction.nodes]
    return decide(contraction, mesh, assignments)


def _select(strategies: StrategySet, mask: np.ndarray) -> StrategySet:
    kept = tuple(a for a, keep in zip(strategies.assignments, mask, strict=True) if keep)
    return replace(strategies, assignments=kept)


def _tighten(
    inputs: PlanningInputs, decisions: Decisions, profile: MemoryProfile, times: list[int],
    limits: dict[UseWork, float],
) -> bool:  # fmt: skip
    """Constrain the moment that overflows; False if nothing is left to constrain.

    If what is alive there overflows by itself, the moment becomes a row. If gathered operands tip
    it over, the largest of them is forbidden: their bytes belong to pairs of strategies, which a
    row cannot hold.
    """
    c, peak = inputs.contraction, profile.peak_time
    alive = profile.peak_bytes - float(profile.conversion_bytes[peak])
    if alive > inputs.budget_bytes:
        if peak in times:
            return False
        times.append(peak)
        return True
    op = c.ops[profile.peak_op]
    sizes = [
        converted_bytes(
            decisions.value_spec(value), decisions.operand_specs[op.id][position],
            c.values[value].num_bytes, decisions.mesh,
        )
        for position, value in enumerate(c.operands[op.id])
    ]  # fmt: skip
    largest = int(np.argmax(sizes))
    limits[use_work(c, inputs.classes, op, largest)] = sizes[largest]
    return len(limits) + len(times) < _MAX_ROUNDS


def _does_not_fit(inputs: PlanningInputs, mesh: Mesh, profile: MemoryProfile) -> InfeasibleError:
    op = inputs.contraction.ops[profile.peak_op]
    return InfeasibleError(
        f"no plan found on mesh {mesh} that fits {format_bytes(inputs.budget_bytes)} per device: "
        f"the best needs {format_bytes(profile.peak_bytes)}, "
        f"{format_bytes(profile.peak_bytes - inputs.budget_bytes)} too much, "
        f"{describe_time(op)}. "
        "Add devices, raise memory_budget_bytes, use more microbatches, or rematerialise.",
        need_bytes=profile.peak_bytes,
        budget_bytes=inputs.budget_bytes,
        row=describe_time(op),
        breakdown=profile.by_category,
    )
