"""1F1B: as soon as a mesh can, it alternates one forward with one backward.

The number of forwards before the first backward (the warm-up) is what the two forms differ in, and
it is also the number of microbatches in flight:

    1f1b        num_meshes - mesh              the fewest that keep the pipeline full
    eager_1f1b  2 (num_meshes - mesh) - 1      a sent activation has a round of time to arrive

    mesh 0   F0 F1 F2 B0 F3 B1 B2 B3        1f1b, 3 meshes, 4 microbatches
    mesh 1   F0 F1 B0 F2 B1 F3 B2 B3
    mesh 2   F0 B0 F1 B1 F2 B2 F3 B3

1F1B with a flush: Fan et al. 2021 (DAPPLE, arXiv 2007.01045); Narayanan et al. 2021 (arXiv
2104.04473, section 2.2). Eager: Zhuang et al. 2022 (arXiv 2211.05322, section 4).
"""

from __future__ import annotations

from .placement import straight
from .task import BACKWARD, FORWARD, Schedule, Task


def make_1f1b(num_meshes: int, num_microbatches: int) -> Schedule:
    """1F1B with the least memory."""
    warm_up = [num_meshes - mesh for mesh in range(num_meshes)]
    return _make("1f1b", warm_up, num_microbatches)


def make_eager_1f1b(num_meshes: int, num_microbatches: int) -> Schedule:
    """1F1B with a longer warm-up, so that transfers run while the meshes compute."""
    warm_up = [2 * (num_meshes - mesh) - 1 for mesh in range(num_meshes)]
    return _make("eager_1f1b", warm_up, num_microbatches)


def _make(name: str, warm_up: list[int], num_microbatches: int) -> Schedule:
    tasks = tuple(
        one_forward_one_backward(
            [Task(FORWARD, stage, microbatch) for microbatch in range(num_microbatches)],
            [Task(BACKWARD, stage, microbatch) for microbatch in range(num_microbatches)],
            forwards_first,
        )
        for stage, forwards_first in enumerate(warm_up)
    )
    return Schedule(name, (straight(len(warm_up)),), (0,) * num_microbatches, tasks)


def one_forward_one_backward(
    forwards: list[Task], backwards: list[Task], warm_up: int
) -> tuple[Task, ...]:
    """`warm_up` forwards, then a backward and a forward in turn until both lists are used up.

    Args:
      forwards: in order.
      backwards: in order, as many.
      warm_up: at least 1; more than there are forwards means all of them.
    """
    tasks = forwards[:warm_up]
    following = iter(forwards[warm_up:])
    for backward in backwards:
        tasks.append(backward)
        tasks.extend(task for task in [next(following, None)] if task is not None)
    return tuple(tasks)
