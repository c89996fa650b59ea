"""One stage planned on one submesh, by the passes that plan whole steps.

In: a `StageStep`, the submesh as a small cluster of its own, and how many microbatches are in
flight there. Out: the decision graph (`stage_inputs`), or all layouts with their prices
(`plan_stage`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from alpa_lite.cost_model import Cluster
from alpa_lite.errors import InfeasibleError, SolverTimeoutError
from alpa_lite.ir.sharding import Mesh
from alpa_lite.passes.build import Candidate, PlanningInputs, solve_on_mesh
from alpa_lite.passes.decisions import decide
from alpa_lite.passes.memory import with_in_flight
from alpa_lite.passes.meshes import candidate_meshes, name_axes
from alpa_lite.passes.methods import Method
from alpa_lite.passes.microbatch import find_microbatch_loop
from alpa_lite.passes.pipeline import prepare_program
from alpa_lite.passes.program import build_program
from alpa_lite.passes.rules import RuleTable
from alpa_lite.passes.stages.stage_step import StageStep
from alpa_lite.passes.step_contract import batch_positions, state_aliases

_STATE, _ROWS = 0, 2
"""Arguments of a stage step."""


@dataclass(frozen=True, slots=True, eq=False)
class StagePlan:
    """A planned stage.

    Attributes:
      step: the stage.
      inputs: its decision graph.
      found: layouts, prices and memory.
    """

    step: StageStep
    inputs: PlanningInputs
    found: Candidate


def subcluster(cluster: Cluster, num_hosts: int, devices_per_host: int) -> Cluster:
    """The cluster that a submesh of this shape is."""
    return replace(cluster, num_hosts=num_hosts, devices_per_host=devices_per_host)


def stage_inputs(
    step: StageStep, num_microbatches: int, method: Method, cluster: Cluster, table: RuleTable,
    *, folds_keys: bool = False,
) -> PlanningInputs:  # fmt: skip
    """The decision graph of a stage; the same for every mesh over `cluster`.

    Args:
      step: the stage.
      num_microbatches: microbatches that it sees.
      method: restrictions of the layouts.
      cluster: its submesh.
      table: sharding rules found so far.
      folds_keys: whether PRNG keys are folded with the microbatch's number though it sees one only,
        because other pipelines see others.
    """
    traced = step.traced
    rows = batch_positions(traced, (_ROWS,))
    several = num_microbatches > 1 or folds_keys
    program = build_program(
        traced, aliases=state_aliases(traced, (_STATE,)), batch_inputs=rows,
        microbatching=find_microbatch_loop(traced, rows, num_microbatches) if several else None,
    )  # fmt: skip
    return prepare_program(program, method, cluster, table)


def plan_stage(
    step: StageStep, inputs: PlanningInputs, in_flight: int, meshes: Sequence[Mesh] | None = None,
    time_limit_s: float = 60.0, gap: float = 0.0,
) -> StagePlan:  # fmt: skip
    """The best layouts of a stage over all logical meshes.

    Args:
      step: the stage.
      inputs: from `stage_inputs`.
      in_flight: microbatches it holds at once.
      meshes: logical meshes to try; those of the method by default.
      time_limit_s: for all of them together.
      gap: relative distance to the optimum that is good enough.

    Raises:
      InfeasibleError: it fits on none of them.
    """
    liveness = with_in_flight(inputs.contraction, inputs.liveness, in_flight)
    inputs = replace(inputs, liveness=liveness)
    tried = meshes or candidate_meshes(inputs.method, inputs.cluster)
    best: Candidate | None = None
    failure: InfeasibleError | SolverTimeoutError | None = None
    for mesh in tried:
        try:
            found = solve_on_mesh(inputs, mesh, time_limit_s / len(tried), gap)
        except (InfeasibleError, SolverTimeoutError) as error:
            failure = failure or error
            continue
        if best is None or found.solution.objective_s < best.solution.objective_s:
            best = found
    if best is None:
        assert failure is not None
        raise failure
    named = name_axes(inputs.contraction, best.decisions.mesh, best.decisions.assignments)
    decisions = decide(inputs.contraction, named, best.decisions.assignments)
    return StagePlan(step, inputs, replace(best, decisions=decisions))
