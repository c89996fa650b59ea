"""What follows from the tasks: who waits for whom, who sends to whom, what is kept how long.

    forward(s, m)          needs  forward(s - 1, m)
    backward(s, m)         needs  forward(s, m), and the input gradient of (s + 1, m)
    backward_input(s, m)   needs  the same
    backward_weight(s, m)  needs  backward_input(s, m)

The input gradient of (s, m) comes from `backward` or `backward_input`, whichever the schedule has.
Each function walks all tasks once. They take schedules that `verify.verify_schedule` accepts.
"""

from __future__ import annotations

from dataclasses import dataclass

from .task import BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD, Schedule, Task


@dataclass(frozen=True, slots=True)
class Transfer:
    """An activation or a gradient that goes from one mesh to another.

    Attributes:
      producer: the task whose result it is: a forward sends its output to the next stage, a
        backward (or its input part) the gradient of its input to the stage before.
      consumer: the only task that waits for it.
      source: mesh of the producer.
      target: mesh of the consumer.
    """

    producer: Task
    consumer: Task
    source: int
    target: int


def input_gradients(schedule: Schedule) -> dict[tuple[int, int], Task]:
    """Per (stage, microbatch), the task that makes the gradient of the stage's input."""
    return {
        (task.stage, task.microbatch): task
        for tasks in schedule.tasks
        for task in tasks
        if task.kind in (BACKWARD, BACKWARD_INPUT)
    }


def dependencies(schedule: Schedule) -> dict[Task, tuple[Task, ...]]:
    """Per task, the tasks whose results it reads."""
    gradient = input_gradients(schedule)
    last = schedule.num_stages - 1
    needs: dict[Task, tuple[Task, ...]] = {}
    for tasks in schedule.tasks:
        for task in tasks:
            stage, microbatch = task.stage, task.microbatch
            before: tuple[Task, ...]
            if task.kind == FORWARD:
                before = (Task(FORWARD, stage - 1, microbatch),) if stage else ()
            elif task.kind == BACKWARD_WEIGHT:
                before = (Task(BACKWARD_INPUT, stage, microbatch),)
            else:
                before = (Task(FORWARD, stage, microbatch),)
                if stage < last:
                    before += (gradient[stage + 1, microbatch],)
            needs[task] = before
    return needs


def transfers(schedule: Schedule) -> dict[Task, Transfer]:
    """Per task whose result goes to another mesh, the transfer; it has one consumer at most."""
    gradient = input_gradients(schedule)
    last = schedule.num_stages - 1
    found: dict[Task, Transfer] = {}
    for source, tasks in enumerate(schedule.tasks):
        for task in tasks:
            stage, microbatch = task.stage, task.microbatch
            if task.kind == FORWARD and stage < last:
                consumer = Task(FORWARD, stage + 1, microbatch)
            elif task.kind in (BACKWARD, BACKWARD_INPUT) and stage > 0:
                consumer = gradient[stage - 1, microbatch]
            else:
                continue
            target = schedule.mesh_of(consumer.stage, microbatch)
            if target != source:
                found[task] = Transfer(task, consumer, source, target)
    return found


def releases(schedule: Schedule) -> dict[Task, Task]:
    """Per forward, the last task that reads what it kept for the backward.

    That is `backward`; or `backward_weight`, which still reads a part of it after
    `backward_input` has ended; or, without a backward, the forward itself.
    """
    found = {task: task for tasks in schedule.tasks for task in tasks if task.kind == FORWARD}
    for tasks in schedule.tasks:
        for task in tasks:
            if task.kind in (BACKWARD, BACKWARD_WEIGHT):
                found[Task(FORWARD, task.stage, task.microbatch)] = task
    return found


def programs(schedule: Schedule) -> tuple[frozenset[str], ...]:
    """Per stage, the kinds of task it is run as: the programs a runtime has to compile.

    A stage may be run both ways, with its backward whole for some microbatches and split for
    others (DualPipe does).
    """
    kinds: list[set[str]] = [set() for _ in range(schedule.num_stages)]
    for tasks in schedule.tasks:
        for task in tasks:
            kinds[task.stage].add(task.kind)
    return tuple(frozenset(each) for each in kinds)
