"""Live bytes of a pipeline, after every instruction, against what the simulator predicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax

import alpa_lite
from alpa_lite.passes.schedules import BACKWARD, FORWARD, StageBytes, Task, memory_over_time
from alpa_lite.runtime.pipeline import PipelineExecutable, execute
from alpa_lite.runtime.timing import bytes_per_device
from benchmarks.pipeline_model import Model
from benchmarks.results_table import Column

SCHEDULES = ("gpipe", "1f1b")
# Activations matter next to parameters.
MODEL = Model(num_stages=4, leaves_per_stage=8, width=64, rows=64, num_microbatches=8)
DEVICES_PER_STAGE = 2


def measure_all() -> list[dict[str, Any]]:
    """A row per schedule and mesh."""
    rows = []
    for schedule in SCHEDULES:
        parallel = alpa_lite.parallelize(
            MODEL.step, method=MODEL.method(DEVICES_PER_STAGE, schedule)
        )
        state, batch = MODEL.init(), MODEL.batch()
        executable = parallel.compile(state, batch)
        state, _ = executable(state, batch)
        measured = peak_live_bytes(executable, jax.tree.leaves((state, batch)))
        del state
        sizes = stage_bytes(executable)
        memory = memory_over_time(executable.pipeline.timeline, sizes)
        for mesh, (found, expected) in enumerate(zip(measured, memory, strict=True)):
            rows.append(
                {
                    "schedule": schedule,
                    "mesh": mesh,
                    "in_flight": executable.plan.stages[mesh].in_flight,
                    "measured_kib": found / 1024,
                    "predicted_kib": expected.peak_bytes / 1024,
                    "ratio": found / expected.peak_bytes,
                    "planned_kib": executable.plan.stages[mesh].peak_bytes / 1024,
                }
            )
    return rows


def peak_live_bytes(executable: PipelineExecutable, leaves: list[Any]) -> list[int]:
    """Per mesh, the largest sum of all live arrays on one of its devices after any instruction.

    Arrays that are alive before the step and are not its own do not count.
    """
    own = {id(x) for x in (*leaves, *(x for _, x in executable.indices))}
    others = {id(x): x for x in jax.live_arrays() if id(x) not in own}
    first = [mesh.devices.flat[0] for mesh in executable.meshes]
    peaks = [0] * len(first)
    slots = executable.enter(leaves)
    for each in executable.program.instructions:
        execute(each, slots)
        in_use: Counter[jax.Device] = Counter()
        for x in jax.live_arrays():
            if id(x) not in others:
                size = bytes_per_device(x.shape, x.dtype, x.sharding)
                in_use.update(dict.fromkeys(x.sharding.device_set, size))
        peaks = [max(peak, in_use[device]) for peak, device in zip(peaks, first, strict=True)]
    jax.block_until_ready(executable.leave(slots))
    return peaks


def stage_bytes(executable: PipelineExecutable) -> StageBytes:
    """What the simulator needs to know, from the types of the compiled programs.

    A stage keeps for a microbatch what its forward reads or makes and its backward is the last to
    read. What is there before the first task is there at all times, rows of the batch among it;
    those that a forward is the last to read make room for what it keeps.
    """
    program = executable.program
    size = [bytes_per_device(aval.shape, aval.dtype, s) for aval, s in program.types]
    tasks = {i.task: i for i in program.instructions if i.task is not None}
    rows = {slot for *_, slot in program.rows}
    num = len(executable.stages)
    kept = []
    for stage in range(num):
        forward, backward = (tasks[Task(kind, stage, 0)] for kind in (FORWARD, BACKWARD))
        read_again = set(backward.frees) & ({*forward.reads, *forward.writes} - rows)
        read_once = set(forward.frees) & rows
        kept.append(sum(size[s] for s in read_again) - sum(size[s] for s in read_once))
    there, back = [0] * (num - 1), [0] * (num - 1)
    latest: dict[int, Task | None] = {}
    for each in program.instructions:
        if each.target == each.mesh:
            latest[each.mesh] = each.task
            continue
        task = latest.get(each.mesh)
        if task is not None and task.microbatch == 0 and task.kind == FORWARD:
            there[task.stage] += size[each.writes[0]]
        elif task is not None and task.microbatch == 0:
            back[task.stage - 1] += size[each.writes[0]]
    resident = _before_the_first_task(executable, size)
    return StageBytes(
        resident_bytes=tuple(resident[m] for m in range(num)), activation_bytes=tuple(kept),
        forward_transfer_bytes=tuple(there), backward_transfer_bytes=tuple(back),
    )  # fmt: skip


def _before_the_first_task(executable: PipelineExecutable, size: list[int]) -> Mapping[int, int]:
    """Bytes per mesh of what is there when everything is prepared."""
    program = executable.program
    mesh_of = {
        device: stage.mesh
        for stage, mesh in zip(executable.plan.stages, executable.meshes, strict=True)
        for device in mesh.devices.flat
    }
    filled = {
        *program.state.values(),
        *(slot for *_, slot in (*program.arguments, *program.rows, *program.indices)),
    }
    for each in program.instructions:
        if each.task is not None:
            break
        filled = filled - set(each.frees) | set(each.writes)
    found: Counter[int] = Counter()
    for slot in filled:
        sharding = program.types[slot][1]
        found[mesh_of[next(iter(sharding.device_set))]] += size[slot]
    return found


TITLE = (
    "Peak of live arrays on a device of each mesh, sampled after every instruction, against "
    f"`memory_over_time`; {MODEL.num_stages} stages on {DEVICES_PER_STAGE} devices each, "
    f"{MODEL.num_microbatches} microbatches"
)
COLUMNS = (
    Column("schedule", "Schedule"),
    Column("mesh", "Mesh", "d"),
    Column("in_flight", "In flight", "d"),
    Column("measured_kib", "Measured KiB", ".0f"),
    Column("predicted_kib", "Predicted KiB", ".0f"),
    Column("ratio", "Measured / predicted", ".3f"),
    Column("planned_kib", "Planned with temporaries KiB", ".0f"),
)
