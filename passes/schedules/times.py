"""How long the parts of a pipelined step take: what the simulator is given."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .task import BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD, KINDS, Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskTimes:
    """Seconds of one microbatch's tasks and transfers, and of the end of the step.

    An empty tuple stands for zeros, except that every kind of task that occurs needs its times.

    Attributes:
      forward_s: per stage.
      backward_s: per stage, the whole backward.
      backward_input_s: per stage.
      backward_weight_s: per stage.
      forward_transfer_s: [i] is the activation from stage i to stage i + 1, if they are on
        different meshes.
      backward_transfer_s: [i] is the gradient from stage i + 1 to stage i.
      tail_s: per mesh, once per step.
    """

    forward_s: tuple[float, ...] = ()
    backward_s: tuple[float, ...] = ()
    backward_input_s: tuple[float, ...] = ()
    backward_weight_s: tuple[float, ...] = ()
    forward_transfer_s: tuple[float, ...] = ()
    backward_transfer_s: tuple[float, ...] = ()
    tail_s: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            for seconds in getattr(self, name):
                if not (math.isfinite(seconds) and seconds >= 0):
                    raise ValueError(f"{name} must be finite and not negative, found {seconds!r}")

    def of_kind(self, kind: str) -> tuple[float, ...]:
        """Per stage, the seconds of one kind of task."""
        return {
            FORWARD: self.forward_s,
            BACKWARD: self.backward_s,
            BACKWARD_INPUT: self.backward_input_s,
            BACKWARD_WEIGHT: self.backward_weight_s,
        }[kind]


def equal_times(
    num_stages: int,
    *,
    forward_s: float = 1.0,
    backward_input_s: float = 1.0,
    backward_weight_s: float = 1.0,
    backward_s: float | None = None,
    transfer_s: float = 0.0,
) -> TaskTimes:
    """Times of equal stages; a whole backward takes as long as its halves unless said otherwise."""
    whole = backward_input_s + backward_weight_s if backward_s is None else backward_s
    return TaskTimes(
        forward_s=(forward_s,) * num_stages,
        backward_s=(whole,) * num_stages,
        backward_input_s=(backward_input_s,) * num_stages,
        backward_weight_s=(backward_weight_s,) * num_stages,
        forward_transfer_s=(transfer_s,) * (num_stages - 1),
        backward_transfer_s=(transfer_s,) * (num_stages - 1),
    )


def check_times(schedule: Schedule, times: TaskTimes) -> None:
    """Refuse times that do not fit.

    Raises:
      ValueError: a tuple is not as long as the schedule has stages, boundaries or meshes; or a kind
        of task that occurs has no times.
    """
    stages, used = schedule.num_stages, {task.kind for tasks in schedule.tasks for task in tasks}
    wanted = [(kind + "_s", times.of_kind(kind), stages, kind in used) for kind in KINDS]
    wanted += [
        ("forward_transfer_s", times.forward_transfer_s, stages - 1, False),
        ("backward_transfer_s", times.backward_transfer_s, stages - 1, False),
        ("tail_s", times.tail_s, schedule.num_meshes, False),
    ]
    for name, seconds, length, needed in wanted:
        if len(seconds) != length and (seconds or needed):
            raise ValueError(
                f"{name} has {len(seconds)} entries, but the schedule {schedule.name!r} with "
                f"{stages} stages on {schedule.num_meshes} meshes needs {length}"
            )
