"""Forwards only: every mesh runs its stage on one microbatch after the other."""

from __future__ import annotations

from .placement import straight
from .task import FORWARD, Schedule, Task


def make_inference(num_meshes: int, num_microbatches: int) -> Schedule:
    """The forward half of `gpipe`; a mesh keeps nothing once it has sent its output on."""
    tasks = tuple(
        tuple(Task(FORWARD, stage, microbatch) for microbatch in range(num_microbatches))
        for stage in range(num_meshes)
    )
    return Schedule("inference", (straight(num_meshes),), (0,) * num_microbatches, tasks)
