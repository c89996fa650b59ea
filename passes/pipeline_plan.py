"""`PipelinePlan`: a plan with pipeline stages. A value, saved as JSON.

Every stage holds an ordinary `Plan` for its submesh, made and checked like the plan of a whole
step. As there, a file is untrusted data: every field is checked, nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from alpa_lite.cost_model import Cluster
from alpa_lite.errors import PlanError
from alpa_lite.passes import plan_schema
from alpa_lite.passes.inter_op import Placement, Submesh
from alpa_lite.passes.pipeline_methods import REMAT_POLICIES
from alpa_lite.passes.plan import Plan, read_plan_file, write_plan_file
from alpa_lite.passes.schedules import SCHEDULES

FORMAT = "alpa-lite-pipeline-plan"
VERSION = 1


def load_plan(path: str | Path) -> Plan | PipelinePlan:
    """Read a plan file of either kind, with pipeline stages or without.

    Raises:
      PlanError: the file is not a valid plan; says which field and why.
    """
    return plan_from_json(read_plan_file(path), where=str(path))


def plan_from_json(data: Any, *, where: str = "plan") -> Plan | PipelinePlan:
    """Check and build a plan of either kind.

    Raises:
      PlanError: it is not a valid plan; says which field and why.
    """
    staged = isinstance(data, dict) and data.get("format") == FORMAT
    return (PipelinePlan if staged else Plan).from_json(data, where=where)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStage:
    """One stage of a pipeline plan.

    Attributes:
      layers: its layers.
      pipeline: which way through the meshes it belongs to: 0, or 1 in schedules with two.
      mesh: index of its submesh in `PipelinePlan.meshes`.
      remat: what its backward pass computes again.
      in_flight: most microbatches between their forward and backward pass here.
      forward_s, backward_s: predicted seconds of one microbatch.
      per_step_s: predicted seconds once per step.
      send_s, return_s: predicted seconds to send one microbatch's activations to the next stage,
        and its cotangents to the one before.
      peak_bytes: per device, with all microbatches in flight.
      stash_bytes: per device, what each microbatch in flight keeps for its backward pass.
      plan: its layouts; the cluster in it is the submesh.
    """

    layers: tuple[int, ...]
    pipeline: int
    mesh: int
    remat: str
    in_flight: int
    forward_s: float
    backward_s: float
    per_step_s: float
    send_s: float
    return_s: float
    peak_bytes: float
    stash_bytes: float
    plan: Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelinePredicted:
    """What the simulator expects of one step.

    Attributes:
      step_s: seconds per step.
      bubble_share: idle share of all meshes' time, from the first task to the last.
      peak_bytes: largest over the devices.
      transfer_bytes: sent between meshes per step.
    """

    step_s: float
    bubble_share: float
    peak_bytes: float
    transfer_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineAlternative:
    """Another pipeline that was considered.

    Attributes:
      description: what it is.
      step_s: predicted, or None if it does not fit.
      reason: why not, else `""`.
    """

    description: str
    step_s: float | None
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelinePlan:
    """A complete, reviewable decision for one step on one cluster, with pipeline stages.

    Attributes:
      name: what was planned.
      method: the parallel method, with its options.
      cluster: the hardware it was made for.
      graph_hash: of the traced step it belongs to.
      num_microbatches: microbatches per step.
      num_layers: layers the forward pass was cut into.
      layer_num: how many were asked for; 0 for "auto".
      num_pieces: into how many pieces a scan over layers was cut; 1 if there is none.
      schedule: order of the tasks.
      num_virtual: stages per submesh.
      memory_budget_bytes: per device.
      meshes: where each submesh lies.
      stages: in the order of the forward pass, pipeline after pipeline.
      predicted: cost and memory.
      gap: distance of the stages to the best by the search's prices of layers, which are estimates;
        0 if nothing was searched.
      alternatives: what else was considered.
      notes: assumptions and fallbacks worth knowing.
      versions: of the software that made it.
      wall_s: seconds of planning.
      configuration: what was asked for, resolved, by dotted name; empty if a program asked.
    """

    name: str
    method: str
    cluster: Cluster
    graph_hash: str
    num_microbatches: int
    num_layers: int
    layer_num: int
    num_pieces: int
    schedule: str
    num_virtual: int
    memory_budget_bytes: float
    meshes: tuple[Placement, ...]
    stages: tuple[PlannedStage, ...]
    predicted: PipelinePredicted
    gap: float = 0.0
    alternatives: tuple[PipelineAlternative, ...] = ()
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    wall_s: float = 0.0
    configuration: Mapping[str, Any] = field(default_factory=dict)

    @property
    def idle_devices(self) -> int:
        """Devices of the cluster that no stage uses."""
        return self.cluster.num_devices - sum(m.submesh.num_devices for m in self.meshes)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; the file appears whole or not at all."""
        write_plan_file(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> PipelinePlan:
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
            "graph_hash": self.graph_hash,
            "num_microbatches": self.num_microbatches,
            "num_layers": self.num_layers,
            "layer_num": self.layer_num,
            "num_pieces": self.num_pieces,
            "schedule": self.schedule,
            "num_virtual": self.num_virtual,
            "memory_budget_bytes": self.memory_budget_bytes,
            "predicted": asdict(self.predicted),
            "gap": self.gap,
            "wall_s": self.wall_s,
            "meshes": [
                {
                    "first_host": m.first_host,
                    "first_device": m.first_device,
                    "num_hosts": m.submesh.num_hosts,
                    "devices_per_host": m.submesh.devices_per_host,
                }
                for m in self.meshes
            ],
            "stages": [_stage_json(s) for s in self.stages],
            "alternatives": [asdict(a) for a in self.alternatives],
            "notes": list(self.notes),
            "versions": dict(self.versions),
            "configuration": dict(self.configuration),
            "cluster": self.cluster.to_json(),
        }
        return json.loads(json.dumps(data))

    @classmethod
    def from_json(cls, data: Any, *, where: str = "plan") -> PipelinePlan:
        """Check and build; see `load`."""
        plan_schema.check(data, PIPELINE, where)
        if data["version"] != VERSION:
            raise PlanError(
                f"{where}: the file has version {data['version']} of the pipeline plan format; "
                f"this alpa-lite reads version {VERSION}. Plan again."
            )
        try:
            cluster = Cluster.from_json(data["cluster"])
        except ValueError as error:
            raise PlanError(f"{where}: {error}") from None
        plan = cls(
            name=data["name"], method=data["method"], cluster=cluster,
            graph_hash=data["graph_hash"], num_microbatches=data["num_microbatches"],
            num_layers=data["num_layers"], layer_num=data["layer_num"],
            num_pieces=data["num_pieces"], schedule=data["schedule"],
            num_virtual=data["num_virtual"], memory_budget_bytes=data["memory_budget_bytes"],
            meshes=tuple(
                Placement(
                    m["first_host"], m["first_device"],
                    Submesh(m["num_hosts"], m["devices_per_host"]),
                )
                for m in data["meshes"]
            ),
            stages=tuple(
                _stage(s, f"{where}: stages[{i}]") for i, s in enumerate(data["stages"])
            ),
            predicted=PipelinePredicted(**data["predicted"]), gap=data["gap"],
            alternatives=tuple(PipelineAlternative(**a) for a in data["alternatives"]),
            notes=tuple(data["notes"]), versions=data["versions"], wall_s=data["wall_s"],
            configuration=data.get("configuration", {}),
        )  # fmt: skip
        verify_pipeline_plan(plan, where)
        return plan

    def describe(self) -> str:
        """The plan as text: a line per stage, then cost and memory."""
        from alpa_lite.passes.pipeline_text import describe_pipeline

        return describe_pipeline(self)

    def _repr_html_(self) -> str:
        """What notebooks show: figures, timeline and cost."""
        from alpa_lite.passes.html import plan_snippet

        return plan_snippet(self)


_COUNT = plan_schema.Number(1, integer=True)
_INDEX = plan_schema.Number(0, integer=True)
PIPELINE: Mapping[str, Any] = {
    "format": plan_schema.Text((FORMAT,)),
    "version": _COUNT,
    "name": plan_schema.Text(),
    "method": plan_schema.Text(),
    "graph_hash": plan_schema.Text(),
    "num_microbatches": _COUNT,
    "num_layers": _COUNT,
    "layer_num": _INDEX,
    "num_pieces": _COUNT,
    "schedule": plan_schema.Text(tuple(SCHEDULES)),
    "num_virtual": _COUNT,
    "memory_budget_bytes": plan_schema.Number(),
    "predicted": {
        "step_s": plan_schema.Number(),
        "bubble_share": plan_schema.Number(),
        "peak_bytes": plan_schema.Number(),
        "transfer_bytes": plan_schema.Number(),
    },
    "gap": plan_schema.Number(),
    "wall_s": plan_schema.Number(),
    "meshes": plan_schema.ListOf(
        {
            "first_host": _INDEX,
            "first_device": _INDEX,
            "num_hosts": _COUNT,
            "devices_per_host": _COUNT,
        }
    ),
    "stages": plan_schema.ListOf(
        {
            "layers": plan_schema.ListOf(_INDEX),
            "pipeline": _INDEX,
            "mesh": _INDEX,
            "remat": plan_schema.Text(REMAT_POLICIES),
            "in_flight": _COUNT,
            "forward_s": plan_schema.Number(),
            "backward_s": plan_schema.Number(),
            "per_step_s": plan_schema.Number(),
            "send_s": plan_schema.Number(),
            "return_s": plan_schema.Number(),
            "peak_bytes": plan_schema.Number(),
            "stash_bytes": plan_schema.Number(),
            "plan": plan_schema.PLAN,
        }
    ),
    "alternatives": plan_schema.ListOf(
        {
            "description": plan_schema.Text(),
            "step_s": plan_schema.Number(optional=True),
            "reason": plan_schema.Text(),
        }
    ),
    "notes": plan_schema.ListOf(plan_schema.Text()),
    "versions": plan_schema.MapOf(plan_schema.Text()),
    "configuration": plan_schema.Optional(plan_schema.MapOf(plan_schema.Scalar())),
    "cluster": plan_schema.Unchecked(),
}


def verify_pipeline_plan(plan: PipelinePlan, where: str = "plan") -> None:
    """Invariants between fields.

    Raises:
      PlanError: a mesh is outside of the cluster or shares devices with another, or a stage names
        no mesh, has another number of devices than its mesh, or the layers of a pipeline are not
        all layers in order.
    """
    taken: dict[tuple[int, int], int] = {}
    for i, mesh in enumerate(plan.meshes):
        for host in mesh.hosts:
            for device in mesh.devices:
                if host >= plan.cluster.num_hosts or device >= plan.cluster.devices_per_host:
                    raise PlanError(
                        f"{where}: meshes[{i}] has device {device} of host {host}; the cluster has "
                        f"{plan.cluster.num_hosts} x {plan.cluster.devices_per_host}"
                    )
                if (host, device) in taken:
                    raise PlanError(
                        f"{where}: meshes[{taken[host, device]}] and meshes[{i}] both have device "
                        f"{device} of host {host}"
                    )
                taken[host, device] = i
    pipelines: dict[int, list[int]] = {}
    for i, stage in enumerate(plan.stages):
        if stage.mesh >= len(plan.meshes):
            raise PlanError(f"{where}: stages[{i}] is on mesh {stage.mesh}, which does not exist")
        size = plan.meshes[stage.mesh].submesh.num_devices
        if stage.plan.mesh.num_devices != size:
            raise PlanError(
                f"{where}: stages[{i}] is planned for {stage.plan.mesh.num_devices} devices, but "
                f"its mesh has {size}"
            )
        pipelines.setdefault(stage.pipeline, []).extend(stage.layers)
    for pipeline, layers in pipelines.items():
        if layers != list(range(plan.num_layers)):
            raise PlanError(
                f"{where}: the stages of pipeline {pipeline} have layers {layers}; they must have "
                f"every layer from 0 to {plan.num_layers - 1} once, in order"
            )


def _stage_json(stage: PlannedStage) -> dict[str, Any]:
    data = {name: getattr(stage, name) for name in PlannedStage.__dataclass_fields__}
    return data | {"layers": list(stage.layers), "plan": stage.plan.to_json()}


def _stage(data: Mapping[str, Any], where: str) -> PlannedStage:
    plan = Plan.from_json(data["plan"], where=f"{where}: plan")
    return PlannedStage(**{**data, "layers": tuple(data["layers"]), "plan": plan})
