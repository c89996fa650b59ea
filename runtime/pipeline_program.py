"""A planned pipeline as one flat list of instructions: `build_program`.

In: a `PlannedPipeline`, the compiled programs of its stages, and how values move between meshes.
Out: `PipelineProgram`: instructions over integer slots, in one global order in which no mesh can
block another. Every slot is written once; an instruction names the slots that nobody reads after
it, so that arrays are dropped as soon as they are not needed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from alpa_lite.passes.pipeshard import PlannedPipeline
from alpa_lite.passes.schedules import Task, global_order
from alpa_lite.passes.schedules.task import BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD
from alpa_lite.passes.stages.stage_step import Port, update_rounds
from alpa_lite.runtime.instructions import (
    MOVE,
    RUN,
    Instruction,
    PipelineProgram,
    verify_program,
    with_frees,
)
from alpa_lite.runtime.lower import sharding
from alpa_lite.runtime.moves import Move
from alpa_lite.runtime.phases import (
    ACCUMULATOR,
    BATCH,
    INDEX,
    INPUT,
    INVARIANT,
    LOOP_OUTPUT,
    OUTPUT,
    STASH,
    PhaseProgram,
    PhasePrograms,
    Slot,
)

INDEX_TYPE = jax.ShapeDtypeStruct((), jnp.int32)
"""Of the number of a microbatch."""

Key = Hashable
"""What a slot holds: see `_Builder`."""


MakeMove = Callable[[Any, Any, Any], Move]
"""(shape and dtype, source sharding, target sharding) -> this process's part in the move."""


def build_program(
    pipeline: PlannedPipeline, stages: Sequence[PhasePrograms],
    meshes: Sequence[jax.sharding.Mesh], make_move: MakeMove,
) -> PipelineProgram:  # fmt: skip
    """Put the programs of all stages in order; `own_part` is what this process runs of it.

    Args:
      pipeline: what was planned.
      stages: programs, per stage; compiled if this process has devices of the stage.
      meshes: devices of each stage.
      make_move: plans how a value moves between meshes; called for the same values in the same
        order in every process.

    Raises:
      AssertionError: the instructions are wrong: see `verify_program`.
    """
    program = _Builder(pipeline, stages, meshes, make_move).build()
    verify_program(program)
    return program


def arrival_rounds(pipeline: PlannedPipeline) -> tuple[dict[int, int], ...]:
    """Per stage, the round of the update before which each input arrives, if not at the start."""
    arrivals: list[dict[int, int]] = [{} for _ in pipeline.steps]
    while True:
        leaves: dict[Any, int] = {}
        for stage, step in enumerate(pipeline.steps):
            graph = step.traced.graph
            rounds = update_rounds(graph, arrivals[stage])
            made = {v: rounds[op.id] for op in graph.ops if op.id in rounds for v in op.results}
            given = {graph.inputs[p]: r for p, r in arrivals[stage].items()}
            for port, out in zip(step.outputs, graph.outputs, strict=True):
                if port.kind == "update":
                    leaves[_sent(port)] = (
                        made.get(out, given.get(out, 0)) if isinstance(out, int) else 0
                    )
        found = [
            {
                position: 1 + leaves[_sent(port)]
                for position, port in enumerate(step.inputs)
                if port.kind == "update"
            }
            for step in pipeline.steps
        ]
        if found == arrivals:
            return tuple(found)
        arrivals = found


def _sent(port: Port) -> tuple[Any, int]:
    """What identifies a value sent for the update: what it is, and where it comes from."""
    what, source, _ = port.key
    return what, source


@dataclass(slots=True, eq=False)
class _Builder:
    """Collects instructions.

    Slots are found by keys: ("state", position) of the step, ("input", stage, position), ("row",
    stage, position, microbatch), ("index", microbatch, sharding); and what programs make: (kind of
    slot, stage, number), of one microbatch (kind of slot, stage, number, microbatch).
    """

    pipeline: PlannedPipeline
    stages: Sequence[PhasePrograms]
    meshes: Sequence[jax.sharding.Mesh]
    make_move: MakeMove
    slots: dict[Key, int] = field(default_factory=dict)
    types: list[tuple[Any, Any]] = field(default_factory=list)  # (type, sharding) per slot
    instructions: list[Instruction] = field(default_factory=list)
    arguments: list[tuple[int, Any, int]] = field(default_factory=list)
    rows: list[tuple[int, int, Any, int]] = field(default_factory=list)
    indices: dict[tuple[int, Any], int] = field(default_factory=dict)
    versions: dict[Key, int] = field(default_factory=lambda: defaultdict(int))
    moves: dict[Any, Move] = field(default_factory=dict)

    def build(self) -> PipelineProgram:
        pipeline = self.pipeline
        homes = pipeline.cut.split.input_homes
        state = {
            p: self.new(("state", p), *state_type(pipeline, self.meshes[home], home, p))
            for p, home in enumerate(homes)
            if home is not None
        }
        for stage in range(len(self.stages)):
            self.enter(stage)
        for stage, programs in enumerate(self.stages):
            if programs.prepare is not None:
                self.run(stage, programs.prepare, None, f"prepare stage {stage}")
        num = pipeline.schedule.num_stages
        for task in global_order(pipeline.timeline):
            stage = pipeline.schedule.pipeline_of[task.microbatch] * num + task.stage
            self.task(stage, task)
        rounds = max(len(programs.update) for programs in self.stages)
        self.send_updates(-1)
        for number in range(rounds):
            for stage, programs in enumerate(self.stages):
                if number < len(programs.update) and programs.update[number] is not None:
                    self.run(stage, programs.update[number], None, f"update stage {stage}")
            self.send_updates(number)
        outputs = self.outputs()
        kept = {s for out in outputs for s in ((out,) if isinstance(out, int) else out)}
        return PipelineProgram(
            with_frees(self.instructions, kept), tuple(self.types), state,
            tuple(self.arguments), tuple(self.rows),
            tuple((m, sharding, slot) for (m, sharding), slot in self.indices.items()), outputs,
            tuple(map(self.result, outputs)),
        )  # fmt: skip

    # Slots.

    def new(self, key: Key, aval: Any, sharding: Any) -> int:
        """A slot for a key; the latest one if there are several."""
        self.slots[key] = len(self.types)
        self.types.append((aval, sharding))
        return self.slots[key]

    def mesh_of(self, stage: int) -> int:
        return self.pipeline.plan.stages[stage].mesh

    def sharding_of(self, stage: int, wanted: Slot) -> tuple[Any, Any] | None:
        """(type, sharding) in which some program of a stage reads an input."""
        for program in self.stages[stage].programs:
            if wanted in program.inputs:
                at = program.inputs.index(wanted)
                return program.in_avals[at], program.in_shardings[at]
        return None

    def layout_of(self, stage: int, wanted: Slot) -> tuple[Any, Any] | None:
        """The same, also for an input that no program reads but that is an output as it is."""
        found = self.sharding_of(stage, wanted)
        if found is None and wanted.number in self.stages[stage].passed.values():
            graph = self.pipeline.steps[stage].traced.graph
            aval = graph.values[graph.inputs[wanted.number]].aval
            found = aval, input_sharding(self.pipeline, self.meshes[stage], stage, wanted.number)
        return found

    # What comes from outside, and from other stages at the start.

    def enter(self, stage: int) -> None:
        """Slots of a stage's inputs that are there before the first task."""
        step, split = self.pipeline.steps[stage], self.pipeline.cut.split
        for position, port in enumerate(step.inputs):
            if port.kind == "state":
                self.slots["input", stage, position] = self.slots["state", port.position]
            elif port.kind == "argument":
                found = self.layout_of(stage, Slot(INPUT, position))
                if found is None:
                    continue
                aval, sharding = found
                home = split.input_homes[port.position]
                if home is None:
                    slot = self.new(("input", stage, position), aval, sharding)
                    self.arguments.append((port.position, sharding, slot))
                else:
                    _, source = self.types[self.slots["state", port.position]]
                    self.move(
                        ("state", port.position), ("input", stage, position), aval, source,
                        sharding, home, stage, f"input to stage {stage}",
                    )  # fmt: skip
            elif port.kind == "row":
                found = self.layout_of(stage, Slot(BATCH, position))
                if found is None:
                    continue
                for m in self.microbatches(stage):
                    slot = self.new(("row", stage, position, m), *found)
                    self.rows.append((port.position, m, found[1], slot))

    def microbatches(self, stage: int) -> list[int]:
        schedule = self.pipeline.schedule
        pipeline = stage // schedule.num_stages
        return [m for m, p in enumerate(schedule.pipeline_of) if p == pipeline]

    # Instructions.

    def run(
        self, stage: int, program: PhaseProgram | None, microbatch: int | None, name: str,
        task: Task | None = None,
    ) -> None:  # fmt: skip
        """Append a program of a stage."""
        assert program is not None
        reads = [
            self.read(stage, slot, microbatch, sharding)
            for slot, sharding in zip(program.inputs, program.in_shardings, strict=True)
        ]
        writes = [
            self.new(self.key(stage, slot, microbatch), aval, sharding)
            for slot, aval, sharding in zip(
                program.outputs, program.out_avals, program.out_shardings, strict=True
            )
        ]
        donates = tuple(reads[i] for i in sorted(program.donated))
        mesh = self.mesh_of(stage)
        self.instructions.append(
            Instruction(
                RUN, name, mesh, mesh, program.compiled, tuple(reads), tuple(writes), (), donates,
                task,
            )
        )  # fmt: skip

    def read(self, stage: int, slot: Slot, microbatch: int | None, sharding: Any) -> int:
        if slot.kind == INPUT:
            return self.slots["input", stage, slot.number]
        if slot.kind == INDEX:
            key = (microbatch or 0, sharding)
            if key not in self.indices:
                self.indices[key] = self.new(("index", *key), INDEX_TYPE, sharding)
            return self.indices[key]
        if slot.kind == BATCH:
            return self.slots["row", stage, slot.number, self.only(stage, microbatch)]
        if slot.kind == STASH and ("stash", stage, slot.number, microbatch) not in self.slots:
            microbatch = self.only(stage, microbatch)
        return self.slots[self.key(stage, slot, microbatch)]

    def only(self, stage: int, microbatch: int | None) -> int:
        """A microbatch, for programs of the update the only one."""
        if microbatch is not None:
            return microbatch
        (found,) = self.microbatches(stage)
        return found

    def key(self, stage: int, slot: Slot, microbatch: int | None) -> Key:
        if slot.kind in (ACCUMULATOR, INVARIANT, OUTPUT):
            return slot.kind, stage, slot.number
        assert slot.kind in (STASH, LOOP_OUTPUT), slot
        return slot.kind, stage, slot.number, microbatch

    def move(
        self, source_key: Key, target_key: Key, aval: Any, source: Any, target: Any,
        source_stage: int, target_stage: int, name: str,
    ) -> None:  # fmt: skip
        """Append a move between meshes."""
        signature = (aval.shape, aval.dtype, source, target)
        if signature not in self.moves:
            self.moves[signature] = self.make_move(aval, source, target)
        reads = (self.slots[source_key],)
        self.instructions.append(
            Instruction(
                MOVE, name, self.mesh_of(source_stage), self.mesh_of(target_stage), None, reads,
                (self.new(target_key, aval, target),), (), (), move=self.moves[signature],
            )
        )  # fmt: skip

    # Tasks.

    def task(self, stage: int, task: Task) -> None:
        """A task of the schedule, then what it hands on or back."""
        step, m = self.pipeline.steps[stage], task.microbatch
        programs = [p for p in self.stages[stage].loop if p.name in _PROGRAMS_OF[task.kind]]
        for program in programs:
            self.run(stage, program, m, str(task), task)
            for slot, aval, lies in zip(
                program.outputs, program.out_avals, program.out_shardings, strict=True
            ):
                if slot.kind == LOOP_OUTPUT:
                    made: Key = (LOOP_OUTPUT, stage, slot.number, m)
                    self.hand_over(stage, made, step.outputs[slot.number], aval, lies, m)
        # What goes through a stage as it is leaves with the task that would have made it.
        kinds = {FORWARD: "activation", BACKWARD: "cotangent", BACKWARD_INPUT: "cotangent"}
        for position, came_in in self.stages[stage].passed.items():
            port = step.outputs[position]
            if port.kind == kinds.get(task.kind):
                came: Key = self.row_key(stage, came_in, m)
                graph = step.traced.graph
                aval = graph.values[graph.inputs[came_in]].aval
                lies = input_sharding(self.pipeline, self.meshes[stage], stage, came_in)
                self.hand_over(stage, came, port, aval, lies, m)
        early = self.stages[stage].prepare
        for slot, aval, lies in (
            zip(early.outputs, early.out_avals, early.out_shardings, strict=True) if early else ()
        ):
            if slot.kind == OUTPUT and step.outputs[slot.number].kind == kinds.get(task.kind):
                same: Key = (OUTPUT, stage, slot.number)
                self.hand_over(stage, same, step.outputs[slot.number], aval, lies, m)

    def row_key(self, stage: int, position: int, microbatch: int) -> Key:
        """The key of a batch input, of another input if it is none."""
        key = ("row", stage, position, microbatch)
        return key if key in self.slots else ("input", stage, position)

    def hand_over(
        self, stage: int, source_key: Key, port: Port, aval: Any, sharding: Any, microbatch: int
    ) -> None:
        """Send a loop output to every stage that reads it."""
        if port.kind not in ("activation", "cotangent"):
            return
        cut = self.pipeline.cut.cuts[stage]
        variable = port.key.variable
        if port.kind == "activation":
            links = [link for link in cut.sent if link.variable is variable]
            targets = [link.target for link in links]
        else:
            links = [link for link in cut.received if link.variable is variable]
            targets = [link.source for link in links]
        for link, target in zip(links, targets, strict=True):
            at = next(
                i
                for i, p in enumerate(self.pipeline.steps[target].inputs)
                if p.kind == port.kind and p.key == link
            )
            passes = at in self.stages[target].passed.values()
            if self.sharding_of(target, Slot(BATCH, at)) is None and not passes:
                continue
            there = input_sharding(self.pipeline, self.meshes[target], target, at)
            self.move(
                source_key, ("row", target, at, microbatch), aval, sharding, there, stage,
                target, f"{port.kind} of microbatch {microbatch} to stage {target}",
            )  # fmt: skip

    # The update.

    def send_updates(self, number: int) -> None:
        """Move what the update of other stages needs and round `number` has made."""
        if number < 0:
            return
        for stage, step in enumerate(self.pipeline.steps):
            for position, port in enumerate(step.outputs):
                if port.kind != "update":
                    continue
                program = self.stages[stage].update
                made = number < len(program) and program[number] is not None
                slot = Slot(OUTPUT, position)
                if not made or slot not in program[number].outputs:  # type: ignore[union-attr]
                    continue
                at = program[number].outputs.index(slot)  # type: ignore[union-attr]
                aval = program[number].out_avals[at]  # type: ignore[union-attr]
                sharding = program[number].out_shardings[at]  # type: ignore[union-attr]
                for target, there in self.readers_of(port, stage):
                    found = self.sharding_of(target, Slot(INPUT, there))
                    if found is not None:
                        self.move(
                            (OUTPUT, stage, position), ("input", target, there), aval, sharding,
                            found[1], stage, target, f"update of stage {target}",
                        )  # fmt: skip

    def readers_of(self, sent: Port, source: int) -> list[tuple[int, int]]:
        """(stage, position) of the inputs that receive a value sent for the update."""
        what = sent.key[0]
        return [
            (stage, position)
            for stage, step in enumerate(self.pipeline.steps)
            for position, port in enumerate(step.inputs)
            if port.kind == "update" and port.key[0] == what and port.key[1] == source
        ]

    # Outputs.

    def outputs(self) -> tuple[int | tuple[int, ...], ...]:
        """Slots of the step's outputs."""
        found: dict[int, int | tuple[int, ...]] = {}
        rows: dict[int, dict[int, int]] = defaultdict(dict)
        for stage, step in enumerate(self.pipeline.steps):
            programs = self.stages[stage]
            for position, port in enumerate(step.outputs):
                if port.kind not in ("state", "result"):
                    continue
                key = (OUTPUT, stage, position)
                if position in programs.passed:
                    found[port.position] = self.slots["input", stage, programs.passed[position]]
                elif key in self.slots:
                    found[port.position] = self.slots[key]
                else:
                    self.collect_rows(stage, position, port.position, rows[port.position])
        for output, parts in rows.items():
            found[output] = tuple(parts[m] for m in sorted(parts))
        return tuple(found[i] for i in range(len(found)))

    def result(self, output: int | tuple[int, ...]) -> tuple[Any, Any]:
        """(type, sharding) of an output."""
        if isinstance(output, int):
            return self.types[output]
        aval, sharding = self.types[output[0]]
        if len(output) == 1:
            return aval, sharding
        rows = sum(self.types[slot][0].shape[0] for slot in output)
        return jax.ShapeDtypeStruct((rows, *aval.shape[1:]), aval.dtype), sharding

    def collect_rows(self, stage: int, position: int, output: int, rows: dict[int, int]) -> None:
        """Slots of a per-example output by microbatch, all on the mesh that returns it."""
        home = self.pipeline.cut.split.output_homes[output]
        for m in self.microbatches(stage):
            key = (LOOP_OUTPUT, stage, position, m)
            if stage != home:
                there = next(
                    i
                    for i, p in enumerate(self.pipeline.steps[home].outputs)
                    if p.kind == "result" and p.position == output
                )
                aval, source = self.made_by(stage, position)
                _, target = self.made_by(home, there)
                moved = (LOOP_OUTPUT, home, there, m)
                self.move(key, moved, aval, source, target, stage, home, f"output {output}")
                key = moved
            rows[m] = self.slots[key]

    def made_by(self, stage: int, position: int) -> tuple[Any, Any]:
        """(type, sharding) of a loop output."""
        wanted = Slot(LOOP_OUTPUT, position)
        program = next(p for p in self.stages[stage].loop if wanted in p.outputs)
        at = program.outputs.index(wanted)
        return program.out_avals[at], program.out_shardings[at]


# A stage whose backward pass is split for some microbatches has it in two programs for all.
_PROGRAMS_OF = {
    FORWARD: ("forward",),
    BACKWARD: ("backward", "backward_input", "backward_weight"),
    BACKWARD_INPUT: ("backward_input",),
    BACKWARD_WEIGHT: ("backward_weight",),
}


def input_sharding(
    pipeline: PlannedPipeline, mesh: jax.sharding.Mesh, stage: int, position: int
) -> Any:
    """How an input of a stage lies on its devices."""
    decisions = pipeline.planned[stage].decisions
    link = decisions.contraction.program.link_at["input", (), position]
    return sharding(mesh, decisions.result_specs[link][0])


def state_type(
    pipeline: PlannedPipeline, mesh: jax.sharding.Mesh, stage: int, position: int
) -> tuple[Any, Any]:
    """(type, sharding) of a state leaf of the step on the devices of the stage where it lives."""
    step = pipeline.steps[stage]
    at = next(i for i, p in enumerate(step.inputs) if p.kind == "state" and p.position == position)
    graph = step.traced.graph
    return graph.values[graph.inputs[at]].aval, input_sharding(pipeline, mesh, stage, at)
