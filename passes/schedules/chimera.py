"""Chimera: two 1F1B pipelines in opposite directions; each fills the other's bubbles.

Li and Hoefler 2021 (arXiv 2107.06925, section 3.1; several units one after the other: section 3.5).
Every mesh holds two stages, hence every stage has two copies. Half of the microbatches enter at the
first mesh (down), half at the last (up). With 4 meshes and microbatches, 0 and 2 down, 1 and 3 up:

    mesh 0   0F0 .   0F2 3F1 3B1 3F3 3B3 0B0 .   0B2          (stage, task, microbatch)
    mesh 1   .   1F0 2F1 1F2 2F3 2B1 1B0 2B3 1B2 .
    mesh 2   .   1F1 2F0 1F3 2F2 2B0 1B1 2B2 1B3 .
    mesh 3   0F1 .   0F3 3F0 3B0 3F2 3B2 0B1 .   0B3

In slots of one task, microbatch `i` of its direction reaches stage `s` at slot `s + 2 i` and, going
back, at slot `2 D - 1 - s + 2 i`, for D meshes. No two tasks of a mesh meet in a slot, and D
microbatches (a unit) tile 2 D slots without a gap, so the next unit starts 2 D slots later.
"""

from __future__ import annotations

from .placement import reverse, straight
from .task import BACKWARD, FORWARD, Schedule, Task, check_counts


def make_chimera(num_meshes: int, num_microbatches: int) -> Schedule:
    """Chimera with direct concatenation of units, for equally long forwards and backwards.

    Args:
      num_meshes: even, or the directions would meet in the middle.
      num_microbatches: even, half for each direction; best a multiple of `num_meshes`.

    Raises:
      ValueError: one of them is odd.
    """
    check_counts("chimera", {"meshes": num_meshes, "microbatches": num_microbatches}, even=True)
    placements = (straight(num_meshes), reverse(num_meshes))
    pipeline_of = tuple(microbatch % 2 for microbatch in range(num_microbatches))
    slots: list[dict[int, Task]] = [{} for _ in range(num_meshes)]
    for microbatch, pipeline in enumerate(pipeline_of):
        unit, index = divmod(microbatch, num_meshes)
        start = 2 * num_meshes * unit + 2 * (index // 2)
        for stage, mesh in enumerate(placements[pipeline]):
            slots[mesh][start + stage] = Task(FORWARD, stage, microbatch)
            back = start + 2 * num_meshes - 1 - stage
            slots[mesh][back] = Task(BACKWARD, stage, microbatch)
    tasks = tuple(tuple(by_slot[slot] for slot in sorted(by_slot)) for by_slot in slots)
    return Schedule("chimera", placements, pipeline_of, tasks)
