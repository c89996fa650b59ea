"""Stage DP with a limit on devices: exact, for what the priced relaxation leaves open.

A label is a plan for the layers from some `i` on: position and submesh of its first stage, devices
used, and its sum of latencies and transfers. Of two labels that agree in the first two, one with no
fewer devices and no smaller sum is dropped. So is a label whose sum, plus the cheapest priced plan
of the layers in front of it, shows that it cannot stay below the cutoff; near the right price few
survive. (Labels with completion bounds: Handler and Zang 1980, for constrained shortest paths.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .priced_dp import PricedPlan, prefix_costs
from .stage_problem import OBJECTIVE_RTOL, FloatArray, IntArray, Stage
from .stage_table import BoxTable, stage_at

# Candidates looked at together; bounds the memory of one step to some 100 MB.
_CHUNK = 1_000_000


class LabelLimitError(Exception):
    """More labels than allowed."""


@dataclass(frozen=True, slots=True, eq=False)
class _Labels:
    """Columns of equal length; `parent` is an index into the labels of all later layers."""

    layer: IntArray
    position: IntArray
    submesh: IntArray
    devices: IntArray
    sum_s: FloatArray
    parent: IntArray

    def take(self, index: IntArray) -> _Labels:
        return _Labels(
            layer=self.layer[index],
            position=self.position[index],
            submesh=self.submesh[index],
            devices=self.devices[index],
            sum_s=self.sum_s[index],
            parent=self.parent[index],
        )


def solve_limited(
    box: BoxTable,
    *,
    price_s: float,
    cutoff_s: float,
    max_labels: int,
    check_time: Callable[[], None],
) -> PricedPlan | None:
    """The plan with the smallest sum of latencies and transfers on the devices of the cluster.

    Args:
        box: What is allowed.
        price_s: Price per device of the completion bounds, in seconds; any is correct, the one
            that maximises the relaxed bound is the fastest.
        cutoff_s: Plans whose sum is not below this are of no interest, seconds.
        max_labels: Give up beyond.
        check_time: Called once per layer; may raise to stop.

    Returns:
        The plan, or None if none stays below the cutoff.

    Raises:
        LabelLimitError: More than `max_labels` labels would be needed.
    """
    front = prefix_costs(box, price_s, check_time)
    limit = box.table.problem.num_devices
    # Rounding must not drop what only just stays below.
    priced_cutoff_s = (cutoff_s + price_s * limit) * (1 + OBJECTIVE_RTOL)
    none = np.zeros(0, dtype=np.int64)
    labels = _Labels(none, none, none, none, np.zeros(0), none)
    for layer in reversed(range(len(box.table.rows))):
        check_time()
        found = [_last_stages(box, layer)]
        step = max(1, _CHUNK // len(box.table.devices))
        for first in range(0, len(labels.layer), step):
            chunk = np.arange(first, min(first + step, len(labels.layer)))
            found.append(_prepend(box, layer, labels, chunk))
        new = _concatenate(found)
        bound = new.sum_s + price_s * new.devices + front[new.position, layer, new.submesh]
        new = new.take(np.flatnonzero((new.devices <= limit) & (bound < priced_cutoff_s)))
        new = new.take(_undominated(new, len(box.table.devices)))
        labels = _concatenate([labels, new])
        if len(labels.layer) > max_labels:
            raise LabelLimitError
    is_complete = (labels.layer == 0) & (labels.sum_s < cutoff_s)
    if box.table.num_stages is not None:
        is_complete &= labels.position == box.table.num_stages - 1
    complete = np.flatnonzero(is_complete)
    if complete.size == 0:
        return None
    return _plan(box, labels, int(complete[labels.sum_s[complete].argmin()]))


def _last_stages(box: BoxTable, layer: int) -> _Labels:
    """The stages that hold all layers from this one to the end."""
    latency_s = box.latency_s[0, box.table.rows[layer, -1]]
    submesh = np.flatnonzero(np.isfinite(latency_s))
    return _Labels(
        layer=np.full(submesh.size, layer),
        position=np.zeros(submesh.size, dtype=np.int64),
        submesh=submesh,
        devices=box.table.devices[submesh],
        sum_s=latency_s[submesh],
        parent=np.full(submesh.size, -1),
    )


def _prepend(box: BoxTable, layer: int, labels: _Labels, chunk: IntArray) -> _Labels:
    """A stage that starts at `layer` in front of each label of the chunk, on every submesh."""
    after, behind = labels.layer[chunk], labels.submesh[chunk]
    last = box.latency_s.shape[0] - 1
    position = np.minimum(labels.position[chunk] + 1, last)
    rows = box.table.rows[layer, after - 1]
    sum_s = labels.sum_s[chunk, None] + box.latency_s[position, rows]
    sum_s += box.boundary_s[after - 1, :, behind]
    if box.table.num_stages is not None:  # no further stage fits in front
        sum_s[labels.position[chunk] == last] = np.inf
    index, submesh = np.nonzero(np.isfinite(sum_s))
    return _Labels(
        layer=np.full(index.size, layer),
        position=position[index],
        submesh=submesh,
        devices=labels.devices[chunk][index] + box.table.devices[submesh],
        sum_s=sum_s[index, submesh],
        parent=chunk[index],
    )


def _undominated(labels: _Labels, num_submeshes: int) -> IntArray:
    """Indices of the labels with a smaller sum than all with as few devices in their group."""
    if labels.layer.size == 0:
        return np.zeros(0, dtype=np.int64)
    group = labels.position * num_submeshes + labels.submesh
    order = np.lexsort((labels.sum_s, labels.devices, group))
    # Running minimum within each group: ranks are shifted so that each group starts lower.
    _, rank = np.unique(labels.sum_s[order], return_inverse=True)
    shifted = rank - group[order] * np.int64(labels.layer.size)
    smallest = np.minimum.accumulate(shifted)
    keep = np.ones(order.size, dtype=bool)
    keep[1:] = shifted[1:] < smallest[:-1]
    return order[keep]


def _concatenate(parts: list[_Labels]) -> _Labels:
    return _Labels(
        layer=np.concatenate([part.layer for part in parts]),
        position=np.concatenate([part.position for part in parts]),
        submesh=np.concatenate([part.submesh for part in parts]),
        devices=np.concatenate([part.devices for part in parts]),
        sum_s=np.concatenate([part.sum_s for part in parts]),
        parent=np.concatenate([part.parent for part in parts]),
    )


def _plan(box: BoxTable, labels: _Labels, index: int) -> PricedPlan:
    sum_s, devices = float(labels.sum_s[index]), int(labels.devices[index])
    stages: list[Stage] = []
    while index >= 0:
        parent = int(labels.parent[index])
        end = int(labels.layer[parent]) if parent >= 0 else len(box.table.rows)
        first, submesh = int(labels.layer[index]), int(labels.submesh[index])
        stages.append(stage_at(box, first, end - 1, submesh, int(labels.position[index])))
        index = parent
    return PricedPlan(tuple(stages), sum_s, devices, sum_s)
