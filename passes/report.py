"""From decisions to a `Plan` a person can read, and from a plan file back to decisions."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata

from alpa_lite.cost_model import MeshCostModel
from alpa_lite.errors import InfeasibleError, PlanError
from alpa_lite.ir.sharding import ShardingSpec
from alpa_lite.passes.build import Candidate, PlanningInputs
from alpa_lite.passes.compiler_merges import merge_notes
from alpa_lite.passes.decision_graph import NONE, Contraction, Layout
from alpa_lite.passes.decisions import Decisions, collectives
from alpa_lite.passes.memory import MemoryProfile, describe_time, profile_memory
from alpa_lite.passes.plan import Alternative, Collective, Decision, Plan, Predicted, SolveReport
from alpa_lite.passes.pricing import compute_s
from alpa_lite.passes.strategies import MAX_FACTORS, PARTIAL, Assignment, StrategySet
from alpa_lite.passes.units import format_bytes

_PARTIAL_LABEL = "partial"


def make_plan(
    name: str, graph_hash: str, inputs: PlanningInputs, best: Candidate,
    alternatives: Sequence[Alternative], wall_s: float,
) -> Plan:  # fmt: skip
    """The plan of a solved candidate."""
    d = best.decisions
    solution = best.solution
    prices = MeshCostModel(inputs.cluster, d.mesh.axes)
    notes = [*inputs.notes, *merge_notes(d)]
    if best.pruned:
        notes.append(
            f"{best.pruned} strategies that leave devices idle were left out on this "
            f"{len(d.mesh.axes)}-axis mesh"
        )
    wide = sum(len(node.factors) > MAX_FACTORS for node in inputs.contraction.nodes)
    if wide:
        notes.append(
            f"{wide} decisions have more than {MAX_FACTORS} dims that could be split; those that "
            "most bytes have were considered"
        )
    return Plan(
        name=name,
        method=inputs.method.label,
        cluster=inputs.cluster,
        mesh=d.mesh,
        graph_hash=graph_hash,
        num_microbatches=inputs.contraction.program.microbatching.num_microbatches,
        memory_budget_bytes=inputs.budget_bytes,
        inputs=input_specs(d),
        pins=dict(inputs.pins),
        decisions=describe_decisions(inputs, d),
        predicted=predict(inputs, d, prices, best.profile),
        solve=SolveReport(
            status=solution.status, objective_s=solution.objective_s,
            lower_bound_s=max(0.0, solution.lower_bound_s), gap=max(0.0, solution.gap),
            solver=solution.solver, wall_s=wall_s, num_decisions=best.num_decisions,
            num_strategies=best.num_strategies,
        ),
        alternatives=tuple(alternatives),
        notes=tuple(notes),
        versions=versions(),
    )  # fmt: skip


def predict(
    inputs: PlanningInputs, decisions: Decisions, prices: MeshCostModel, profile: MemoryProfile
) -> Predicted:
    """Cost and memory by term.

    The integer program pays for every pair of layouts; a layout change that several readers share
    runs once, so the step can be a little faster than the program's objective. Where gathering
    again repeats what a copy has gathered, it can be slower.
    """
    chosen = chosen_strategies(inputs, decisions)
    local_s = compute_s(inputs.work, chosen, decisions.mesh, prices)
    totals: dict[tuple[str, tuple[str, ...]], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for use in collectives(decisions):
        entry = totals[use.kind, use.axes]
        entry[0] += use.times * use.payload_bytes
        entry[1] += use.times
        entry[2] += use.times * prices.collective_s(use.kind, use.payload_bytes, use.axes)
    found = tuple(
        Collective(kind=kind, axes=axes, bytes_per_step=b, times_per_step=n, seconds_per_step=s)
        for (kind, axes), (b, n, s) in sorted(totals.items())
    )
    communication_s = sum(c.seconds_per_step for c in found)
    return Predicted(
        step_s=local_s + communication_s,
        compute_s=local_s,
        communication_s=communication_s,
        memory_bytes=dict(profile.by_category),
        peak_bytes=profile.peak_bytes,
        peak_at=describe_time(decisions.contraction.ops[profile.peak_op]),
        collectives=found,
    )


def with_memory(plan: Plan, contraction: Contraction, profile: MemoryProfile) -> Plan:
    """The plan with the memory of another profile."""
    predicted = replace(
        plan.predicted, memory_bytes=dict(profile.by_category), peak_bytes=profile.peak_bytes,
        peak_at=describe_time(contraction.ops[profile.peak_op]),
    )  # fmt: skip
    return replace(plan, predicted=predicted)


def input_specs(decisions: Decisions) -> dict[str, ShardingSpec]:
    """Spec of every input leaf, by path."""
    return {
        name: decisions.result_specs[op][0]
        for name, op in decisions.contraction.input_links().items()
    }


def describe_decisions(inputs: PlanningInputs, decisions: Decisions) -> tuple[Decision, ...]:
    """One record per class that has a choice."""
    c = inputs.contraction
    members: dict[int, list[int]] = defaultdict(list)
    for node in c.nodes:
        members[inputs.classes[node.id]].append(node.id)
    records = []
    for cls in sorted(members):
        node = c.nodes[members[cls][0]]
        if not node.factors and not node.can_be_partial:
            continue
        axes = {
            name: _PARTIAL_LABEL if chosen == PARTIAL else node.factors[chosen].label
            for name, chosen in zip(
                decisions.mesh.names, decisions.assignments[node.id], strict=True
            )
            if chosen != NONE
        }
        factors = {f.label: f.size for f in node.factors}
        records.append(
            Decision(name=node.name, count=len(members[cls]), factors=factors, axes=axes)
        )
    return tuple(records)


def assignments_of(
    plan: Plan, contraction: Contraction, classes: Sequence[int], graph_hash: str
) -> tuple[list[Assignment], tuple[str, ...]]:
    """Assignment of every node according to a plan, and the inputs that differ from decisions.

    Where `plan.inputs` and the decision of an input's node differ, the input wins.

    Raises:
      PlanError: the plan was made for another graph, or an edited spec is impossible.
    """
    if plan.graph_hash != graph_hash:
        raise PlanError(
            f"the plan {plan.name!r} was made for another step: its graph hash is "
            f"{plan.graph_hash}, this step's with {plan.num_microbatches} microbatches is "
            f"{graph_hash}. Shapes, model code, optimizer, versions or num_microbatches differ; "
            "plan again."
        )
    unknown = sorted(set(plan.pins) - set(contraction.input_links()))
    if unknown:
        raise PlanError(f"pins[{unknown[0]!r}] is no input of the step; remove it")
    members = Counter(classes[node.id] for node in contraction.nodes)
    records = iter(plan.decisions)
    by_class: dict[int, Assignment] = {}
    for node in contraction.nodes:
        cls = classes[node.id]
        if cls in by_class:
            continue
        if not node.factors and not node.can_be_partial:
            by_class[cls] = (NONE,) * len(plan.mesh.axes)
            continue
        record = next(records, None)
        labels = {f.label: i for i, f in enumerate(node.factors)}
        if record is None or record.name != node.name or set(record.factors) != set(labels):
            raise PlanError(
                f"the plan's decisions do not match the step at {node.name}; found "
                f"{record.name if record else 'the end of the list'}. Decisions may be edited in "
                "place but not added, removed or moved."
            )
        if record.count != members[cls]:
            raise PlanError(
                f"the plan says {record.count} nodes decide like {node.name}; in the step there "
                f"are {members[cls]}. Only `axes` of a decision may be edited."
            )
        if record.axes and "partial" in record.axes.values() and not node.can_be_partial:
            raise PlanError(f"{node.name} cannot stay a pending sum")
        by_class[cls] = tuple(
            PARTIAL if record.axes.get(a) == _PARTIAL_LABEL
            else labels[record.axes[a]] if a in record.axes else NONE
            for a in plan.mesh.names
        )  # fmt: skip
        _check_divides(plan, node.name, node.factors, by_class[cls])
    assignments = [by_class[classes[n.id]] for n in contraction.nodes]
    return _apply_inputs(plan, contraction, assignments)


def replan(
    plan: Plan, inputs: PlanningInputs, decisions: Decisions, overridden: Sequence[str] = ()
) -> Plan:
    """A loaded plan with predictions that belong to its (possibly edited) decisions.

    Args:
      plan: as loaded.
      inputs: of the step.
      decisions: what the plan says.
      overridden: inputs whose specs differ from the decisions in the plan.

    Raises:
      InfeasibleError: the plan needs more memory than its own budget.
    """
    prices = MeshCostModel(plan.cluster, plan.mesh.axes)
    profile = profile_memory(
        inputs.contraction, inputs.liveness, plan.mesh, decisions.result_specs,
        decisions.operand_specs,
    )  # fmt: skip
    if profile.peak_bytes > plan.memory_budget_bytes * (1 + 1e-9):
        raise InfeasibleError(
            f"the plan {plan.name!r} needs {format_bytes(profile.peak_bytes)} per device, more "
            f"than its memory_budget_bytes, {format_bytes(plan.memory_budget_bytes)}. Undo what "
            "was edited, or raise the budget if the devices have more.",
            need_bytes=profile.peak_bytes, budget_bytes=plan.memory_budget_bytes,
            row=describe_time(decisions.contraction.ops[profile.peak_op]),
            breakdown=profile.by_category,
        )  # fmt: skip
    predicted = predict(inputs, decisions, prices, profile)
    records = describe_decisions(inputs, decisions)
    same = abs(predicted.step_s - plan.predicted.step_s) <= 1e-6 * predicted.step_s
    if same and records == plan.decisions and dict(plan.inputs) == input_specs(decisions):
        return plan
    solve = replace(plan.solve, status="given", objective_s=predicted.step_s)
    notes = dict.fromkeys(plan.notes)
    if overridden:
        notes[f"inputs win over the decisions of their nodes: {', '.join(overridden)}"] = None
    return replace(
        plan, inputs=input_specs(decisions), decisions=records, predicted=predicted, solve=solve,
        notes=tuple(notes),
    )  # fmt: skip


def chosen_strategies(inputs: PlanningInputs, decisions: Decisions) -> list[StrategySet]:
    """The strategy of each class, as sets of one."""
    chosen: dict[int, StrategySet] = {}
    for node in inputs.contraction.nodes:
        one = StrategySet(node, (decisions.assignments[node.id],))
        chosen.setdefault(inputs.classes[node.id], one)
    return [chosen[i] for i in range(len(chosen))]


def versions() -> dict[str, str]:
    """Versions that a plan depends on."""
    found = {}
    for package in ("alpa-lite", "jax", "jaxlib", "flax", "optax", "pulp", "highspy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _apply_inputs(
    plan: Plan, contraction: Contraction, assignments: list[Assignment]
) -> tuple[list[Assignment], tuple[str, ...]]:
    """Let the specs in `plan.inputs` win over the decisions of their nodes; which ones did."""
    links = contraction.input_links()
    if set(links) != set(plan.inputs):
        odd = min(set(links) ^ set(plan.inputs))
        raise PlanError(f"the plan's inputs and the step's differ at {odd!r}")
    edited: dict[int, tuple[str, Assignment]] = {}
    for name, spec in plan.inputs.items():
        op_id = links[name]
        node = contraction.node_of[op_id]
        layout = contraction.result_layouts[op_id][0]
        wanted = _assignment_for(plan, contraction, name, layout, node, spec, assignments[node])
        before = edited.get(node)
        if wanted == assignments[node]:
            continue
        if before is not None and before[1] != wanted:
            raise PlanError(
                f"inputs {before[0]!r} and {name!r} share one decision and must be edited alike"
            )
        edited[node] = (name, wanted)
    for node, (_, wanted) in edited.items():
        assignments[node] = wanted
    return assignments, tuple(name for name, _ in edited.values())


def _assignment_for(
    plan: Plan, contraction: Contraction, name: str, layout: Layout, node: int,
    spec: ShardingSpec, current: Assignment,
) -> Assignment:  # fmt: skip
    if len(spec.dims) != len(layout.dims):
        raise PlanError(
            f"inputs[{name!r}] has {len(spec.dims)} dims in the plan and {len(layout.dims)} in "
            "the step"
        )
    by_axis = {axis: d for d, axes in enumerate(spec.dims) for axis in axes}
    wanted = []
    for axis, chosen in zip(plan.mesh.names, current, strict=True):
        if axis not in by_axis:
            wanted.append(NONE if chosen in layout.dims else chosen)
            continue
        factor = layout.dims[by_axis[axis]]
        if factor == NONE:
            raise PlanError(
                f"inputs[{name!r}]: dim {by_axis[axis]} cannot be split (its size is 1, or an op "
                "needs it whole)"
            )
        wanted.append(factor)
    _check_divides(plan, name, contraction.nodes[node].factors, tuple(wanted))
    return tuple(wanted)


def _check_divides(
    plan: Plan, name: str, factors: Sequence[object], assignment: Assignment
) -> None:
    shards: dict[int, int] = {}
    for chosen, (_, size) in zip(assignment, plan.mesh.axes, strict=True):
        if chosen >= 0:
            shards[chosen] = shards.get(chosen, 1) * size
    for factor, parts in shards.items():
        size = factors[factor].size  # type: ignore[attr-defined]
        if size % parts:
            raise PlanError(
                f"{name}: a dim of size {size} is split into {parts} shards, and {parts} does not "
                f"divide {size}"
            )
