"""How many activations a mesh holds at once: counted, and what theory says of each schedule.

In flight is a stage's run on a microbatch from its forward to its backward, or to the input part
of it. A schedule of stages half as large may thus have twice as many in flight in the same bytes.
"""

from __future__ import annotations

from . import interleaved
from .dependencies import input_gradients
from .task import BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD, Schedule


def max_in_flight(schedule: Schedule, *, until_weight: bool = False) -> tuple[int, ...]:
    """Per mesh, the most activations in flight; known from the order of tasks alone.

    Args:
      schedule: any. Where it has no backward, a forward holds its activation while it runs.
      until_weight: count up to the weight part instead, thus also what is kept for it.
    """
    ends = (BACKWARD, BACKWARD_WEIGHT if until_weight else BACKWARD_INPUT)
    has_backward = input_gradients(schedule)
    found = []
    for tasks in schedule.tasks:
        now = most = 0
        for task in tasks:
            if task.kind == FORWARD:
                now += 1
                most = max(most, now)
                now -= (task.stage, task.microbatch) not in has_backward
            elif task.kind in ends:
                now -= 1
        found.append(most)
    return tuple(found)


def gpipe_in_flight(num_meshes: int, num_microbatches: int) -> tuple[int, ...]:
    """All microbatches (Huang et al. 2019, arXiv 1811.06965, section 2.3)."""
    return (num_microbatches,) * num_meshes


def one_f_one_b_in_flight(num_meshes: int, num_microbatches: int) -> tuple[int, ...]:
    """As many as meshes from here on; also of ZB-H1 (Qi et al. 2023, arXiv 2401.10241, 2.1)."""
    return tuple(min(num_meshes - mesh, num_microbatches) for mesh in range(num_meshes))


def eager_1f1b_in_flight(num_meshes: int, num_microbatches: int) -> tuple[int, ...]:
    """About twice those of 1F1B (Zhuang et al. 2022, arXiv 2211.05322, section 4)."""
    return tuple(min(2 * (num_meshes - mesh) - 1, num_microbatches) for mesh in range(num_meshes))


def interleaved_in_flight(
    num_meshes: int, num_microbatches: int, num_virtual: int
) -> tuple[int, ...]:
    """The warm-up, at most all there are.

    With groups of `num_meshes`, the first mesh has `S v + S - 1` activations of 1 / v of a mesh's
    layers, hence `1 + (S - 1) / (S v)` times those of 1F1B (Korthikanti et al. 2022, arXiv
    2205.05198, section 4.2.3).
    """
    return tuple(
        min(
            interleaved.warm_up(num_meshes, num_microbatches, num_virtual, mesh),
            num_virtual * num_microbatches,
        )
        for mesh in range(num_meshes)
    )


def zbv_in_flight(num_meshes: int, num_microbatches: int) -> tuple[int, ...]:
    """`2 num_meshes` half-size stages once the V is full, on every mesh.

    That is as much as on the first mesh of 1F1B (Qi et al. 2023, arXiv 2401.10241, section 6). The
    first summand counts the way down, the second the way up.
    """
    return tuple(
        min(2 * num_meshes - 1 - mesh, num_microbatches) + min(mesh + 1, num_microbatches)
        for mesh in range(num_meshes)
    )


def dualpipev_in_flight(num_meshes: int, num_microbatches: int) -> tuple[int, ...]:
    """`2 num_meshes + 1`, one more than ZB-V (table in github.com/deepseek-ai/DualPipe)."""
    return tuple(
        min(2 * num_meshes - mesh, num_microbatches) + min(mesh + 1, num_microbatches)
        for mesh in range(num_meshes)
    )


def dualpipe_in_flight(num_meshes: int, num_microbatches: int) -> tuple[int, ...]:
    """`num_meshes + 1` (DeepSeek-AI 2024, arXiv 2412.19437, table 2)."""
    half = dualpipev_in_flight(num_meshes // 2, num_microbatches // 2)
    return half + half[::-1]


def chimera_in_flight(num_meshes: int, num_microbatches: int) -> tuple[int, ...]:
    """From `D / 2 + 1` at the ends to `D` in the middle (Li and Hoefler 2021, table 2).

    The two directions, each 1F1B with the microbatches of one unit.
    """
    each_way = min(num_meshes, num_microbatches) // 2
    return tuple(
        min(num_meshes - mesh, each_way) + min(mesh + 1, each_way) for mesh in range(num_meshes)
    )


def inference_in_flight(num_meshes: int, num_microbatches: int) -> tuple[int, ...]:
    """One, the running one."""
    return (min(1, num_microbatches),) * num_meshes
