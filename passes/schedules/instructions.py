"""Sends and receives put between the tasks, in an order in which no mesh can block another.

In: a schedule, and a timeline for its order. Out: per mesh, a list of tasks, `Send`s and
`Receive`s. What a runtime adds is when to free what, see `dependencies.releases`.

All lists are taken from one global order of events: a task when it starts, a transfer when the task
that makes the result ends. A mesh's list is what concerns it, in that order. So each pair of meshes
agrees on the order of its transfers, in both directions together, and even where a send lasts until
it is received there is always something that can go ahead: the first event that is not done.
Receiving right before use would not do: in a V, say, a mesh may use a gradient sooner than an
activation that was sent before it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence, Set
from dataclasses import dataclass

from .dependencies import Transfer, dependencies, transfers
from .errors import ScheduleError
from .simulate import Timeline
from .task import Schedule, Task


@dataclass(frozen=True, slots=True)
class Send:
    """Give a task's result to another mesh.

    Attributes:
      producer: the task.
      target: the mesh.
    """

    producer: Task
    target: int

    def __str__(self) -> str:
        return f"send of the {self.producer} to mesh {self.target}"


@dataclass(frozen=True, slots=True)
class Receive:
    """Take a task's result from another mesh.

    Attributes:
      producer: the task.
      source: the mesh it ran on.
    """

    producer: Task
    source: int

    def __str__(self) -> str:
        return f"receive of the {self.producer} from mesh {self.source}"


Instruction = Task | Send | Receive


def global_order(timeline: Timeline) -> tuple[Task, ...]:
    """All tasks by when they start, none before one that it depends on."""
    keyed = [
        (start_s, number, task)
        for tasks, starts, numbers in zip(
            timeline.schedule.tasks, timeline.start_s, timeline.sequence, strict=True
        )
        for task, start_s, number in zip(tasks, starts, numbers, strict=True)
    ]
    keyed.sort(key=_by_time)
    return tuple(task for _, _, task in keyed)


def instruction_lists(timeline: Timeline) -> tuple[tuple[Instruction, ...], ...]:
    """Per mesh, its tasks with the sends and receives between them; sends right after compute.

    Args:
      timeline: its schedule is what is put into instructions; its times decide the global order.
    """
    schedule = timeline.schedule
    sent = transfers(schedule)
    events: list[tuple[float, int, Task | Transfer]] = []
    for mesh, tasks in enumerate(schedule.tasks):
        for index, task in enumerate(tasks):
            number = 2 * timeline.sequence[mesh][index]
            events.append((timeline.start_s[mesh][index], number, task))
            if task in sent:
                # Before the next task of the mesh; after this one, even if it takes no time.
                events.append((timeline.end_s[mesh][index], number + 1, sent[task]))
    events.sort(key=_by_time)
    lists: list[list[Instruction]] = [[] for _ in schedule.tasks]
    for _, _, event in events:
        if isinstance(event, Task):
            lists[schedule.mesh_of(event.stage, event.microbatch)].append(event)
        else:
            lists[event.source].append(Send(event.producer, event.target))
            lists[event.target].append(Receive(event.producer, event.source))
    return tuple(map(tuple, lists))


def _by_time(event: tuple[float, int, object]) -> tuple[float, int]:
    return event[:2]


def verify_instructions(
    schedule: Schedule,
    lists: Sequence[Sequence[Instruction]],
    *,
    buffered_sends: bool = False,
) -> None:
    """Run instruction lists on paper.

    Every mesh runs its list in order. A task needs its inputs to be made, or received, on its mesh
    before it. The sends from one mesh to another, and the receives there, are matched in order.

    Args:
      schedule: what the lists should carry out.
      lists: per mesh.
      buffered_sends: whether a mesh goes on at once after a send. If not, a send and its receive
        happen together, when both are next on their meshes: the strictest meaning they can have.

    Raises:
      ScheduleError: a task of the schedule is missing, additional or out of order; something is
        used or sent before it is there; a mesh would receive something else than is sent to it; or
        the lists deadlock.
    """
    _check_same_tasks(schedule, lists)
    needs = dependencies(schedule)
    held: list[set[Task]] = [set() for _ in lists]
    posted: dict[tuple[int, int], deque[tuple[int, Send]]] = {}
    done = [0] * len(lists)
    in_send = [False] * len(lists)
    ready = list(range(len(lists)))
    while ready:
        mesh = ready.pop()
        while done[mesh] < len(lists[mesh]) and not in_send[mesh]:
            at = done[mesh]
            here = lists[mesh][at]
            if isinstance(here, Receive):
                sends = posted.get((here.source, mesh))
                if not sends:
                    break
                _check_match(mesh, at, here, *sends.popleft())
                held[mesh].add(here.producer)
                if not buffered_sends:
                    in_send[here.source] = False
                    done[here.source] += 1
                    ready.append(here.source)
            else:
                inputs = needs[here] if isinstance(here, Task) else (here.producer,)
                _check_held(mesh, at, here, inputs, held[mesh])
                if isinstance(here, Task):
                    held[mesh].add(here)
                else:
                    posted.setdefault((mesh, here.target), deque()).append((at, here))
                    ready.append(here.target)
                    if not buffered_sends:
                        in_send[mesh] = True
                        break
            done[mesh] += 1
    stuck = [mesh for mesh in range(len(lists)) if done[mesh] < len(lists[mesh])]
    if stuck:
        where = "; ".join(
            f"mesh {mesh} at instruction {done[mesh]}, the {lists[mesh][done[mesh]]}"
            for mesh in stuck
        )
        raise ScheduleError(
            "the instructions deadlock, each send or receive waits for another mesh to come to "
            f"its side of it: {where}",
            mesh=stuck[0],
            position=done[stuck[0]],
        )
    for (mesh, _), sends in posted.items():
        for at, send in sends:
            raise ScheduleError(
                f"instruction {at} of mesh {mesh}, the {send}, is received nowhere",
                mesh=mesh,
                position=at,
            )


def _check_held(
    mesh: int, at: int, here: Task | Send, inputs: Sequence[Task], held: Set[Task]
) -> None:
    """A mesh has what it uses.

    Raises:
      ScheduleError: it has not.
    """
    for each in inputs:
        if each not in held:
            raise ScheduleError(
                f"instruction {at} of mesh {mesh}, the {here}, needs the result of the {each}, "
                "which this mesh has neither made nor received before",
                mesh=mesh,
                position=at,
            )


def _check_match(mesh: int, at: int, receive: Receive, send_at: int, send: Send) -> None:
    """What is received is what is sent.

    Raises:
      ScheduleError: it is not.
    """
    if receive.producer != send.producer:
        raise ScheduleError(
            "the sends from one mesh to another and the receives there are matched in order, but "
            f"instruction {at} of mesh {mesh} is the {receive}, and what comes next is instruction "
            f"{send_at} of mesh {receive.source}, the {send}",
            mesh=mesh,
            position=at,
        )


def _check_same_tasks(schedule: Schedule, lists: Sequence[Sequence[Instruction]]) -> None:
    """Refuse lists of other tasks, or in another order.

    Raises:
      ScheduleError: see `verify_instructions`.
    """
    if len(lists) != schedule.num_meshes:
        raise ScheduleError(
            f"the schedule has {schedule.num_meshes} meshes, found {len(lists)} instruction lists"
        )
    for mesh, instructions in enumerate(lists):
        found = tuple(each for each in instructions if isinstance(each, Task))
        wanted = schedule.tasks[mesh]
        if found != wanted:
            at = next(
                (i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b),
                min(len(found), len(wanted)),
            )
            sides = [str(each[at]) if at < len(each) else "no more" for each in (wanted, found)]
            raise ScheduleError(
                f"the tasks among the instructions of mesh {mesh} must be those of the schedule in "
                f"its order; task {at} should be: {sides[0]}; found: {sides[1]}",
                mesh=mesh,
                position=at,
            )
