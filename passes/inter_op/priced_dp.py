"""Stage DP with a price per device instead of a limit on devices.

With a price the number of devices used so far need not be part of the state, which is what makes
16,384 devices as cheap as 16: `[positions, layers, submeshes]` states instead of that many for
each count of devices. The cheapest priced plan also bounds the limited problem from below
(Lagrangian relaxation): `min sum >= min (sum + price * devices) - price * limit`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .stage_problem import FloatArray, Stage
from .stage_table import BoxTable, stage_at


@dataclass(frozen=True, slots=True, eq=False)
class PricedPlan:
    """The plan with the smallest sum of latencies, transfers and priced devices.

    Attributes:
        stages: Stages in pipeline order.
        sum_s: Latencies and transfers, without the price, seconds.
        num_devices: Devices used.
        priced_s: `sum_s + price * num_devices` as the dynamic program computed it.
    """

    stages: tuple[Stage, ...]
    sum_s: float
    num_devices: int
    priced_s: float


def solve_priced(
    box: BoxTable, price_s: float, check_time: Callable[[], None]
) -> PricedPlan | None:
    """The cheapest plan if each device costs `price_s` seconds; None if no plan exists.

    Args:
        box: What is allowed.
        price_s: Seconds per device.
        check_time: Called once per layer; may raise to stop.
    """
    suffix = _Suffix(box, price_s)
    for layer in reversed(range(suffix.num_layers)):
        check_time()
        suffix.add(layer)
    return suffix.best_plan()


class _Suffix:
    """Cheapest plans of the layers from `i` on, for `i` from the last layer down.

    `cost[a, i, m]`: the first stage is on submesh m and has `a` stages after it (the last `a`
    stands for more, too). `behind[a, i, m]`: cheapest continuation from layer i, transfer included,
    behind a stage on submesh m with `a` stages after it; for `i = L` it is 0 if `a = 0`, else inf.
    """

    def __init__(self, box: BoxTable, price_s: float) -> None:
        self.box = box
        num_positions, _, num_submeshes = box.latency_s.shape
        self.num_layers = num_layers = len(box.table.rows)
        self.price_s = price_s * box.table.devices
        self.cost = np.full((num_positions, num_layers, num_submeshes), np.inf)
        self.behind = np.full((num_positions, num_layers + 1, num_submeshes), np.inf)
        self.behind[0, num_layers] = 0.0

    def add(self, layer: int) -> None:
        """Computes the entries of a layer from those of later ones."""
        rows = self.box.table.rows[layer, layer:]
        ends = np.flatnonzero(self.box.offered[rows])
        if ends.size == 0:
            return
        total = self.box.latency_s[:, rows[ends]]
        total += self.behind[:, layer + 1 + ends]
        self.cost[:, layer] = total.min(axis=1) + self.price_s
        if layer:
            self._continue(layer)

    def _continue(self, layer: int) -> None:
        transfer = self.box.boundary_s[layer - 1]
        onward = (transfer[None] + self.cost[:, layer, None, :]).min(axis=2)
        self.behind[1:, layer] = onward[:-1]
        if self.box.table.num_stages is None:
            # More stages after it than are told apart.
            np.minimum(self.behind[-1, layer], onward[-1], out=self.behind[-1, layer])

    def best_plan(self) -> PricedPlan | None:
        """Walks along the minima, first ones first; the tables hold no back pointers."""
        box, layer = self.box, 0
        start = self.cost[:, 0].copy()
        if box.table.num_stages is not None:
            start[:-1] = np.inf
        if not np.isfinite(start.min()):
            return None
        position, submesh = (int(v) for v in np.unravel_index(start.argmin(), start.shape))
        priced_s = float(start.min())
        stages: list[Stage] = []
        sum_s = 0.0
        while True:
            rows = box.table.rows[layer, layer:]
            total = box.latency_s[position, rows, submesh]
            total = total + self.behind[position, layer + 1 :, submesh]
            last = layer + int(total.argmin())
            stages.append(stage_at(box, layer, last, submesh, position))
            sum_s += float(box.latency_s[position, box.table.rows[layer, last], submesh])
            layer = last + 1
            if layer == self.num_layers:
                break
            position, submesh, transfer_s = self._next(layer, position, submesh)
            sum_s += transfer_s
        devices = sum(int(box.table.devices[stage.submesh]) for stage in stages)
        return PricedPlan(tuple(stages), sum_s, devices, priced_s)

    def _next(self, layer: int, position: int, submesh: int) -> tuple[int, int, float]:
        transfer = self.box.boundary_s[layer - 1, submesh]
        last = self.cost.shape[0] - 1
        positions = [position - 1] if position else []
        if position == last and self.box.table.num_stages is None:
            positions.append(last)
        total = transfer + self.cost[positions, layer]
        which, target = (int(v) for v in np.unravel_index(total.argmin(), total.shape))
        return positions[which], target, float(transfer[target])


def fewest_devices(box: BoxTable, check_time: Callable[[], None]) -> PricedPlan | None:
    """The plan that uses the fewest devices; its `sum_s` is the true one. None if none exists.

    A problem is infeasible exactly if this is None or uses more devices than there are.
    """
    free = BoxTable(
        table=box.table,
        latency_s=np.where(np.isfinite(box.latency_s), 0.0, np.inf),
        boundary_s=np.where(np.isfinite(box.boundary_s), 0.0, np.inf),
        offered=box.offered,
        slowest_s=box.slowest_s,
        per_step_s=box.per_step_s,
    )
    plan = solve_priced(free, 1.0, check_time)
    if plan is None:
        return None
    problem = box.table.problem
    cells = [(problem.range_class[s.first_layer, s.last_layer], s) for s in plan.stages]
    sum_s = sum(float(problem.latency_s[row, s.submesh, s.option]) for row, s in cells)
    sum_s += sum(
        float(problem.boundary_s[left.last_layer, left.submesh, right.submesh])
        for left, right in zip(plan.stages[:-1], plan.stages[1:], strict=True)
    )
    return PricedPlan(plan.stages, sum_s, plan.num_devices, plan.priced_s)


def prefix_costs(box: BoxTable, price_s: float, check_time: Callable[[], None]) -> FloatArray:
    """Cheapest priced plans of the layers in front of a stage.

    Returns:
        `[A, L, M]` seconds: the stage that starts with layer i on submesh m and has `a` stages
        after it; transfer into it included, the stage itself not.
    """
    num_positions, _, num_submeshes = box.latency_s.shape
    rows, num_layers = box.table.rows, len(box.table.rows)
    front = np.full((num_positions, num_layers, num_submeshes), np.inf)
    front[:, 0] = 0.0
    for layer in range(1, num_layers):
        check_time()
        before = (box.latency_s[:, rows[:layer, layer - 1]] + front[:, :layer]).min(axis=1)
        before += price_s * box.table.devices
        # The stage in front has one more stage after it.
        before = np.concatenate([before[1:], before[-1:]])
        front[:, layer] = (before[:, :, None] + box.boundary_s[layer - 1][None]).min(axis=1)
    return front
