"""Says why a schedule cannot go on: which meshes wait for each other, with what, for what."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import ScheduleError
from .task import BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD, Schedule, Task


def raise_deadlock(schedule: Schedule, done: Sequence[int]) -> None:
    """Follow the waiting from mesh to mesh until it closes.

    Args:
      schedule: a schedule that cannot go on.
      done: per mesh, how many tasks have run.

    Raises:
      ScheduleError: always.
    """
    place = {
        task: (mesh, index)
        for mesh, tasks in enumerate(schedule.tasks)
        for index, task in enumerate(tasks)
    }
    mesh = next(m for m, tasks in enumerate(schedule.tasks) if done[m] < len(tasks))
    seen: dict[int, str] = {}
    while mesh not in seen:
        task = schedule.tasks[mesh][done[mesh]]
        needs = next((maker for maker in _makers(schedule, task) if maker in place), None)
        if needs is None:
            raise ScheduleError(
                f"mesh {mesh} waits at position {done[mesh]} with the {task} for a result that no "
                "task makes; every stage before it must run forward, and after it backward, on "
                "that microbatch",
                mesh=mesh,
                position=done[mesh],
            )
        at_mesh, at_index = place[needs]
        seen[mesh] = (
            f"mesh {mesh} waits at position {done[mesh]} with the {task} for the {needs}, "
            f"position {at_index} of mesh {at_mesh}"
        )
        mesh = at_mesh
    cycle = list(seen)[list(seen).index(mesh) :]
    raise ScheduleError(
        "the schedule deadlocks: " + "; ".join(seen[each] for each in cycle),
        mesh=mesh,
        position=done[mesh],
    )


def _makers(schedule: Schedule, task: Task) -> list[Task]:
    """The tasks that may make what a task waits for; a schedule has one of them."""
    stage, microbatch = task.stage, task.microbatch
    if task.kind == FORWARD:
        return [Task(FORWARD, stage - 1, microbatch)]
    if task.kind == BACKWARD_WEIGHT:
        return [Task(BACKWARD_INPUT, stage, microbatch)]
    if stage == schedule.num_stages - 1:
        return [Task(FORWARD, stage, microbatch)]
    return [Task(kind, stage + 1, microbatch) for kind in (BACKWARD, BACKWARD_INPUT)]
