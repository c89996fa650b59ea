"""From a planned pipeline to a running one: `compile_pipeline`, `PipelineExecutable`.

In: a `PlannedPipeline` and devices. Out: one program per stage and kind of task, compiled for the
stage's own devices, and one list of instructions that calls them. Calls return at once; JAX runs
them when their inputs are there, so the order of the list is the order of every mesh, and nothing
waits on the host. In several processes every one compiles and runs its part of the same list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from alpa_lite.runtime.agreement import agreed, plan_facts
from alpa_lite.runtime.arguments import Inputs, OwnResults, find_rivals, leaf_aval, place
from alpa_lite.runtime.arrays import absent, is_local, put, put_all
from alpa_lite.runtime.group import process_group
from alpa_lite.runtime.instructions import RUN, Instruction, PipelineProgram, digests, own_part
from alpa_lite.runtime.lower import device_mesh
from alpa_lite.runtime.moves import Mover
from alpa_lite.runtime.phases import PhasePrograms
from alpa_lite.runtime.pipeline_program import build_program, state_type
from alpa_lite.runtime.stacked import LeafMap
from alpa_lite.runtime.stage_programs import compile_stages


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class PipelineExecutable:
    """A pipeline ready to run.

    Attributes:
      pipeline: what was planned.
      meshes: devices of each stage, as its logical mesh.
      stages: programs of each stage, compiled if this process has devices of it.
      program: the instructions of this process.
      joins: of the outputs that come in rows of microbatches, what puts them together.
      absent: the outputs on devices of other processes.
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
    joins: Mapping[int, Callable[..., jax.Array]]
    absent: Mapping[int, jax.Array]
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
        slots: list[Any] = [None] * len(program.types)
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
        for slot, x in zip(targets, put_all(values, shardings), strict=True):
            slots[slot] = x
        for slot, x in self.indices:
            slots[slot] = x
        return slots

    def leave(self, slots: Sequence[Any]) -> Any:
        """The result of the step, from the slots after the last instruction."""
        made = [
            slots[out]
            if isinstance(out, int)
            else self.joins[i](*[slots[s] for s in out])
            if out
            else self.absent[i]
            for i, out in enumerate(self.program.outputs)
        ]
        results = self.leaves.join(made)
        self.own.replace(results)
        return jax.tree.unflatten(self.out_tree, results)


def execute(instruction: Instruction, slots: list[Any]) -> None:
    """Start one instruction."""
    assert instruction.call is not None
    results = instruction.call(*[slots[s] for s in instruction.reads])
    for slot in instruction.frees:
        slots[slot] = None
    if instruction.kind == RUN:
        for slot, x in zip(instruction.writes, results, strict=True):
            slots[slot] = x
    elif instruction.writes:
        slots[instruction.writes[0]] = results


def compile_pipeline(
    pipeline: PlannedPipeline, full_avals: Sequence[Any],
    devices: Sequence[jax.Device] | None = None, own: OwnResults | None = None,
) -> PipelineExecutable:  # fmt: skip
    """Compile a planned pipeline.

    In several processes all of them call this; each compiles the stages of which it has devices.

    Args:
      pipeline: plan, stages and layouts.
      full_avals: shape, dtype and weak type of every input leaf, at the full batch size.
      devices: of the whole cluster, host by host; the attached ones by default.
      own: where programs that hand on one state keep which arrays they returned.

    Raises:
      PlanError: the plan needs more devices, or the processes have different plans.
    """
    meshes = stage_meshes(pipeline, devices)
    group = process_group()
    if group is None or all(is_local(d) for mesh in meshes for d in mesh.devices.flat):
        return _compile(pipeline, meshes, full_avals, Mover(), own)[0]
    mover = Mover(group.transport())
    return agreed(
        group,
        f"compiling {pipeline.plan.name}",
        lambda: _compile(pipeline, meshes, full_avals, mover, own),
        lambda made: {**plan_facts(pipeline.plan), **digests(made[1])},
    )[0]


def _compile(
    pipeline: PlannedPipeline, meshes: Sequence[jax.sharding.Mesh], full_avals: Sequence[Any],
    mover: Mover, own: OwnResults | None,
) -> tuple[PipelineExecutable, PipelineProgram]:  # fmt: skip
    """The part of this process, and the instructions of all of them."""
    stages = compile_stages(pipeline, meshes)
    program = build_program(pipeline, stages, meshes, mover)
    of_plan = {s.mesh: mesh for s, mesh in zip(pipeline.plan.stages, meshes, strict=True)}
    part = own_part(program, [of_plan[i] for i in range(len(of_plan))])
    source = pipeline.source
    leaves = leaf_map(pipeline, meshes)
    places, names = source.places.inputs, source.traced.graph.input_names
    inner = source.parts.inputs
    rows = {i for i, at in enumerate(places) if inner[at.positions[0]] in source.parts.batch}
    positions = tuple(i for i in range(len(names)) if i not in rows)
    first = {p: s for p, s, _ in reversed(program.arguments)}
    state = state_shardings(pipeline, meshes)
    for position, output in source.names.aliases.items():
        # The same object: that the state lies where the next call wants it is then seen at once.
        if part.results[output][1] == state.get(position):
            state[position] = part.results[output][1]
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
    results = list(zip(part.outputs, part.results, strict=True))
    joins = {i: _joiner(s) for i, (out, (_, s)) in enumerate(results) if isinstance(out, tuple)}
    elsewhere = {i: absent(aval, s) for i, (out, (aval, s)) in enumerate(results) if out == ()}
    executable = PipelineExecutable(
        pipeline, tuple(meshes), tuple(stages), part, joins, elsewhere, leaves, inputs, positions,
        tuple((p, names[p], avals[p]) for p in sorted(rows)),
        tuple((slot, put(np.int32(m), s)) for m, s, slot in part.indices),
        source.traced.in_tree, source.traced.out_tree, own or OwnResults(),
    )  # fmt: skip
    return executable, program


def state_shardings(
    pipeline: PlannedPipeline, meshes: Sequence[jax.sharding.Mesh]
) -> dict[int, NamedSharding]:
    """Layout of every state leaf, by position among the input leaves."""
    return {
        position: state_type(pipeline, meshes[home], home, position)[1]
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
      args: its arguments, in several processes the same in all of them.
      shardings: of the leaves; every mesh runs what makes its own.
    """
    avals, tree = jax.tree.flatten(jax.eval_shape(init_fn, *args))
    groups: dict[jax.sharding.Mesh, list[int]] = {}
    for i, each in enumerate(shardings):
        groups.setdefault(each.mesh, []).append(i)  # type: ignore[arg-type]
    leaves: list[Any] = [None] * len(shardings)
    for mesh, chosen in groups.items():
        if not is_local(mesh):
            for i in chosen:
                leaves[i] = absent(avals[i], shardings[i])
            continue

        def some(*values: Any, chosen: Sequence[int] = chosen) -> list[Any]:
            found = jax.tree.leaves(init_fn(*values))
            return [found[i] for i in chosen]

        replicated = NamedSharding(mesh, PartitionSpec())
        given = jax.tree.map(lambda x, to=replicated: put(x, to), tuple(args))
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


def _checked(leaf: Any, name: str, aval: Any) -> Any:
    """A batch leaf of the right type.

    Raises:
      TypeError: it has another shape or dtype.
      ValueError: it was deleted, or lies on devices of other processes.
    """
    if isinstance(leaf, jax.Array) and leaf.is_deleted():
        raise ValueError(f"batch leaf {name} was deleted; pass an array that is alive")
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        raise ValueError(
            f"batch leaf {name} lies on devices of other processes. Pass the whole batch as numpy "
            "arrays in every process; only rows of stages that are here are read."
        )
    found = leaf_aval(leaf, name)
    if found.shape != aval.shape or found.dtype != aval.dtype:
        raise TypeError(
            f"a compiled step takes the shapes and dtypes it was compiled for: {name} should be "
            f"{aval.dtype}{list(aval.shape)}, found {found.dtype}{list(found.shape)}. Convert it, "
            "or compile for these arguments; calling the step itself does so."
        )
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf, aval.dtype)
    if len(leaf.sharding.device_set) == 1:
        return leaf
    # Rows of an array that is split over devices would need a program with collectives each.
    device = leaf.addressable_shards[0].device
    return jax.device_put(leaf, NamedSharding(jax.sharding.Mesh([device], ("x",)), PartitionSpec()))


def _rows(leaf: Any, microbatch: int, count: int) -> Any:
    size = leaf.shape[0] // count
    return leaf[microbatch * size : (microbatch + 1) * size]


def _joiner(sharding: NamedSharding) -> Callable[..., jax.Array]:
    """Puts a per-example output of all microbatches together, in the order of the batch."""

    def join(*parts: jax.Array) -> jax.Array:
        return jnp.concatenate(parts)

    return jax.jit(join, out_shardings=sharding)
