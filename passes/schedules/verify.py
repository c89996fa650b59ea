"""The one check of a schedule: that it can run, and that it is what theory says of its name."""

from __future__ import annotations

import math

from .errors import ScheduleError
from .in_flight import max_in_flight
from .instructions import instruction_lists, verify_instructions
from .registry import SCHEDULES, check_shape
from .simulate import Timeline, simulate
from .task import BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD, KINDS, Schedule, Task
from .times import equal_times


def verify_schedule(schedule: Schedule) -> None:
    """Check a schedule of any origin.

    1. Every stage runs every microbatch once, on the mesh that holds it: a forward, and either a
       whole backward, or both halves of it, or (if no task of the schedule is a backward) none.
    2. No task waits for itself through the order of the lists and its inputs.
    3. Neither do sends and receives, when each pair of meshes matches them in order.
    4. If its name is in `SCHEDULES`: activations in flight, and with equal stages the bubble
       share, are those of the closed forms. A schedule of another name is not held to any.

    Raises:
      ScheduleError: with the task, mesh and position at fault.
    """
    _check_tasks(schedule)
    whole_backward_s = 2.0
    if schedule.name in SCHEDULES:
        whole_backward_s = SCHEDULES[schedule.name].whole_backward_s
    # Whatever the times are: a schedule that deadlocks with some deadlocks with all.
    times = equal_times(schedule.num_stages, backward_s=whole_backward_s)
    timeline = simulate(schedule, times)
    verify_instructions(schedule, instruction_lists(timeline))
    if schedule.name in SCHEDULES:
        _check_theory(schedule, timeline)


def _check_tasks(schedule: Schedule) -> None:
    """Each task once, where it belongs.

    Raises:
      ScheduleError: see `verify_schedule`.
    """
    place: dict[Task, tuple[int, int]] = {}
    for mesh, tasks in enumerate(schedule.tasks):
        for index, task in enumerate(tasks):
            problem = _problem(schedule, task, mesh)
            if not problem and task in place:
                problem = "is there already, at position {1} of mesh {0}".format(*place[task])
            if problem:
                raise ScheduleError(
                    f"position {index} of mesh {mesh}: the {task} {problem}",
                    mesh=mesh,
                    position=index,
                )
            place[task] = mesh, index
    trains = any(task.kind != FORWARD for task in place)
    for stage in range(schedule.num_stages):
        for microbatch in range(schedule.num_microbatches):
            has = [kind for kind in KINDS if Task(kind, stage, microbatch) in place]
            if has in ([FORWARD, BACKWARD], [FORWARD, BACKWARD_INPUT, BACKWARD_WEIGHT]):
                continue
            if has == [FORWARD] and not trains:
                continue
            mesh = schedule.mesh_of(stage, microbatch)
            raise ScheduleError(
                f"mesh {mesh} must run stage {stage} on microbatch {microbatch} as forward and "
                "backward, or as forward, backward_input and backward_weight"
                + ("" if trains else ", or everything as forward only")
                + f"; found {', '.join(has) if has else 'nothing'}",
                mesh=mesh,
            )


def _problem(schedule: Schedule, task: Task, mesh: int) -> str:
    """What is wrong with a task of a mesh by itself; nothing if all is well."""
    if task.kind not in KINDS:
        return f"is of no known kind; kinds are {', '.join(KINDS)}"
    if not 0 <= task.stage < schedule.num_stages:
        return f"is of no stage of the schedule, which has {schedule.num_stages}"
    if not 0 <= task.microbatch < schedule.num_microbatches:
        return f"is of no microbatch of the schedule, which has {schedule.num_microbatches}"
    belongs = schedule.mesh_of(task.stage, task.microbatch)
    if belongs != mesh:
        return f"belongs on mesh {belongs}, where the microbatch's pipeline has that stage"
    return ""


def _check_theory(schedule: Schedule, timeline: Timeline) -> None:
    """Compare with the closed forms of the schedule's name.

    Raises:
      ScheduleError: they differ.
    """
    name, family = schedule.name, SCHEDULES[schedule.name]
    advice = "give it another name if it is meant to be another schedule"
    num_virtual, rest = divmod(schedule.num_stages, schedule.num_meshes)
    shape = schedule.num_meshes, schedule.num_microbatches, num_virtual
    if rest:
        raise ScheduleError(
            f"{name} has as many stages on every mesh, found {schedule.num_stages} stages on "
            f"{schedule.num_meshes} meshes; {advice}"
        )
    try:
        check_shape(name, *shape)
    except ValueError as error:
        raise ScheduleError(f"this is no {name}, {advice}: {error}") from None
    what = "{} with {} meshes, {} microbatches and {} stage(s) per mesh".format(name, *shape)
    counted, expected = max_in_flight(schedule), family.in_flight(*shape)
    for mesh, (found, wanted) in enumerate(zip(counted, expected, strict=True)):
        if found != wanted:
            raise ScheduleError(
                f"mesh {mesh} has up to {found} activations in flight, but {what} has {wanted}; "
                f"{advice}",
                mesh=mesh,
            )
    share = family.bubble_share(*shape)
    # Sums of times that are whole numbers, so only the division rounds.
    if share is not None and not math.isclose(timeline.bubble_share, share, abs_tol=1e-12):
        raise ScheduleError(
            f"with equal stages the bubble is {timeline.bubble_share:.6f} of the time, but that of "
            f"{what} is {share:.6f}; {advice}"
        )
