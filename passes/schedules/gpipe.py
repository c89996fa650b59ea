"""GPipe: all forwards, then all backwards (Huang et al. 2019, arXiv 1811.06965, section 2.3).

The baseline of the other schedules:

    mesh 0   F0 F1 F2 .  .  B0 B1 B2        2 meshes, 3 microbatches, F and B equally long
    mesh 1   .  F0 F1 F2 B0 B1 B2 .
"""

from __future__ import annotations

from .placement import straight
from .task import BACKWARD, FORWARD, Schedule, Task


def make_gpipe(num_meshes: int, num_microbatches: int) -> Schedule:
    """The shortest lists and the most memory: every mesh keeps all microbatches in flight."""
    tasks = tuple(
        tuple(
            Task(kind, stage, microbatch)
            for kind in (FORWARD, BACKWARD)
            for microbatch in range(num_microbatches)
        )
        for stage in range(num_meshes)
    )
    return Schedule("gpipe", (straight(num_meshes),), (0,) * num_microbatches, tasks)
