"""What a planned stage costs: seconds by task, and bytes by how long they are there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from alpa_lite.cost_model import MeshCostModel
from alpa_lite.ir.graph import BACKWARD, FORWARD, UPDATE
from alpa_lite.passes.build import PlanningInputs
from alpa_lite.passes.decisions import Decisions, collectives
from alpa_lite.passes.memory import MemoryProfile, stashed_values
from alpa_lite.passes.pricing import Workload, compute_s, count_work
from alpa_lite.passes.program import FlatOp
from alpa_lite.passes.report import chosen_strategies


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """Seconds and bytes of one stage on one device.

    Attributes:
      forward_s, backward_s: of one microbatch.
      per_step_s: once per step: what is done before the first and after the last microbatch.
      resident_bytes: peak with one microbatch in flight, without what it stashes.
      stash_bytes: what each microbatch in flight keeps for its backward pass.
    """

    forward_s: float
    backward_s: float
    per_step_s: float
    resident_bytes: float
    stash_bytes: float

    @property
    def backward_input_s(self) -> float:
        """The part of the backward pass that the stage before waits for: of matrix products, half.

        The other half are the gradients of parameters, see `backward_weight_s`.
        """
        return self.backward_s / 2

    @property
    def backward_weight_s(self) -> float:
        """The part of the backward pass that nobody waits for."""
        return self.backward_s - self.backward_input_s

    @property
    def microbatch_s(self) -> float:
        """Forward and backward of one microbatch."""
        return self.forward_s + self.backward_s

    def peak_bytes(self, in_flight: int) -> float:
        """Bytes per device with so many microbatches in flight."""
        return self.resident_bytes + in_flight * self.stash_bytes


def phase_work(inputs: PlanningInputs) -> Mapping[str, Workload]:
    """The work of a stage by phase, whatever its layouts."""
    phases = (FORWARD, BACKWARD, UPDATE)
    return {p: count_work(inputs.contraction, inputs.classes, p) for p in phases}


def stage_cost(
    inputs: PlanningInputs, decisions: Decisions, profile: MemoryProfile, in_flight: int,
    works: Mapping[str, Workload] | None = None,
) -> StageCost:  # fmt: skip
    """Price a planned stage by task.

    Args:
      inputs: of the stage.
      decisions: its layouts.
      profile: its memory with `in_flight` microbatches.
      in_flight: see `profile`.
      works: from `phase_work`, if it is there already.
    """
    c = inputs.contraction
    prices = MeshCostModel(inputs.cluster, decisions.mesh.axes)
    chosen = chosen_strategies(inputs, decisions)
    count = c.program.microbatching.num_microbatches
    seconds: dict[str, float] = defaultdict(float)
    for phase, work in (works or phase_work(inputs)).items():
        seconds[phase] += compute_s(work, chosen, decisions.mesh, prices)
    for use in collectives(decisions):
        each = use.times * prices.collective_s(use.kind, use.payload_bytes, use.axes)
        seconds[_phase(inputs, c.ops[use.op], use.times, count)] += each
    stash = sum(
        c.values[v].num_bytes / decisions.value_spec(v).num_shards(decisions.mesh)
        for v in stashed_values(c)
    )
    return StageCost(
        forward_s=seconds[FORWARD] / count, backward_s=seconds[BACKWARD] / count,
        per_step_s=seconds[UPDATE],
        resident_bytes=max(0.0, profile.peak_bytes - in_flight * stash), stash_bytes=stash,
    )  # fmt: skip


def _phase(inputs: PlanningInputs, op: FlatOp, times: float, count: int) -> str:
    """The task in which a collective runs."""
    if op.kind == "enter" and op.op is None:
        return UPDATE  # an invariant of the loop, brought in once
    if op.kind != "gradient":
        return op.phase
    # A loop output: handed on by the forward pass or back by the backward pass, or a gradient.
    if times < count:
        return UPDATE
    maker = inputs.contraction.ops[inputs.contraction.definition[op.operands[0]]]
    return maker.phase if maker.phase in (FORWARD, BACKWARD) else BACKWARD
