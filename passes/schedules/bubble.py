"""Closed forms of the bubble share: mesh-time without a task, over meshes times makespan.

All are for equal stages, free transfers, and no tail; `simulate.Timeline.bubble_share` is the same
quantity for any times. M meshes, N microbatches, v stages per mesh. Papers that divide the bubble
by the work instead have `N` where these have `N + M - 1`.

A form that holds from a certain number of microbatches on returns None below it.
"""

from __future__ import annotations


def one_f_one_b_bubble_share(num_meshes: int, num_microbatches: int) -> float:
    """(M - 1) / (N + M - 1): GPipe, 1F1B, eager 1F1B, inference; for any forward and backward time.

    Huang et al. 2019 (arXiv 1811.06965, section 2.3); Narayanan et al. 2021 (arXiv 2104.04473,
    section 2.2.1).
    """
    return (num_meshes - 1) / (num_microbatches + num_meshes - 1)


def interleaved_bubble_share(num_meshes: int, num_microbatches: int, num_virtual: int) -> float:
    """(M - 1) / (v N + M - 1); for any forward and backward time.

    Narayanan et al. 2021 (arXiv 2104.04473, section 2.2.2). Derived here for N < M: every turn but
    the last then also waits M - N slots for its only group to come around.
    """
    idle = num_meshes - 1 + (num_virtual - 1) * max(0, num_meshes - num_microbatches)
    return idle / (num_virtual * num_microbatches + idle)


def zb_h1_bubble_share(
    num_meshes: int,
    num_microbatches: int,
    forward_s: float = 1.0,
    backward_input_s: float = 1.0,
    backward_weight_s: float = 1.0,
) -> float | None:
    """Bubble of (M - 1) (T_F + T_B - T_W), hence (M - 1) / (3 N + M - 1) with equal times.

    Qi et al. 2023 (arXiv 2401.10241, table 2). Holds from N = M on, and if the weight part is the
    shortest: None else, except that with equal times (derived here) a missing microbatch costs
    one slot.
    """
    missing = max(0, num_meshes - num_microbatches)
    longest = max(forward_s, backward_input_s, backward_weight_s)
    if backward_weight_s > min(forward_s, backward_input_s) or (
        missing and backward_weight_s < longest
    ):
        return None
    idle_s = (num_meshes - 1) * (forward_s + backward_input_s - backward_weight_s)
    idle_s += missing * backward_weight_s
    work_s = num_microbatches * (forward_s + backward_input_s + backward_weight_s)
    return idle_s / (work_s + idle_s) if idle_s else 0.0


def v_shape_bubble_share(num_meshes: int, num_microbatches: int, full_from: int) -> float | None:
    """(M - 1) / (6 N + M - 1): ZB-V and DualPipe-V, if forward, input and weight part are equal.

    No mesh waits once it has begun (Qi et al. 2023, arXiv 2401.10241, section 6); what is left is
    that mesh m begins m slots late. None below `full_from` microbatches: `2 M - 1` for ZB-V,
    `2 M` for DualPipe-V. Derived from the lists, as DualPipe's published bubble counts each
    side-by-side pair as one task, see `dualpipe_bubble_s`.
    """
    if num_microbatches < full_from:
        return None
    return (num_meshes - 1) / (6 * num_microbatches + num_meshes - 1)


def dualpipe_bubble_s(
    num_stages: int, pair_s: float, backward_s: float, backward_weight_s: float
) -> float:
    """Published bubble of DualPipe and DualPipe-V, (PP / 2 - 1) (F&B + B - 3 W) seconds per mesh.

    DeepSeek-AI 2024 (arXiv 2412.19437, table 2); DualPipe-V: the table in
    github.com/deepseek-ai/DualPipe. A pair's results come out at its end; forward and input part
    are taken to be equal.

    Args:
      num_stages: PP; twice the meshes of DualPipe-V.
      pair_s: a forward and a backward side by side.
      backward_s: a whole backward.
      backward_weight_s: a weight part.
    """
    return (num_stages / 2 - 1) * (pair_s + backward_s - 3 * backward_weight_s)


def dualpipe_bubble_share(num_meshes: int, num_microbatches: int) -> float | None:
    """Of two mirrored DualPipe-V, each on half of the meshes with half of the microbatches."""
    return v_shape_bubble_share(num_meshes // 2, num_microbatches // 2, num_meshes)


def chimera_bubble_share(num_meshes: int, num_microbatches: int) -> float:
    """(D - 2) / (D - 2 + 2 N), if forward and backward are equal and D divides N.

    Li and Hoefler 2021 (arXiv 2107.06925, section 3.1). Derived here for other even N: the slots
    that the last unit lacks stay empty.
    """
    idle = num_meshes - 2 + -num_microbatches % num_meshes
    return idle / (idle + 2 * num_microbatches)
