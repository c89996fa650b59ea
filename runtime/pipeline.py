"""From a planned pipeline to a running one: `compile_pipeline`, `PipelineExecutable`.

In: a `PlannedPipeline` and devices. Out: one program per stage and kind of task, compiled for the
stage's own devices, and one list of instructions that calls them. Calls return at once; JAX runs
them when their inputs are there, so the order of the list is the order of every mesh, and nothing
waits on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from alpa_lite.errors import PlanError
from alpa_lite.ir.graph import Literal
from alpa_lite.passes.inter_op import Placement
from alpa_lite.passes.pipeline_plan import PipelinePlan
from alpa_lite.passes.pipeshard import PlannedPipeline
from alpa_lite.passes.schedules import programs as task_kinds
from alpa_lite.passes.schedules.task import BACKWARD_INPUT
from alpa_lite.passes.stages.stage_step import update_rounds
from alpa_lite.runtime.arguments import Inputs, OwnResults, find_rivals, leaf_aval, place
from alpa_lite.runtime.instructions import Instruction, PipelineProgram
from alpa_lite.runtime.lower import device_mesh
from alpa_lite.runtime.phases import PhasePrograms, compile_phases
from alpa_lite.runtime.pipeline_program import (
    arrival_rounds,
    build_program,
    state_sharding,
)
from alpa_lite.runtime.stacked import LeafMap
from alpa_lite.runtime.transfer import plan_transfer


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class PipelineExecutable:
    """A pipeline ready to run.

    Attributes:
      pipeline: what was planned.
      meshes: devices of each stage, as its logical mesh.
      stages: compiled programs of each stage.
      program: the instructions.
      leaves: from the leaves a user has to those of the stages, and back.
      inputs: input leaves that are no batch leaves.
      positions: of those leaves among all.
      batch: (position, path, type) of the batch leaves, at the full batch size.
      indices: numbers of the microbatches, on the devices that read them.
      in_tree, out_tree: pytree structures of arguments and result.
      own: results of the latest call.
    """

    pipeline: PlannedPipeline
    meshes: tuple[jax.sharding.Mesh, ...]
    stages: tuple[PhasePrograms, ...]
    program: PipelineProgram
    leaves: LeafMap
    inputs: Inputs
    positions: tuple[int, ...]
    batch: tuple[tuple[int, str, Any], ...]
    indices: tuple[tuple[int, jax.Array], ...]
    in_tree: Any
    out_tree: Any
    own: OwnResults

    @property
    def plan(self) -> PipelinePlan:
        """What it does."""
        return self.pipeline.plan

    def __call__(self, *args: Any) -> Any:
        """Run one step; arguments are laid out as planned if they are not yet.

        Args:
          *args: the arguments without static ones; those passed by keyword last, by name.

        Raises:
          TypeError: the arguments have another structure, shape or dtype, or are traced.
          ValueError: an argument was deleted or donated.
        """
        leaves, tree = jax.tree.flatten(args)
        if tree != self.in_tree:
            raise TypeError(
                f"the step was compiled for arguments {self.in_tree}, called with {tree}"
            )
        return self.run(leaves)

    def run(self, leaves: Sequence[Any]) -> Any:
        """Run one step on the leaves of its arguments."""
        slots = self.enter(leaves)
        for each in self.program.instructions:
            execute(each, slots)
        return self.leave(slots)

    def enter(self, leaves: Sequence[Any]) -> list[Any]:
        """The slots before the first instruction."""
        program = self.program
        slots: list[Any] = [None] * program.num_slots
        placed = place(self.inputs, [leaves[p] for p in self.positions], self.own)
        by_position: dict[int, jax.Array] = {}
        for leaf, x in zip(self.positions, placed, strict=True):
            by_position |= self.leaves.split(leaf, x)
        for position, slot in program.state.items():
            slots[slot] = by_position[position]
        values, shardings, targets = [], [], []
        for position, sharding, slot in program.arguments:
            values.append(by_position[position])
            shardings.append(sharding)
            targets.append(slot)
        batches = {
            self.leaves.places.inputs[p].positions[0]: _checked(leaves[p], name, aval)
            for p, name, aval in self.batch
        }
        for position, microbatch, sharding, slot in program.rows:
            values.append(_rows(batches[position], microbatch, self.plan.num_microbatches))
            shardings.append(sharding)
            targets.append(slot)
        for slot, x in zip(targets, jax.device_put(values, shardings), strict=True):
            slots[slot] = x
        for slot, x in self.indices:
            slots[slot] = x
        return slots

    def leave(self, slots: Sequence[Any]) -> Any:
        """The result of the step, from the slots after the last instruction."""
        made = [
            slots[out] if isinstance(out, int) else _join([slots[s] for s in out])
            for out in self.program.outputs
        ]
        results = self.leaves.join(made)
        self.own.replace(results)
        return jax.tree.unflatten(self.out_tree, results)


def execute(instruction: Instruction, slots: list[Any]) -> None:
    """Start one instruction."""
    results = instruction.call(*[slots[s] for s in instruction.reads])
    for slot in instruction.frees:
        slots[slot] = None
    if instruction.kind == "move":
        slots[instruction.writes[0]] = results
    else:
        for slot, x in zip(instruction.writes, results, strict=True):
            slots[slot] = x


def compile_pipeline(
    pipeline: PlannedPipeline, full_avals: Sequence[Any],
    devices: Sequence[jax.Device] | None = None, own: OwnResults | None = None,
) -> PipelineExecutable:  # fmt: skip
    """Compile a planned pipeline.

    Args:
      pipeline: plan, stages and layouts.
      full_avals: shape, dtype and weak type of every input leaf, at the full batch size.
      devices: of the whole cluster, host by host; the attached ones by default.
      own: where programs that hand on one state keep which arrays they returned.

    Raises:
      PlanError: the plan needs more devices.
    """
    meshes = stage_meshes(pipeline, devices)
    arrivals = arrival_rounds(pipeline)
    num = pipeline.schedule.num_stages
    kinds = task_kinds(pipeline.schedule)
    stages = []
    for index, (step, planned) in enumerate(zip(pipeline.steps, pipeline.planned, strict=True)):
        rounds = update_rounds(step.traced.graph, arrivals[index])
        last = max((*rounds.values(), *arrivals[index].values(), 0))
        stages.append(
            compile_phases(
                planned, meshes[index],
                split_backward=BACKWARD_INPUT in kinds[index % num],
                update_rounds=[{op for op, r in rounds.items() if r == n} for n in range(last + 1)],
                late_inputs=[i for i, p in enumerate(step.inputs) if p.kind == "cotangent"],
            )
        )  # fmt: skip
    program = build_program(pipeline, stages, meshes, make_move)
    source = pipeline.source
    leaves = leaf_map(pipeline, meshes)
    places, names = source.places.inputs, source.traced.graph.input_names
    inner = source.parts.inputs
    rows = {i for i, at in enumerate(places) if inner[at.positions[0]] in source.parts.batch}
    positions = tuple(i for i in range(len(names)) if i not in rows)
    first = {p: s for p, s, _ in reversed(program.arguments)}
    state = state_shardings(pipeline, meshes)
    replicated = NamedSharding(meshes[0], PartitionSpec())
    shardings = tuple(
        leaves.inputs[i].whole
        if i in leaves.inputs
        else state.get(places[i].positions[0], first.get(places[i].positions[0], replicated))
        for i in positions
    )
    avals = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=getattr(a, "weak_type", False))
        for a in full_avals
    ]
    chosen = tuple(avals[p] for p in positions)
    donated = frozenset(
        n for n, i in enumerate(positions) if places[i].positions[0] in program.state
    )
    inputs = Inputs(
        tuple(names[p] for p in positions), chosen, shardings, donated,
        find_rivals(chosen, shardings, donated),
    )  # fmt: skip
    return PipelineExecutable(
        pipeline, tuple(meshes), tuple(stages), program, leaves, inputs, positions,
        tuple((p, names[p], avals[p]) for p in sorted(rows)),
        tuple((slot, jax.device_put(np.int32(m), s)) for m, s, slot in program.indices),
        source.traced.in_tree, source.traced.out_tree, own or OwnResults(),
    )  # fmt: skip


def state_shardings(
    pipeline: PlannedPipeline, meshes: Sequence[jax.sharding.Mesh]
) -> dict[int, NamedSharding]:
    """Layout of every state leaf, by position among the input leaves."""
    return {
        position: state_sharding(pipeline, meshes[home], home, position)
        for position, home in enumerate(pipeline.cut.split.input_homes)
        if home is not None
    }


def leaf_map(pipeline: PlannedPipeline, meshes: Sequence[jax.sharding.Mesh]) -> LeafMap:
    """From the leaves a user has to those of the stages, and back.

    Raises:
      PlanError: the stages of a scan over layers have submeshes of different sizes.
    """
    graph = pipeline.source.traced.graph
    shapes = [graph.values[v].shape for v in graph.inputs]
    # The first dim of per-example outputs differs; those are never stacked.
    outputs = [
        tuple(o.shape) if isinstance(o, Literal) else graph.values[o].shape for o in graph.outputs
    ]
    state = state_shardings(pipeline, meshes)
    return LeafMap(pipeline.source.places, graph.input_names, (shapes, outputs), state)


def user_shardings(pipeline: PlannedPipeline) -> dict[int, NamedSharding]:
    """Layout of every state leaf on the attached devices, by position among the user's leaves."""
    meshes = stage_meshes(pipeline)
    state, leaves = state_shardings(pipeline, meshes), leaf_map(pipeline, meshes)
    return {
        i: leaves.inputs[i].whole if i in leaves.inputs else state[place.positions[0]]
        for i, place in enumerate(pipeline.source.places.inputs)
        if place.positions[0] in state
    }


def init_on_meshes(
    init_fn: Callable[..., Any], args: Sequence[Any], shardings: Sequence[NamedSharding]
) -> Any:
    """The result of a function, every leaf made on the devices where it shall lie.

    Args:
      init_fn: returns a pytree of arrays.
      args: its arguments.
      shardings: of the leaves; every mesh runs what makes its own.
    """
    tree = jax.tree.structure(jax.eval_shape(init_fn, *args))
    groups: dict[jax.sharding.Mesh, list[int]] = {}
    for i, each in enumerate(shardings):
        groups.setdefault(each.mesh, []).append(i)  # type: ignore[arg-type]
    leaves: list[Any] = [None] * len(shardings)
    for mesh, chosen in groups.items():

        def some(*values: Any, chosen: Sequence[int] = chosen) -> list[Any]:
            found = jax.tree.leaves(init_fn(*values))
            return [found[i] for i in chosen]

        given = jax.device_put(tuple(args), NamedSharding(mesh, PartitionSpec()))
        made = jax.jit(some, out_shardings=[shardings[i] for i in chosen])(*given)
        for i, x in zip(chosen, made, strict=True):
            leaves[i] = x
    return jax.tree.unflatten(tree, leaves)


def stage_meshes(
    pipeline: PlannedPipeline, devices: Sequence[jax.Device] | None = None
) -> list[jax.sharding.Mesh]:
    """The devices of each stage, as its logical mesh.

    Raises:
      PlanError: too few devices.
    """
    plan = pipeline.plan
    found = list(jax.devices() if devices is None else devices)
    needed = plan.cluster.num_devices
    if len(found) < needed:
        raise PlanError(
            f"the plan is for {plan.cluster.num_hosts} x {plan.cluster.devices_per_host} = "
            f"{needed} devices; {len(found)} are attached ({found[0].platform}). Plan for the "
            "attached devices, or run on the cluster."
        )
    return [
        device_mesh(
            planned.decisions.mesh,
            placed_devices(plan.meshes[stage.mesh], found, plan.cluster.devices_per_host),
        )
        for stage, planned in zip(plan.stages, pipeline.planned, strict=True)
    ]


def placed_devices(
    placement: Placement, devices: Sequence[jax.Device], devices_per_host: int
) -> list[jax.Device]:
    """The devices of a submesh, host by host."""
    return [devices[h * devices_per_host + d] for h in placement.hosts for d in placement.devices]


def make_move(aval: Any, source: NamedSharding, target: NamedSharding) -> Callable[[Any], Any]:
    """How a value goes from one mesh to another, enqueued; its result shares no memory with it."""
    if source.device_set & target.device_set:
        return jax.jit(lambda x: x, in_shardings=source, out_shardings=target, keep_unused=True)
    if not jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return plan_transfer(aval, source, target).start
    data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(aval.shape, aval.dtype))
    more = len(data.shape) - len(aval.shape)

    def with_data(s: NamedSharding) -> NamedSharding:
        dims = tuple(s.spec) + (None,) * (len(aval.shape) - len(s.spec) + more)
        return NamedSharding(s.mesh, PartitionSpec(*dims))

    moved = plan_transfer(data, with_data(source), with_data(target))
    unwrap = jax.jit(jax.random.key_data, out_shardings=moved.source)
    implementation = aval.dtype._impl.name
    wrap = jax.jit(lambda x: jax.random.wrap_key_data(x, impl=implementation), out_shardings=target)
    return lambda keys: wrap(moved.start(unwrap(keys)))


def _checked(leaf: Any, name: str, aval: Any) -> Any:
    """A batch leaf of the right type.

    Raises:
      TypeError: it has another shape or dtype.
      ValueError: it was deleted.
    """
    if isinstance(leaf, jax.Array) and leaf.is_deleted():
        raise ValueError(f"batch leaf {name} was deleted; pass an array that is alive")
    found = leaf_aval(leaf, name)
    if found.shape != aval.shape or found.dtype != aval.dtype:
        raise TypeError(
            f"a compiled step takes the shapes and dtypes it was compiled for: {name} should be "
            f"{aval.dtype}{list(aval.shape)}, found {found.dtype}{list(found.shape)}. Convert it, "
            "or compile for these arguments; calling the step itself does so."
        )
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf, aval.dtype)


def _rows(leaf: Any, microbatch: int, count: int) -> Any:
    size = leaf.shape[0] // count
    return leaf[microbatch * size : (microbatch + 1) * size]


def _join(parts: Sequence[jax.Array]) -> jax.Array:
    """Per-example outputs of all microbatches, in the order of the batch."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)
