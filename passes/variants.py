"""One planned step or stage, solved again under other conditions: `Variants`.

In: a `PlannedStep`, as `restore` and `restore_pipeline` return it. Out: plans on the same mesh with
the same microbatches, with one choice forbidden, another memory budget or other hardware. These are
the numbers that explanations are made of, so none of them is estimated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from alpa_lite.cost_model import Cluster, MeshCostModel
from alpa_lite.errors import InfeasibleError
from alpa_lite.ir.sharding import Mesh
from alpa_lite.passes.build import PlanningInputs, class_strategies, solve_on_mesh
from alpa_lite.passes.decision_graph import NONE, Contraction
from alpa_lite.passes.decisions import Decisions
from alpa_lite.passes.memory import (
    analyse_liveness,
    describe_time,
    held_bytes,
    memory_curves,
    profile_memory,
    with_in_flight,
)
from alpa_lite.passes.methods import Method
from alpa_lite.passes.pipeline import PlannedStep
from alpa_lite.passes.plan import Decision, Plan
from alpa_lite.passes.pricing import Workload, compute_s, count_work
from alpa_lite.passes.repeats import share_classes
from alpa_lite.passes.report import chosen_strategies, describe_decisions, make_plan
from alpa_lite.passes.strategies import PARTIAL, Assignment, StrategySet

UNLIMITED_BYTES = 1e17
"""A memory budget that no plan reaches: a hundred petabytes."""


@dataclass(frozen=True, kw_only=True)
class Without(Method):
    """Another method, with one strategy of one decision forbidden.

    Attributes:
      base: the method.
      decision: name of the decision, see `Decision.name`.
      axes: the strategy, see `Decision.axes`.
    """

    base: Method
    decision: str
    axes: Mapping[str, str]

    def allowed(
        self, contraction: Contraction, classes: Sequence[int], strategies: Sequence[StrategySet],
        mesh: Mesh,
    ) -> list[np.ndarray]:  # fmt: skip
        """What the base allows, but the one strategy.

        Raises:
          InfeasibleError: the base allows nothing else.
        """
        masks = self.base.allowed(contraction, classes, strategies, mesh)
        cls = next(classes[n.id] for n in contraction.nodes if n.name == self.decision)
        own = strategies[cls]
        other = np.array([_axes(own, a, mesh) != dict(self.axes) for a in own.assignments])
        masks[cls] = masks[cls] & other
        if not masks[cls].any():
            raise InfeasibleError(f"{self.decision} has no other choice")
        return masks


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceCost:
    """What one decision costs per step and device, as planned.

    Attributes:
      compute_s: local work of its operations.
      reading_s: collectives that bring its operands into its layout, or complete its sums.
      giving_s: collectives that others need to read its results.
      peak_bytes: what it holds at the moment of the step's peak.
    """

    compute_s: float
    reading_s: float
    giving_s: float
    peak_bytes: float


@dataclass(frozen=True, eq=False)
class Variants:
    """A planned step or stage, ready to be solved again.

    Attributes:
      plan: as it is.
      decisions: its layouts.
      inputs: what every solve shares; its budget and cluster are the plan's.
    """

    plan: Plan
    decisions: Decisions
    inputs: PlanningInputs
    _solved: dict[object, Plan] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, planned: PlannedStep, method: Method, in_flight: int = 1) -> Variants:
        """From a restored plan.

        Args:
          planned: the step, or one stage of a pipeline.
          method: what it was planned with.
          in_flight: of a stage, microbatches that it holds at once.
        """
        c, plan = planned.decisions.contraction, planned.plan
        classes = share_classes(c, plan.pins)
        inputs = PlanningInputs(
            contraction=c, classes=classes,
            liveness=with_in_flight(c, analyse_liveness(c), in_flight),
            work=count_work(c, classes),
            method=replace(method, memory_budget_bytes=plan.memory_budget_bytes),
            cluster=plan.cluster, pins=plan.pins, notes=(),
        )  # fmt: skip
        return cls(plan, planned.decisions, inputs)

    def solve(
        self, *, budget_bytes: float | None = None, cluster: Cluster | None = None,
        without: str | None = None,
    ) -> Plan:  # fmt: skip
        """The best plan on this mesh, with these microbatches.

        Args:
          budget_bytes: per device; the plan's by default.
          cluster: other hardware of the same size; the plan's by default.
          without: name of a decision that must choose anything but what it has.

        Raises:
          InfeasibleError: nothing fits, or there is no other choice.
        """
        key = budget_bytes, cluster, without
        if key not in self._solved:
            self._solved[key] = self._solve(budget_bytes, cluster, without)
        return self._solved[key]

    def _solve(
        self, budget_bytes: float | None, cluster: Cluster | None, without: str | None
    ) -> Plan:
        inputs = self.inputs
        budget = self.plan.memory_budget_bytes if budget_bytes is None else budget_bytes
        base = replace(inputs.method, memory_budget_bytes=budget)
        method = base
        if without is not None:
            method = Without(
                base=base, decision=without, axes=self.decision(without).axes,
                memory_budget_bytes=budget, time_limit_s=base.time_limit_s, solver=base.solver,
            )  # fmt: skip
        inputs = replace(inputs, method=method, cluster=cluster or inputs.cluster)
        found = solve_on_mesh(inputs, self.plan.mesh, base.time_limit_s)
        inputs = replace(inputs, method=base)
        return make_plan(self.plan.name, self.plan.graph_hash, inputs, found, (), found.wall_s)

    def decision(self, name: str) -> Decision:
        """A decision of the plan by name."""
        return next(d for d in self.records if d.name == name)

    def decision_of_input(self, path: str) -> str | None:
        """The decision that lays out an input; None if nothing can split it."""
        c = self.inputs.contraction
        cls = self.inputs.classes[c.node_of[c.input_links()[path]]]
        first = next(n.name for n in c.nodes if self.inputs.classes[n.id] == cls)
        return first if any(d.name == first for d in self.records) else None

    def num_choices(self, name: str) -> int:
        """Strategies that the method allows a decision on this mesh."""
        c, classes, mesh = self.inputs.contraction, self.inputs.classes, self.plan.mesh
        strategies = class_strategies(c, classes, mesh)
        masks = self.inputs.method.allowed(c, classes, strategies, mesh)
        return int(masks[self._class(name)].sum())

    def cost(self, name: str) -> ChoiceCost:
        """What a decision costs as planned.

        Summed over all decisions, `reading_s` is the plan's communication, and `compute_s` its
        compute but for operations that have no choice. `giving_s` counts collectives again, at the
        decision that made the value.
        """
        d, inputs = self.decisions, self.inputs
        c, mesh = inputs.contraction, self.plan.mesh
        prices = MeshCostModel(inputs.cluster, mesh.axes)
        cls = self._class(name)
        own = {n.id for n in c.nodes if inputs.classes[n.id] == cls}
        chosen = chosen_strategies(inputs, d)
        work = Workload(tuple(op for op in inputs.work.ops if op.cls == cls), {})
        seconds: dict[str, float] = defaultdict(float)
        for use, value, _ in d.keyed_collectives:
            price_s = use.times * prices.collective_s(use.kind, use.payload_bytes, use.axes)
            if c.node_of[use.op] in own:
                seconds["reading"] += price_s
            elif c.node_of[c.definition[value]] in own:
                seconds["giving"] += price_s
        profile = profile_memory(c, inputs.liveness, mesh, d.result_specs, d.operand_specs)
        held = held_bytes(c, inputs.liveness, mesh, d.result_specs, profile.peak_time)
        mine = [v for v, maker in enumerate(c.definition) if c.node_of[maker] in own]
        return ChoiceCost(
            compute_s=compute_s(work, chosen, mesh, prices), reading_s=seconds["reading"],
            giving_s=seconds["giving"], peak_bytes=float(held[mine].sum()),
        )  # fmt: skip

    def memory(self) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
        """What runs at every moment of the step, and the bytes held then by category."""
        d, inputs, mesh = self.decisions, self.inputs, self.plan.mesh
        c = inputs.contraction
        profile = profile_memory(c, inputs.liveness, mesh, d.result_specs, d.operand_specs)
        curves = memory_curves(c, inputs.liveness, mesh, d.result_specs, profile.conversion_bytes)
        return tuple(describe_time(c.ops[op]) for op in inputs.liveness.order), curves

    @property
    def records(self) -> tuple[Decision, ...]:
        """All decisions of the plan."""
        return describe_decisions(self.inputs, self.decisions)

    def _class(self, name: str) -> int:
        return next(
            self.inputs.classes[n.id] for n in self.inputs.contraction.nodes if n.name == name
        )


def faster_links(cluster: Cluster, factor: float) -> Cluster:
    """The same cluster with links, within and between hosts, of so many times the bandwidth.

    Latencies stay. A measured collective takes for `factor` times the bytes what it took before.
    """
    inner, outer = (
        replace(link, bytes_per_s=link.bytes_per_s * factor)
        for link in (cluster.intra_host, cluster.inter_host)
    )
    curves = tuple(
        replace(curve, points=tuple((size * factor, s) for size, s in curve.points))
        for curve in cluster.curves
    )
    return replace(cluster, intra_host=inner, inter_host=outer, curves=curves)


def _axes(strategies: StrategySet, assignment: Assignment, mesh: Mesh) -> dict[str, str]:
    """A strategy as `Decision.axes` writes it."""
    labels = strategies.node.factors
    return {
        name: "partial" if chosen == PARTIAL else labels[chosen].label
        for name, chosen in zip(mesh.names, assignment, strict=True)
        if chosen != NONE
    }
