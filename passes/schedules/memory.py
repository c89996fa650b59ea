"""Bytes on every mesh over time, from a simulated schedule.

What counts, and from when to when:

    resident    parameters, gradients, optimizer state      the whole step, per copy of a stage
    activation  what a forward keeps for the backward       start of the forward to end of the
                                                            backward, or of its input part
    stash       what the weight part still needs            end of the input part to end of the
                                                            weight part
    workspace   what a task needs only while it runs        start to end of the task
    transfer    a result on its way                         at the sender from the end of the task
                                                            until it has arrived; at the receiver
                                                            from when the link begins to carry it
                                                            until the task that reads it starts

Without a backward an activation is gone when its forward ends. At one moment, what ends makes room
for what starts. The model follows Qi et al. 2023 (arXiv 2401.10241, section 2.3), who count
`M_B` from a forward to the end of its input part, and `M_W` from there to the end of the weight
part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .dependencies import transfers
from .simulate import Timeline
from .task import BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD, Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class StageBytes:
    """Bytes on one device, for one microbatch except `resident_bytes`; an empty tuple is zeros.

    Attributes:
      resident_bytes: per stage.
      activation_bytes: per stage.
      stash_bytes: per stage; of use only where the backward is split.
      workspace_bytes: per stage.
      forward_transfer_bytes: [i] is the activation from stage i to stage i + 1.
      backward_transfer_bytes: [i] is the gradient from stage i + 1 to stage i.
    """

    resident_bytes: tuple[int, ...] = ()
    activation_bytes: tuple[int, ...] = ()
    stash_bytes: tuple[int, ...] = ()
    workspace_bytes: tuple[int, ...] = ()
    forward_transfer_bytes: tuple[int, ...] = ()
    backward_transfer_bytes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class MeshMemory:
    """Bytes in use on a device of one mesh, as a step function.

    Attributes:
      times_s: when it changes, ascending; begins with 0.
      bytes_in_use: from each time to the next.
      peak_bytes: the largest.
      peak_s: when it is first reached.
    """

    times_s: NDArray[np.float64]
    bytes_in_use: NDArray[np.int64]
    peak_bytes: int
    peak_s: float


def memory_over_time(timeline: Timeline, sizes: StageBytes) -> tuple[MeshMemory, ...]:
    """Per mesh, its memory over the step.

    Args:
      timeline: from `simulate`.
      sizes: per stage; see the module.

    Raises:
      ValueError: the sizes do not fit the schedule.
    """
    schedule = timeline.schedule
    sizes = _complete(schedule, sizes)
    changes: list[list[tuple[float, int]]] = [[] for _ in schedule.tasks]
    _add_kept(timeline, sizes, changes)
    _add_transfers(timeline, sizes, changes)
    found = []
    for mesh, each in enumerate(changes):
        resident = sum(sizes.resident_bytes[stage] for stage in schedule.stages_of_mesh(mesh))
        found.append(_step_function([(0.0, resident), *each]))
    return tuple(found)


def _complete(schedule: Schedule, sizes: StageBytes) -> StageBytes:
    """Zeros in the place of empty tuples.

    Raises:
      ValueError: see `memory_over_time`.
    """
    complete = {}
    for name in sizes.__dataclass_fields__:
        length = schedule.num_stages - ("transfer" in name)
        values = getattr(sizes, name) or (0,) * length
        if len(values) != length or any(value < 0 for value in values):
            raise ValueError(
                f"{name} must be {length} byte counts, none negative, for the schedule "
                f"{schedule.name!r} with {schedule.num_stages} stages; found {values!r}"
            )
        complete[name] = values
    return StageBytes(**complete)


def _add_kept(
    timeline: Timeline, sizes: StageBytes, changes: list[list[tuple[float, int]]]
) -> None:
    """What the meshes keep for themselves: activations, stashes, workspace."""
    has_backward = {
        (task.stage, task.microbatch)
        for tasks in timeline.schedule.tasks
        for task in tasks
        if task.kind in (BACKWARD, BACKWARD_INPUT)
    }
    for mesh, tasks in enumerate(timeline.schedule.tasks):
        add = changes[mesh].append
        for task, start_s, end_s in zip(
            tasks, timeline.start_s[mesh], timeline.end_s[mesh], strict=True
        ):
            stage = task.stage
            activation, stash = sizes.activation_bytes[stage], sizes.stash_bytes[stage]
            workspace = sizes.workspace_bytes[stage]
            if workspace:
                add((start_s, workspace))
                add((end_s, -workspace))
            if task.kind == FORWARD:
                add((start_s, activation))
                if (stage, task.microbatch) not in has_backward:
                    add((end_s, -activation))
            elif task.kind == BACKWARD:
                add((end_s, -activation))
            elif task.kind == BACKWARD_INPUT:
                add((end_s, stash - activation))
            elif task.kind == BACKWARD_WEIGHT:
                add((end_s, -stash))


def _add_transfers(
    timeline: Timeline, sizes: StageBytes, changes: list[list[tuple[float, int]]]
) -> None:
    """Results on their way to another mesh."""
    if not any(sizes.forward_transfer_bytes + sizes.backward_transfer_bytes):
        return
    schedule = timeline.schedule
    start_s = {
        task: start
        for tasks, starts in zip(schedule.tasks, timeline.start_s, strict=True)
        for task, start in zip(tasks, starts, strict=True)
    }
    sent = transfers(schedule)
    for mesh, tasks in enumerate(schedule.tasks):
        for index, task in enumerate(tasks):
            transfer = sent.get(task)
            if transfer is None:
                continue
            if task.kind == FORWARD:
                size = sizes.forward_transfer_bytes[task.stage]
            else:
                size = sizes.backward_transfer_bytes[task.stage - 1]
            at_target = changes[transfer.target]
            changes[mesh].append((timeline.end_s[mesh][index], size))
            changes[mesh].append((timeline.send_end_s[mesh][index], -size))
            at_target.append((timeline.send_start_s[mesh][index], size))
            at_target.append((start_s[transfer.consumer], -size))


def _step_function(changes: Sequence[tuple[float, int]]) -> MeshMemory:
    """Sum changes up, all of one moment at once."""
    moments = np.array([moment for moment, _ in changes], np.float64)
    amounts = np.array([amount for _, amount in changes], np.int64)
    times_s, index = np.unique(moments, return_inverse=True)
    sums = np.zeros(len(times_s), np.int64)
    np.add.at(sums, index, amounts)
    changing = sums != 0
    changing[0] = True
    times_s, in_use = times_s[changing], np.cumsum(sums[changing])
    peak = int(np.argmax(in_use))
    return MeshMemory(times_s, in_use, int(in_use[peak]), float(times_s[peak]))
