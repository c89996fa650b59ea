"""DualPipe: forwards and backwards side by side, so that one computes while the other communicates.

In the main phase a mesh runs a forward of one stage next to a backward of its other stage. The two
need nothing of each other: a runtime may make one program of them, in which the collectives of
each (the all-to-alls of experts, say) hide behind the arithmetic of the other. In the list they
are neighbours; the simulator prices them one after the other.

`dualpipe` is bidirectional: as in Chimera every stage has two copies (DeepSeek-AI 2024, arXiv
2412.19437, section 3.2.1). Its meshes `m` and `M - 1 - m` mirror each other, and hold the same two
stages. `dualpipev` is the first half alone, as a V: microbatches that would have gone on to
the other half turn around instead, and no parameter has a second copy (Qi et al. 2025, "DualPipe
could be better without the Dual"). Both follow the steps of github.com/deepseek-ai/DualPipe.
"""

from __future__ import annotations

from .placement import reverse, straight, v_shape
from .task import Schedule, Task, check_counts
from .task_list import TaskList


def make_dualpipev(num_meshes: int, num_microbatches: int) -> Schedule:
    """DualPipe-V, two stages per mesh.

    The V is full from `2 num_meshes` microbatches on; with fewer the lists are those of that
    number, less the microbatches that do not exist.
    """
    tasks = tuple(_half(num_meshes, rank, num_microbatches) for rank in range(num_meshes))
    return Schedule("dualpipev", (v_shape(num_meshes),), (0,) * num_microbatches, tasks)


def make_dualpipe(num_meshes: int, num_microbatches: int) -> Schedule:
    """DualPipe, one stage per mesh and direction.

    Args:
      num_meshes: even.
      num_microbatches: even, half for each direction; the pipelines are full from
        `2 num_meshes` on.

    Raises:
      ValueError: one of them is odd.
    """
    check_counts("dualpipe", {"meshes": num_meshes, "microbatches": num_microbatches}, even=True)
    half = num_meshes // 2
    placements = (straight(num_meshes), reverse(num_meshes))
    pipeline_of = tuple(microbatch % 2 for microbatch in range(num_microbatches))
    lists = []
    for mesh in range(num_meshes):
        rank = min(mesh, num_meshes - 1 - mesh)
        # The stages of the near end belong to microbatches that entered at this half's end.
        near = 0 if mesh < half else 1
        lists.append(
            tuple(
                Task(task.kind, task.stage, 2 * task.microbatch + (near ^ (task.stage >= half)))
                for task in _half(half, rank, num_microbatches // 2)
            )
        )
    return Schedule("dualpipe", placements, pipeline_of, tuple(lists))


def _half(num_ranks: int, rank: int, num_microbatches: int) -> tuple[Task, ...]:
    """Tasks of one mesh of the half: its near stage `rank`, and its far one across the V."""
    near, far = rank, 2 * num_ranks - 1 - rank
    full = max(num_microbatches, 2 * num_ranks)
    new = TaskList(full)
    for _ in range(2 * (num_ranks - rank - 1)):
        new.forward(near)
    for _ in range(rank + 1):
        new.forward(near)
        new.forward(far)
    for _ in range(num_ranks - rank - 1):
        new.backward_input(far)
        new.backward_weight()
        new.forward(far)
    for _ in range(full - 2 * num_ranks + rank + 1):  # the main phase
        new.forward(near)
        new.backward(far)
        new.forward(far)
        new.backward(near)
    for _ in range(num_ranks - rank - 1):
        new.backward(far)
        new.forward(far)
        new.backward(near)
    # The forwards are used up. The first half of these backwards is whole, the rest is split.
    for index in range(2 * (rank + 1)):
        stage = near if index % 2 else far
        if index <= rank:
            new.backward(stage)
        else:
            new.backward_input(stage)
    for _ in range(num_ranks - rank - 1):
        new.backward_weight()
        new.backward_input(near)
    for _ in range(rank + 1):
        new.backward_weight()
    return new.below(num_microbatches)
