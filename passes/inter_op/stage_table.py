"""The cost tables of a stage problem, restricted to what a search box allows.

Memory enters through the *position* of a stage: the number of stages after it, which says how many
microbatches it holds. Counts at which no option stops fitting are one position, so a problem in
which memory does not bind has a single one. The last position stands for itself and all later ones,
unless the number of stages is prescribed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .stage_problem import BoolArray, FloatArray, IntArray, Stage, StageProblem, memory_limit


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageTable:
    """A stage problem made ready for the dynamic programs.

    Attributes:
        problem: The problem.
        devices: `[M]` devices of each submesh.
        rows: `[L, L]`; `range_class` with -1 replaced by the row after the last, which no box
            offers.
        level: `[A]`; position -> how demanding it is (its number of microbatches, ranked).
        levels_that_fit: `[R, M, O]`; the option fits at positions of a lower level than this;
            0 if it is not offered or never fits.
        num_stages: The number of stages there must be, then also the number of positions; None
            if it is free.
    """

    problem: StageProblem
    devices: IntArray
    rows: IntArray
    level: IntArray
    levels_that_fit: IntArray
    num_stages: int | None

    @property
    def num_positions(self) -> int:
        """A, the number of positions that have to be told apart."""
        return len(self.level)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BoxTable:
    """What the dynamic programs see of a table: the best option of each stage.

    Attributes:
        table: The table.
        latency_s: `[A, R + 1, M]` seconds per microbatch; `inf` if no option is allowed there.
        boundary_s: `[L - 1, M, M]` seconds per microbatch.
        offered: `[R + 1]`; whether the row has an option at any position.
        slowest_s: Stages and transfers that take longer were left out, seconds.
        per_step_s: Options that take longer once per step were left out, seconds.
    """

    table: StageTable
    latency_s: FloatArray
    boundary_s: FloatArray
    offered: BoolArray
    slowest_s: float
    per_step_s: float


def make_table(problem: StageProblem, num_stages: int | None = None) -> StageTable:
    """Ranks the in-flight counts and finds up to which one each option fits."""
    smallest = min(shape.num_devices for shape in problem.submeshes)
    most_stages = num_stages or min(problem.num_layers, problem.num_devices // smallest)
    counts = np.array(
        [problem.in_flight(after, problem.num_microbatches) for after in range(most_stages)]
    )
    distinct = np.unique(counts)
    limit = memory_limit(problem.memory_budget_bytes)
    fit = np.zeros(problem.latency_s.shape, dtype=np.int64)
    for count in distinct:
        fit += problem.fixed_bytes + count * problem.in_flight_bytes <= limit
    fit[~np.isfinite(problem.latency_s)] = 0
    # Levels between which no option is lost are the same level.
    limits = np.unique(fit[(fit > 0) & (fit < len(distinct))])
    level = np.searchsorted(limits, np.searchsorted(distinct, counts), side="right")
    levels_that_fit = np.where(fit > 0, np.searchsorted(limits, fit, side="left") + 1, 0)
    if num_stages is None:
        changes = np.flatnonzero(level[1:] != level[:-1])
        level = level[: int(changes[-1]) + 2] if changes.size else level[:1]
    num_rows = problem.latency_s.shape[0]
    return StageTable(
        problem=problem,
        devices=np.array([shape.num_devices for shape in problem.submeshes]),
        rows=np.where(problem.range_class < 0, num_rows, problem.range_class),
        level=level,
        levels_that_fit=levels_that_fit,
        num_stages=num_stages,
    )


def restrict(table: StageTable, slowest_s: float, per_step_s: float) -> BoxTable:
    """Leaves out what is slower than the thresholds (seconds) and keeps the best option."""
    problem = table.problem
    latency_s = np.where(problem.per_step_s <= per_step_s, problem.latency_s, np.inf)
    latency_s[latency_s > slowest_s] = np.inf
    num_rows, num_submeshes, num_options = latency_s.shape
    num_levels = int(table.level.max()) + 1
    best = np.full((num_levels, num_rows + 1, num_submeshes), np.inf)
    # Each option at the highest level it fits, then the best of this level and the ones above.
    for option in range(num_options):
        row, submesh = np.nonzero(np.isfinite(latency_s[:, :, option]))
        highest = table.levels_that_fit[row, submesh, option] - 1
        row, submesh, highest = row[highest >= 0], submesh[highest >= 0], highest[highest >= 0]
        cell = np.minimum(highest, num_levels - 1), row, submesh
        best[cell] = np.minimum(best[cell], latency_s[row, submesh, option])
    for level in reversed(range(num_levels - 1)):
        np.minimum(best[level], best[level + 1], out=best[level])
    return BoxTable(
        table=table,
        latency_s=best if np.array_equal(table.level, np.arange(num_levels)) else best[table.level],
        boundary_s=np.where(problem.boundary_s <= slowest_s, problem.boundary_s, np.inf),
        offered=np.isfinite(best[0].min(axis=1)),
        slowest_s=slowest_s,
        per_step_s=per_step_s,
    )


def stage_at(box: BoxTable, first: int, last: int, submesh: int, position: int) -> Stage:
    """The stage with the option the box table took; the first one of equal latency."""
    table, problem = box.table, box.table.problem
    row = int(table.rows[first, last])
    allowed = (table.levels_that_fit[row, submesh] > table.level[position]) & (
        problem.per_step_s[row, submesh] <= box.per_step_s
    )
    latency_s = np.where(allowed, problem.latency_s[row, submesh], np.inf)
    return Stage(first, last, submesh, int(latency_s.argmin()))


def slowest_candidates(table: StageTable) -> FloatArray:
    """Every value the slowest station can have, ascending, seconds.

    With one microbatch the slowest station costs nothing extra: a single threshold is enough.
    """
    problem = table.problem
    values = np.concatenate(
        [problem.latency_s[table.levels_that_fit > 0], problem.boundary_s.ravel()]
    )
    values = np.unique(values[np.isfinite(values)])
    return values[-1:] if problem.num_microbatches == 1 else values


def per_step_candidates(table: StageTable) -> FloatArray:
    """Every value the largest once-per-step time can have, ascending, seconds."""
    return np.unique(table.problem.per_step_s[table.levels_that_fit > 0])
