"""Prices a schedule: when every task starts and ends, given how long things take.

In: a `Schedule` and `TaskTimes`. Out: a `Timeline`. Memory over time follows from it, see
`memory.py`.

The model. A mesh runs its list in order, one task at a time, each as soon as the mesh is free and
its inputs are there. A result that another mesh needs is sent when its task ends. Each directed
pair of meshes is a link that carries one transfer at a time, in the order of sending. Transfers
either overlap with compute, or the sender stands still until they are done. After its last task a
mesh spends its tail: gradient synchronisation and update.

No event queue is needed: with fixed lists every time is a maximum of earlier times plus a duration.
Each task is looked at when it runs, and once for each result that reaches its mesh while it waits.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from .deadlock import raise_deadlock
from .task import BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD, KINDS, Schedule, Task
from .times import TaskTimes, check_times


@dataclass(frozen=True, slots=True)
class Timeline:
    """When everything happens, in seconds from the start of the step.

    The four tables are parallel to `schedule.tasks`. A task whose result stays on its mesh, or is
    not needed by any, has `send_start_s` = `send_end_s` = `end_s`.

    Attributes:
      schedule: what was run.
      start_s: per mesh and task.
      end_s: per mesh and task.
      send_start_s: per mesh and task, when the link begins to carry its result.
      send_end_s: per mesh and task, when its result has arrived.
      busy_s: per mesh, seconds in tasks.
      tail_start_s: per mesh, when gradient synchronisation and update begin: after the last task
        of all meshes with which it shares a stage.
      step_s: when the last mesh is done, tails included.
      sequence: per mesh and task, a number; tasks that start together depend on each other only in
        the order of these numbers.
    """

    schedule: Schedule
    start_s: tuple[tuple[float, ...], ...]
    end_s: tuple[tuple[float, ...], ...]
    send_start_s: tuple[tuple[float, ...], ...]
    send_end_s: tuple[tuple[float, ...], ...]
    busy_s: tuple[float, ...]
    tail_start_s: tuple[float, ...]
    step_s: float
    sequence: tuple[tuple[int, ...], ...] = field(repr=False)

    @property
    def makespan_s(self) -> float:
        """End of the last task of any mesh, tails left out."""
        return max((ends[-1] for ends in self.end_s if ends), default=0.0)

    @property
    def bubble_share(self) -> float:
        """Share of mesh-time without a task, from the start of the step to `makespan_s`.

        `1 - sum(busy_s) / (meshes * makespan_s)`: what the closed forms of `bubble.py` give for
        equal stages. Tails do not count; waiting for a transfer does.
        """
        total = len(self.busy_s) * self.makespan_s
        return 1.0 - sum(self.busy_s) / total if total else 0.0

    @property
    def waiting_s(self) -> tuple[float, ...]:
        """Per mesh, seconds without a task between its first and its last one.

        What zero-bubble schedules bring to zero: the slanted ends of the pipeline, which the next
        step can fill if no mesh waits for another in between, are left out.
        """
        return tuple(
            ends[-1] - starts[0] - busy if ends else 0.0
            for starts, ends, busy in zip(self.start_s, self.end_s, self.busy_s, strict=True)
        )

    def _repr_html_(self) -> str:
        """What notebooks show: a track for every mesh."""
        from alpa_lite.passes.html import timeline_snippet

        return timeline_snippet(self)


def simulate(schedule: Schedule, times: TaskTimes, *, overlap_transfers: bool = True) -> Timeline:
    """Run a schedule on paper, in time proportional to the number of tasks.

    Args:
      schedule: what `verify_schedule` accepts.
      times: seconds of its parts.
      overlap_transfers: whether a mesh computes while it sends; if not, it stands still from the
        end of a task until its result has arrived. Receiving never costs the receiver compute.

    Raises:
      ValueError: the times do not fit the schedule.
      ScheduleError: the schedule deadlocks.
    """
    check_times(schedule, times)
    run = _run(schedule, times, overlap_transfers)
    tail_start = _tail_starts(schedule, [ends[-1] if ends else 0.0 for ends in run.end])
    tail = times.tail_s or (0.0,) * schedule.num_meshes
    return Timeline(
        schedule=schedule,
        start_s=tuple(map(tuple, run.start)),
        end_s=tuple(map(tuple, run.end)),
        send_start_s=tuple(map(tuple, run.send_start)),
        send_end_s=tuple(map(tuple, run.send_end)),
        busy_s=tuple(_busy_s(tasks, times) for tasks in schedule.tasks),
        tail_start_s=tail_start,
        step_s=max(start + seconds for start, seconds in zip(tail_start, tail, strict=True)),
        sequence=tuple(map(tuple, run.sequence)),
    )


class _Run:
    """What a simulation fills in: per mesh, in the order of its tasks."""

    def __init__(self, num_meshes: int) -> None:
        self.start: list[list[float]] = [[] for _ in range(num_meshes)]
        self.end: list[list[float]] = [[] for _ in range(num_meshes)]
        self.send_start: list[list[float]] = [[] for _ in range(num_meshes)]
        self.send_end: list[list[float]] = [[] for _ in range(num_meshes)]
        self.sequence: list[list[int]] = [[] for _ in range(num_meshes)]


def _run(schedule: Schedule, times: TaskTimes, overlap: bool) -> _Run:
    """The simulation proper. One loop without calls: a planner runs it for many candidates."""
    placements, pipeline_of = schedule.placements, schedule.pipeline_of
    microbatches, last = schedule.num_microbatches, schedule.num_stages - 1
    seconds = {kind: times.of_kind(kind) for kind in KINDS}
    forward_transfer_s = times.forward_transfer_s or (0.0,) * last
    backward_transfer_s = times.backward_transfer_s or (0.0,) * last
    # When a stage's input, its output's gradient and its input part's result are on its mesh, at
    # [stage * microbatches + microbatch]; None until known.
    unknown: list[float | None] = [None]
    input_s = [0.0] * microbatches + unknown * (last * microbatches)
    gradient_s = unknown * len(input_s)
    stash_s = unknown * len(input_s)
    link_free_s: dict[tuple[int, int], float] = {}
    free_s = [0.0] * schedule.num_meshes
    run = _Run(schedule.num_meshes)
    count = 0
    ready = list(range(schedule.num_meshes))
    waits = [False] * schedule.num_meshes
    while ready:
        mesh = ready.pop()
        tasks, starts, ends = schedule.tasks[mesh], run.start[mesh], run.end[mesh]
        send_starts, send_ends = run.send_start[mesh], run.send_end[mesh]
        for index in range(len(ends), len(tasks)):
            task = tasks[index]
            kind, stage, microbatch = task.kind, task.stage, task.microbatch
            cell = stage * microbatches + microbatch
            if kind == FORWARD:
                ready_s = input_s[cell]
            elif kind == BACKWARD_WEIGHT:
                ready_s = stash_s[cell]
            else:
                ready_s = gradient_s[cell]
            if ready_s is None:
                waits[mesh] = True
                break
            start_s = free_s[mesh]
            if ready_s > start_s:
                start_s = ready_s
            end_s = start_s + seconds[kind][stage]
            free_s[mesh] = end_s
            starts.append(start_s)
            ends.append(end_s)
            run.sequence[mesh].append(count)
            count += 1

            # Where the result goes: which list, which place in it, how far. What nobody waits for
            # is noted as the gradient that this task, or the input part before it, has read.
            to_stage, transfer_s, values = stage, 0.0, gradient_s
            if kind == FORWARD:
                if stage < last:
                    to_stage, transfer_s, values = stage + 1, forward_transfer_s[stage], input_s
            elif kind != BACKWARD_WEIGHT:
                if kind == BACKWARD_INPUT:
                    stash_s[cell] = end_s
                if stage:
                    to_stage, transfer_s = stage - 1, backward_transfer_s[stage - 1]
            target = placements[pipeline_of[microbatch]][to_stage]
            if target == mesh:
                send_start_s = send_end_s = end_s
            else:
                send_start_s = link_free_s.get((mesh, target), 0.0)
                if send_start_s < end_s:
                    send_start_s = end_s
                send_end_s = link_free_s[mesh, target] = send_start_s + transfer_s
                if not overlap:
                    free_s[mesh] = send_end_s
                if waits[target]:
                    waits[target] = False
                    ready.append(target)
            values[to_stage * microbatches + microbatch] = send_end_s
            send_starts.append(send_start_s)
            send_ends.append(send_end_s)
    if count < sum(map(len, schedule.tasks)):
        raise_deadlock(schedule, [len(ends) for ends in run.end])
    return run


def _busy_s(tasks: Sequence[Task], times: TaskTimes) -> float:
    """Seconds of all tasks of a mesh."""
    counts = Counter((task.kind, task.stage) for task in tasks)
    return math.fsum(times.of_kind(kind)[stage] * n for (kind, stage), n in counts.items())


def _tail_starts(schedule: Schedule, end_s: Sequence[float]) -> tuple[float, ...]:
    """Per mesh, when the gradients of all copies of its stages are complete."""
    if len(schedule.placements) == 1:
        return tuple(end_s)
    complete_s = [
        max(end_s[mesh] for mesh in schedule.meshes_of_stage(stage))
        for stage in range(schedule.num_stages)
    ]
    return tuple(
        max((complete_s[stage] for stage in schedule.stages_of_mesh(mesh)), default=end)
        for mesh, end in enumerate(end_s)
    )
