"""Interleaved 1F1B: every mesh holds several smaller stages, so the pipeline fills sooner.

Microbatches go in groups. A mesh runs its first stage on the whole group, then its second stage on
the group, and so on, then turns to the next group; backwards likewise, from its last stage to its
first. Meanwhile the group has gone around all meshes, which takes as many microbatches as meshes.

    mesh 0   0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 2B2 2B3 0B2 0B3    (stage, task)
    mesh 1   1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3

Narayanan et al. 2021 (arXiv 2104.04473, section 2.2.2), who ask for groups of exactly `num_meshes`
microbatches. A smaller group would return too late (a shorter last group even deadlocks), a larger
one only costs memory: so microbatches that do not divide are spread, and each group has
`num_meshes` microbatches or a few more. With fewer microbatches than meshes there is one group.
"""

from __future__ import annotations

from .one_f_one_b import one_forward_one_backward
from .placement import looping
from .task import BACKWARD, FORWARD, Schedule, Task


def make_interleaved_1f1b(num_meshes: int, num_microbatches: int, num_virtual: int) -> Schedule:
    """Interleaved 1F1B; the order of `1f1b` if there is one stage per mesh.

    Args:
      num_meshes: meshes; mesh `m` holds stages `m`, `m + num_meshes`, ...
      num_microbatches: any number.
      num_virtual: stages per mesh.
    """
    forwards, backwards = [], []  # (turn of the mesh's stages, microbatch)
    first = 0
    for size in group_sizes(num_meshes, num_microbatches):
        group = range(first, first + size)
        first += size
        forwards += [(turn, m) for turn in range(num_virtual) for m in group]
        backwards += [(turn, m) for turn in reversed(range(num_virtual)) for m in group]
    tasks = tuple(
        one_forward_one_backward(
            [Task(FORWARD, turn * num_meshes + mesh, m) for turn, m in forwards],
            [Task(BACKWARD, turn * num_meshes + mesh, m) for turn, m in backwards],
            warm_up(num_meshes, num_microbatches, num_virtual, mesh),
        )
        for mesh in range(num_meshes)
    )
    placement = looping(num_meshes, num_virtual)
    return Schedule("interleaved_1f1b", (placement,), (0,) * num_microbatches, tasks)


def group_sizes(num_meshes: int, num_microbatches: int) -> list[int]:
    """Sizes of the groups, the larger ones first: the warm-up is made for the largest.

    >>> group_sizes(4, 8), group_sizes(4, 11), group_sizes(4, 3)
    ([4, 4], [6, 5], [3])
    """
    groups = max(1, num_microbatches // num_meshes)
    size, larger = divmod(num_microbatches, groups)
    return [size + 1] * larger + [size] * (groups - larger)


def warm_up(num_meshes: int, num_microbatches: int, num_virtual: int, mesh: int) -> int:
    """Forwards of a mesh before its first backward.

    All turns but the last of the first group, then two for every mesh between this one and the
    last: the first gradient takes that many rounds of one forward and one backward to come back.
    """
    if num_virtual == 1:
        return num_meshes - mesh
    group = group_sizes(num_meshes, num_microbatches)[0]
    return (num_virtual - 1) * group + 2 * (num_meshes - 1 - mesh) + 1
