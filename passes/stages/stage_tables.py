"""Costs of layers as the tables of the stage program: `stage_tables`, and costs between counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from alpa_lite.cost_model import Cluster
from alpa_lite.ir.graph import aval_bytes
from alpa_lite.passes.inter_op import StageProblem
from alpa_lite.passes.inter_op.stage_problem import InFlight
from alpa_lite.passes.stages.layer_costs import LayerCost, LayerCosts, LayerOption, RematCost
from alpa_lite.passes.stages.source import CutStep
from alpa_lite.passes.stages.transfer_cost import seconds_between


@dataclass(frozen=True, slots=True)
class StageOption:
    """What an option of the stage program stands for."""

    layers: LayerOption
    remat: str


@dataclass(frozen=True, slots=True, eq=False)
class StageTables:
    """A stage program with the meaning of its options.

    Attributes:
      problem: the tables.
      options: per submesh, what each option is.
    """

    problem: StageProblem
    options: tuple[tuple[StageOption, ...], ...]


def crossing(cut: CutStep) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of one microbatch that cross each cut between layers, and of cotangents back.

    Args:
      cut: the step, each layer a stage of its own.

    Returns:
      Two arrays `[num_layers - 1]`.
    """
    there, back = np.zeros((2, len(cut.cuts) - 1))
    reach: dict[object, tuple[int, int, int, bool]] = {}
    for each in cut.cuts:
        for link in each.sent:
            known = reach.get(link.variable)
            last = max(link.target, known[1]) if known else link.target
            size = aval_bytes(link.variable.aval)
            reach[link.variable] = (link.source, last, size, link.differentiable)
    for first, last, size, differentiable in reach.values():
        there[first:last] += size
        back[first:last] += size if differentiable else 0
    return there, back


def stage_tables(
    costs: LayerCosts, crossing_bytes: tuple[np.ndarray, np.ndarray], remats: Sequence[str],
    cluster: Cluster, budget_bytes: float, in_flight: InFlight,
) -> StageTables:  # fmt: skip
    """The stage program over all ranges of layers.

    Args:
      costs: of layers.
      crossing_bytes: from `crossing`.
      remats: policies a stage may have.
      cluster: the hardware.
      budget_bytes: memory per device.
      in_flight: microbatches a stage holds.
    """
    members, range_class = _ranges(costs.kinds, len(costs.costs))
    options = tuple(
        tuple(StageOption(each, remat) for each in on_mesh for remat in remats)
        for on_mesh in costs.options
    )
    most = max(map(len, options))
    shape = (len(members), len(costs.submeshes), most)
    latency, per_step = np.full(shape, np.inf), np.zeros(shape)
    fixed, stash = np.zeros(shape), np.zeros(shape)
    for m, on_mesh in enumerate(costs.options):
        for o in range(len(on_mesh)):
            for r, remat in enumerate(remats):
                kinds = zip(costs.costs, costs.remat, strict=True)
                column = np.array([_layer(each[m][o], policies[remat]) for each, policies in kinds])
                usable = np.isfinite(column[:, 0])
                offered = ~np.any((members > 0) & ~usable, axis=1)
                column = np.where(usable[:, None], column, 0.0)
                at = (slice(None), m, o * len(remats) + r)
                sums = members @ column
                latency[at] = np.where(offered, sums[:, 0], np.inf)
                per_step[at], stash[at] = sums[:, 1], sums[:, 4]
                fixed[at] = sums[:, 2] + ((members > 0) * column[:, 3]).max(axis=1)
    problem = StageProblem(
        num_hosts=cluster.num_hosts, devices_per_host=cluster.devices_per_host,
        submeshes=costs.submeshes, range_class=range_class, latency_s=latency, fixed_bytes=fixed,
        in_flight_bytes=stash, per_step_s=per_step,
        boundary_s=_boundaries(crossing_bytes, costs, cluster), memory_budget_bytes=budget_bytes,
        num_microbatches=costs.num_microbatches, in_flight=in_flight,
    )  # fmt: skip
    return StageTables(problem, options)


def costs_at(priced: LayerCosts, num_microbatches: int) -> LayerCosts:
    """Costs at another number of microbatches than was priced.

    What depends on the size of a microbatch is taken to be a constant and a part proportional to
    it, found from what was priced and the whole batch; proportional, where that is not known.
    """
    old = priced.num_microbatches
    if num_microbatches == old:
        return priced

    def at(here: float, whole: float | None) -> float:
        if whole is None or old == 1:
            return here * old / num_microbatches
        slope = max(0.0, (whole - here) / (1 - 1 / old))
        return max(0.0, here + slope * (1 / num_microbatches - 1 / old))

    def moved(cost: LayerCost | None, whole: LayerCost | None) -> LayerCost | None:
        if cost is None:
            return None
        sizes = ("forward_s", "backward_s", "temporary_bytes", "stash_bytes", "input_bytes")
        return replace(
            cost, **{n: at(getattr(cost, n), None if whole is None else getattr(whole, n))
                     for n in sizes},
        )  # fmt: skip

    costs = tuple(
        tuple(tuple(map(moved, *rows)) for rows in zip(cells, whole, strict=True))
        for cells, whole in zip(priced.costs, priced.whole, strict=True)
    )
    return replace(priced, num_microbatches=num_microbatches, costs=costs)


def _layer(cost: LayerCost | None, remat: RematCost) -> tuple[float, ...]:
    """Latency, once per step, state, temporaries and stash of a layer."""
    if cost is None:
        return (np.inf, 0.0, 0.0, 0.0, 0.0)
    kept = cost.input_bytes + remat.kept * (cost.stash_bytes - cost.input_bytes)
    again = cost.stash_bytes - kept
    seconds = cost.forward_s + remat.backward * cost.backward_s
    return (seconds, cost.per_step_s, cost.state_bytes, cost.temporary_bytes + again, kept)


def _ranges(kinds: Sequence[int], num_kinds: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct ranges as counts of kinds `[rows, kinds]`, and the row of every range."""
    num = len(kinds)
    rows: dict[tuple[int, ...], int] = {}
    range_class = np.full((num, num), -1)
    for first in range(num):
        count = [0] * num_kinds
        for last in range(first, num):
            count[kinds[last]] += 1
            range_class[first, last] = rows.setdefault(tuple(count), len(rows))
    return np.array(list(rows)), range_class


def _boundaries(
    crossing_bytes: tuple[np.ndarray, np.ndarray], costs: LayerCosts, cluster: Cluster
) -> np.ndarray:
    there, back = crossing_bytes
    shapes = costs.submeshes
    found = np.zeros((len(there), len(shapes), len(shapes)))
    for a, left in enumerate(shapes):
        for b, right in enumerate(shapes):
            both = left.num_devices + right.num_devices
            together = left.num_hosts == right.num_hosts == 1 and both <= cluster.devices_per_host
            for cut, sizes in enumerate(zip(there, back, strict=True)):
                found[cut, a, b] = sum(
                    seconds_between(size, left, right, together, cluster) for size in sizes
                )
    return found
