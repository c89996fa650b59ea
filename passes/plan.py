"""`Plan`: what was decided, why, and what it is expected to cost. A value, saved as JSON.

A plan file is untrusted data: `Plan.load` checks every field against a schema and says which field
is wrong, what it holds and what is allowed. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from alpa_lite.cost_model import Cluster
from alpa_lite.errors import PlanError
from alpa_lite.ir.sharding import MAX_MESH_AXES, Mesh, ShardingSpec
from alpa_lite.passes import plan_schema
from alpa_lite.passes.memory import CATEGORIES
from alpa_lite.passes.plan_text import describe_plan

FORMAT = "alpa-lite-plan"
VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """All collectives of one kind over the same mesh axes.

    Attributes:
      kind: `all_reduce`, `all_gather`, `reduce_scatter`, `all_to_all`.
      axes: mesh axes, joined as one group.
      bytes_per_step: payload per device and step (all_reduce, reduce_scatter, all_to_all: input;
        all_gather: result).
      times_per_step: how many run in a step.
      seconds_per_step: predicted, without overlap.
    """

    kind: str
    axes: tuple[str, ...]
    bytes_per_step: float
    times_per_step: float
    seconds_per_step: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """What the cost model expects of one step on one device.

    Attributes:
      step_s: seconds per step.
      compute_s, communication_s: its two parts (no overlap is assumed).
      memory_bytes: at the peak, by `parameters`, `gradients`, `optimizer_state`, `activations`,
        `temporaries`.
      peak_bytes: their sum.
      peak_at: where in the step the peak is.
      collectives: by kind and axes.
    """

    step_s: float
    compute_s: float
    communication_s: float
    memory_bytes: Mapping[str, float]
    peak_bytes: float
    peak_at: str
    collectives: tuple[Collective, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One decision, shared by `count` nodes of identical layers.

    Attributes:
      name: the first of the nodes.
      count: how many nodes share it.
      factors: the dims it can split: label -> size.
      axes: mesh axis -> label of the dim it splits, or `partial`; axes left out replicate.
    """

    name: str
    count: int
    factors: Mapping[str, int]
    axes: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class SolveReport:
    """How good the integer program's answer is known to be.

    Attributes:
      status: `optimal`, `within_gap`, `time_limit` or `unproven`.
      objective_s, lower_bound_s: value found, and what no plan on this mesh can beat.
      gap: their relative distance.
      solver: what settled it.
      wall_s: seconds of all solves for this plan.
      num_decisions, num_strategies: size of the program.
    """

    status: str
    objective_s: float
    lower_bound_s: float
    gap: float
    solver: str
    wall_s: float
    num_decisions: int
    num_strategies: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """Another mesh or microbatch count that was tried.

    Attributes:
      mesh: axis sizes.
      num_microbatches: microbatches.
      step_s: predicted, or None if nothing fits.
      reason: why not, else `""`.
    """

    mesh: tuple[int, ...]
    num_microbatches: int
    step_s: float | None
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A complete, reviewable decision for one step on one cluster.

    Attributes:
      name: what was planned.
      method: the parallel method, with its options.
      cluster: the hardware it was made for.
      mesh: the logical mesh.
      graph_hash: of the traced graph it belongs to.
      num_microbatches: gradient accumulation steps.
      memory_budget_bytes: per device.
      inputs: spec of every state and batch leaf, by path; editing one changes the plan.
      pins: layouts that were prescribed, by input path (they separate layers that would share).
      decisions: all others.
      predicted: cost and memory.
      solve: how it was found.
      alternatives: what else was tried.
      notes: assumptions and fallbacks worth knowing.
      versions: of the software that made it.
      configuration: what was asked for, resolved, by dotted name; empty if a program asked.
    """

    name: str
    method: str
    cluster: Cluster
    mesh: Mesh
    graph_hash: str
    num_microbatches: int
    memory_budget_bytes: float
    inputs: Mapping[str, ShardingSpec]
    decisions: tuple[Decision, ...]
    predicted: Predicted
    solve: SolveReport
    pins: Mapping[str, str] = field(default_factory=dict)
    alternatives: tuple[Alternative, ...] = ()
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    configuration: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; the file appears whole or not at all."""
        write_plan_file(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file.

        Raises:
          PlanError: the file is not a valid plan; says which field and why.
        """
        return cls.from_json(read_plan_file(path), where=str(path))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        data = {
            "format": FORMAT,
            "version": VERSION,
            "name": self.name,
            "method": self.method,
            "mesh": [[name, size] for name, size in self.mesh.axes],
            "num_microbatches": self.num_microbatches,
            "memory_budget_bytes": self.memory_budget_bytes,
            "graph_hash": self.graph_hash,
            "predicted": asdict(self.predicted),
            "solve": asdict(self.solve),
            "inputs": {name: spec.to_json() for name, spec in self.inputs.items()},
            "pins": dict(self.pins),
            "decisions": [asdict(d) for d in self.decisions],
            "alternatives": [asdict(a) for a in self.alternatives],
            "notes": list(self.notes),
            "versions": dict(self.versions),
            "configuration": dict(self.configuration),
            "cluster": self.cluster.to_json(),
        }
        return json.loads(json.dumps(data))

    @classmethod
    def from_json(cls, data: Any, *, where: str = "plan") -> Plan:
        """Check and build; see `load`."""
        if isinstance(data, dict) and data.get("format") == FORMAT:
            version = data.get("version", VERSION)
            if version != VERSION:
                raise PlanError(
                    f"{where}: the file has version {version!r} of the plan format; this alpa-lite "
                    f"reads version {VERSION}. Plan again."
                )
        if isinstance(data, dict) and data.get("format") == "alpa-lite-pipeline-plan":
            raise PlanError(
                f"{where}: this is a plan with pipeline stages; read it with alpa_lite.load_plan"
            )
        plan_schema.check(data, plan_schema.PLAN, where)
        inputs = {n: _spec(spec, n, where) for n, spec in data["inputs"].items()}
        try:
            mesh = Mesh(tuple((name, size) for name, size in data["mesh"]))
            cluster = Cluster.from_json(data["cluster"])
        except ValueError as error:
            raise PlanError(f"{where}: {error}") from None
        plan = cls(
            name=data["name"], method=data["method"], cluster=cluster, mesh=mesh,
            graph_hash=data["graph_hash"], num_microbatches=data["num_microbatches"],
            memory_budget_bytes=data["memory_budget_bytes"], inputs=inputs,
            decisions=tuple(Decision(**d) for d in data["decisions"]),
            pins=data["pins"],
            predicted=_predicted(data["predicted"]), solve=SolveReport(**data["solve"]),
            alternatives=tuple(
                Alternative(**{**a, "mesh": tuple(a["mesh"])}) for a in data["alternatives"]
            ),
            notes=tuple(data["notes"]), versions=data["versions"],
            configuration=data.get("configuration", {}),
        )  # fmt: skip
        verify_plan(plan, where)
        return plan

    def with_inputs(self, changes: Mapping[str, Sequence[Sequence[str]]]) -> Plan:
        """A plan with other layouts for some inputs.

        Args:
          changes: path -> mesh axes per dim, e.g. `{"state.params.w": [["tp"], []]}`.

        Raises:
          PlanError: an unknown path or axis.
        """
        unknown = sorted(set(changes) - set(self.inputs))
        if unknown:
            raise PlanError(f"no input named {unknown[0]!r}; see plan.inputs for the names")
        new = {name: _spec(s, name, "the edited plan") for name, s in changes.items()}
        plan = replace(self, inputs={**self.inputs, **new})
        verify_plan(plan, "the edited plan")
        return plan

    def describe(self) -> str:
        """The plan as text: mesh, cost, memory, collectives and the layout of every input."""
        return describe_plan(self)

    def _repr_html_(self) -> str:
        """What notebooks show: figures, timeline and cost."""
        from alpa_lite.passes.html import plan_snippet

        return plan_snippet(self)


def write_plan_file(path: str | Path, data: Mapping[str, Any]) -> None:
    """Write JSON; the file appears whole or not at all."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write the plan {path.name} to")
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_plan_file(path: str | Path) -> Any:
    """The JSON data of a plan file, not checked yet.

    Raises:
      PlanError: there is no such file, or it is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PlanError(f"no plan file at {path}") from None
    except OSError as error:
        raise PlanError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or beyond all limits
        raise PlanError(
            f"{path} is not JSON ({error}); it may be truncated. Save the plan again."
        ) from None


def verify_plan(plan: Plan, where: str = "plan") -> None:
    """Invariants between fields.

    Raises:
      PlanError: a spec or decision names an axis the mesh lacks, the axes of a dim are not in the
        mesh's order, the mesh has too many axes or does not fill the cluster, or a decision names
        a dim it does not have.
    """
    if len(plan.mesh.axes) > MAX_MESH_AXES:
        raise PlanError(
            f"{where}: mesh {plan.mesh} has {len(plan.mesh.axes)} axes; "
            f"at most {MAX_MESH_AXES} are planned for"
        )
    if plan.mesh.num_devices != plan.cluster.num_devices:
        raise PlanError(
            f"{where}: mesh {plan.mesh} has {plan.mesh.num_devices} devices but cluster "
            f"{plan.cluster.name} has {plan.cluster.num_devices}"
        )
    known = set(plan.mesh.names)
    for name, spec in plan.inputs.items():
        wrong = sorted(set(spec.used_axes) - known)
        if wrong:
            raise PlanError(
                f"{where}: inputs[{name!r}] uses mesh axis {wrong[0]!r}; the mesh has "
                f"{sorted(known)}"
            )
        for d, axes in enumerate(spec.dims):
            in_order = sorted(axes, key=plan.mesh.names.index)
            if list(axes) != in_order:
                raise PlanError(
                    f"{where}: inputs[{name!r}] splits dim {d} over {list(axes)}; axes of one dim "
                    f"follow the order of the mesh: {in_order}"
                )
    for i, collective in enumerate(plan.predicted.collectives):
        wrong = sorted(set(collective.axes) - known)
        if wrong:
            raise PlanError(
                f"{where}: predicted: collectives[{i}] uses mesh axis {wrong[0]!r}; the mesh has "
                f"{sorted(known)}"
            )
    for i, decision in enumerate(plan.decisions):
        for axis, label in decision.axes.items():
            if axis not in known:
                raise PlanError(
                    f"{where}: decisions[{i}] ({decision.name}) uses mesh axis {axis!r}; the mesh "
                    f"has {sorted(known)}"
                )
            if label != "partial" and label not in decision.factors:
                raise PlanError(
                    f"{where}: decisions[{i}] ({decision.name}) splits {label!r} along "
                    f"{axis!r}; it has {sorted(decision.factors)} or 'partial'"
                )


def _spec(dims: Sequence[Sequence[str]], name: str, where: str) -> ShardingSpec:
    fine = isinstance(dims, list | tuple) and all(
        isinstance(axes, list | tuple) and all(isinstance(a, str) for a in axes) for axes in dims
    )
    if not fine:
        raise PlanError(
            f"{where}: inputs[{name!r}] must be a list of mesh axes for every dim, such as "
            f'[["tp"], []]; found {dims!r}'
        )
    try:
        return ShardingSpec(tuple(tuple(axes) for axes in dims))
    except ValueError as error:
        raise PlanError(f"{where}: inputs[{name!r}]: {error}") from None


def _predicted(data: Mapping[str, Any]) -> Predicted:
    collectives = tuple(Collective(**{**c, "axes": tuple(c["axes"])}) for c in data["collectives"])
    return Predicted(**{**data, "collectives": collectives})


__all__ = [
    "CATEGORIES", "Alternative", "Collective", "Decision", "Plan", "Predicted", "SolveReport",
    "verify_plan",
]  # fmt: skip
