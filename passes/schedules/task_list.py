"""A mesh's task list while it is being written: the microbatches count themselves."""

from __future__ import annotations

from .task import BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD, Task


class TaskList:
    """Each method adds a stage's next microbatch, or nothing once all have been added.

    >>> new = TaskList(2)
    >>> new.forward(0); new.forward(0); new.forward(0); new.backward_input(0)
    >>> new.backward_weight(0)
    >>> [f"{task.kind} {task.microbatch}" for task in new.tasks]
    ['forward 0', 'forward 1', 'backward_input 0', 'backward_weight 0']
    """

    def __init__(self, num_microbatches: int) -> None:
        self.tasks: list[Task] = []
        self._num_microbatches = num_microbatches
        self._forwards: dict[int, int] = {}
        self._backwards: dict[int, int] = {}
        self._weights: list[Task] = []  # put off, oldest first

    def forward(self, stage: int) -> None:
        """A forward."""
        self._add_next(FORWARD, stage, self._forwards)

    def backward(self, stage: int) -> None:
        """A whole backward."""
        self._add_next(BACKWARD, stage, self._backwards)

    def backward_input(self, stage: int) -> None:
        """The input part of a backward; its weight part is put off."""
        if self._add_next(BACKWARD_INPUT, stage, self._backwards):
            self._weights.append(Task(BACKWARD_WEIGHT, stage, self.tasks[-1].microbatch))

    def backward_weight(self, stage: int | None = None) -> None:
        """The weight part that has been put off longest; of one stage, if given."""
        oldest = next(task for task in self._weights if stage in (None, task.stage))
        self._weights.remove(oldest)
        self.tasks.append(oldest)

    def _add_next(self, kind: str, stage: int, counts: dict[int, int]) -> bool:
        microbatch = counts.get(stage, 0)
        if microbatch == self._num_microbatches:
            return False
        counts[stage] = microbatch + 1
        self.tasks.append(Task(kind, stage, microbatch))
        return True

    def below(self, microbatch: int) -> tuple[Task, ...]:
        """The tasks of the microbatches before one."""
        return tuple(task for task in self.tasks if task.microbatch < microbatch)
