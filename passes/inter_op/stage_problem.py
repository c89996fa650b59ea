"""The stage problem and its solution as plain arrays: what comes in, what goes out.

Layers `0 .. L-1` are cut into consecutive stages; each stage gets a submesh of the cluster and an
option (logical mesh, remat policy: the solver does not know which). For B microbatches

    minimise   sum_i t_i + sum_i b_i + (B - 1) max(max_i t_i, max_i b_i) + max_i p_i      seconds
    subject to fixed_i + in_flight_i * bytes per microbatch_i <= budget                   per stage
               sum_i devices_i <= devices of the cluster                      the rest stays idle

where `t_i` is the time of one microbatch on stage `i` (forward and backward), `b_i` its transfer to
the next stage and back, and `p_i` what a stage does once per step (gradient sync, update; stages
do it side by side, so the slowest counts). This is Alpa's objective (OSDI'22, section 5.1, Eq. 2)
with three additions: links are stations of the pipeline like stages, the once-per-step work, and
idle devices.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .submesh import Submesh, check_shapes

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

StageStatus = Literal["optimal", "within_gap", "time_limit", "interrupted", "unproven"]

# How many microbatches a stage holds at once: `(stages_after, num_microbatches) -> count`.
InFlight = Callable[[int, int], int]

# A stage may exceed the budget by this fraction, and two objectives closer than this count as
# equal: sums of some hundred float64 numbers round by about 1e-14.
MEMORY_RTOL = 1e-9
OBJECTIVE_RTOL = 1e-9

# `brute_force_stages` refuses above this many plans (a few seconds of Python).
BRUTE_FORCE_LIMIT = 500_000


def one_f_one_b_in_flight(stages_after: int, num_microbatches: int) -> int:
    """Microbatches in flight under 1F1B: the k-th stage from the end holds `min(k, B)`."""
    return min(stages_after + 1, num_microbatches)


def gpipe_in_flight(stages_after: int, num_microbatches: int) -> int:
    """Microbatches in flight under GPipe: all of them, on every stage."""
    del stages_after
    return num_microbatches


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageProblem:
    """Cost tables over distinct layer ranges; see the module docstring for what is minimised.

    R rows stand for the distinct layer ranges: ranges of identical layers share one. M submeshes,
    O options; a submesh with fewer options pads them with `inf` latency.

    Attributes:
        num_hosts: Hosts of the cluster.
        devices_per_host: Devices of each host.
        submeshes: Shapes a stage may use.
        range_class: `[L, L]`; the row of the stage with first layer i and last layer j, for
            `i <= j`; -1 if there must be no such stage.
        latency_s: `[R, M, O]` seconds per microbatch, forward + backward; `inf` if not offered.
        fixed_bytes: `[R, M, O]` bytes per device that are there all the time.
        in_flight_bytes: `[R, M, O]` bytes per device for each microbatch in flight.
        per_step_s: `[R, M, O]` seconds once per step.
        boundary_s: `[L - 1, M, M]` seconds per microbatch to move activations and gradients
            between the stage that ends with layer i (first index of the submesh pair) and the
            one that starts with layer i + 1; `inf` forbids the pair.
        memory_budget_bytes: Bytes per device; `inf` for none.
        num_microbatches: B.
        in_flight: Microbatches a stage holds, from the number of stages after it.
    """

    num_hosts: int
    devices_per_host: int
    submeshes: tuple[Submesh, ...]
    range_class: IntArray
    latency_s: FloatArray
    fixed_bytes: FloatArray
    in_flight_bytes: FloatArray
    per_step_s: FloatArray
    boundary_s: FloatArray
    memory_budget_bytes: float
    num_microbatches: int
    in_flight: InFlight = one_f_one_b_in_flight

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.range_class)

    @property
    def num_devices(self) -> int:
        """Devices of the cluster."""
        return self.num_hosts * self.devices_per_host


@dataclass(frozen=True, slots=True, order=True)
class Stage:
    """Consecutive layers on one submesh.

    Attributes:
        first_layer: First layer.
        last_layer: Last layer, included.
        submesh: Index into `StageProblem.submeshes`.
        option: Index of the option.
    """

    first_layer: int
    last_layer: int
    submesh: int
    option: int


@dataclass(frozen=True, slots=True)
class StageProposal:
    """A feasible plan and its objective in seconds by `evaluate_stages`."""

    stages: tuple[Stage, ...]
    objective_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSolution:
    """The best plan found and how good it is known to be.

    Attributes:
        stages: Stages in pipeline order.
        objective_s: Its objective by `evaluate_stages`, seconds per step.
        lower_bound_s: No feasible plan takes less, seconds.
        gap: `(objective - lower bound) / objective`, 0 if proven.
        status: "optimal" (proven up to a relative 1e-9), "within_gap" (the gap asked for is met),
            "time_limit", "interrupted" (by the caller or Ctrl-C), or "unproven" (the dynamic
            program of a threshold was too large; `gap` says what is left open).
        idle_devices: Devices of the cluster no stage uses.
        proposals: Distinct plans, best first, `stages` being the first; not the exact k best but
            plans with smaller and smaller stages (`stage_proposals`).
        wall_s: Seconds spent.
    """

    stages: tuple[Stage, ...]
    objective_s: float
    lower_bound_s: float
    gap: float
    status: StageStatus
    idle_devices: int
    proposals: tuple[StageProposal, ...]
    wall_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTerms:
    """What the objective of a plan consists of, and the memory it needs.

    Attributes:
        latency_s: Per stage, seconds per microbatch.
        boundary_s: Per pair of neighbouring stages, seconds per microbatch.
        per_step_s: Per stage, seconds per step.
        peak_bytes: Per stage, bytes per device.
        num_devices: Devices of all stages together.
        objective_s: Seconds per step, `inf` if a stage or a pair is not offered.
    """

    latency_s: tuple[float, ...]
    boundary_s: tuple[float, ...]
    per_step_s: tuple[float, ...]
    peak_bytes: tuple[float, ...]
    num_devices: int
    objective_s: float


def verify_stage_problem(problem: StageProblem) -> None:
    """Checks shapes and values; everything else in this package relies on them.

    Raises:
        ValueError: Naming the array, the submesh or the number that is wrong.
    """
    num_layers, num_submeshes = problem.num_layers, len(problem.submeshes)
    if num_layers == 0 or problem.range_class.shape != (num_layers, num_layers):
        raise ValueError(
            f"range_class has shape {problem.range_class.shape}; expected [L, L] with L > 0."
        )
    if problem.num_microbatches < 1:
        raise ValueError(f"num_microbatches is {problem.num_microbatches}; it must be at least 1.")
    if not problem.memory_budget_bytes > 0:
        raise ValueError(
            f"memory_budget_bytes is {problem.memory_budget_bytes}; use inf for no budget."
        )
    shape = problem.latency_s.shape
    if len(shape) != 3 or shape[1] != num_submeshes or 0 in shape:
        raise ValueError(
            f"latency_s has shape {shape}; expected [rows, {num_submeshes} submeshes, options]."
        )
    for name in ("latency_s", "fixed_bytes", "in_flight_bytes", "per_step_s"):
        _verify_table(name, getattr(problem, name), shape, may_be_inf=name == "latency_s")
    expected = (num_layers - 1, num_submeshes, num_submeshes)
    _verify_table("boundary_s", problem.boundary_s, expected, may_be_inf=True)
    upper = problem.range_class[np.triu_indices(num_layers)]
    if upper.min() < -1 or upper.max() >= shape[0]:
        raise ValueError(f"range_class names a row outside of the {shape[0]} rows of the tables.")
    check_shapes(problem.submeshes, problem.num_hosts, problem.devices_per_host)


def _verify_table(
    name: str, table: FloatArray, shape: tuple[int, ...], *, may_be_inf: bool
) -> None:
    if table.shape != shape:
        raise ValueError(f"{name} has shape {table.shape}, expected {shape}.")
    if np.isnan(table).any() or (table < 0).any() or (np.isinf(table).any() and not may_be_inf):
        allowed = "non-negative numbers or inf" if may_be_inf else "finite, non-negative numbers"
        raise ValueError(f"{name} contains other values than {allowed}.")


def evaluate_stages(problem: StageProblem, stages: Sequence[Stage]) -> StageTerms:
    """Costs one plan from the definition; nothing a solver says is believed without it.

    Raises:
        ValueError: If the stages do not cover the layers one after the other.
    """
    covered = [layer for s in stages for layer in range(s.first_layer, s.last_layer + 1)]
    if covered != list(range(problem.num_layers)) or any(
        stage.first_layer > stage.last_layer for stage in stages
    ):
        raise ValueError(
            f"Stages {list(stages)} do not cover {problem.num_layers} layers in order."
        )
    cells = [
        (int(problem.range_class[s.first_layer, s.last_layer]), s.submesh, s.option) for s in stages
    ]
    offered = all(row >= 0 for row, _, _ in cells)
    latency_s = tuple(float(problem.latency_s[c]) if c[0] >= 0 else math.inf for c in cells)
    per_step_s = tuple(float(problem.per_step_s[c]) for c in cells)
    boundary_s = tuple(
        float(problem.boundary_s[left.last_layer, left.submesh, right.submesh])
        for left, right in itertools.pairwise(stages)
    )
    in_flight = [
        problem.in_flight(len(stages) - 1 - index, problem.num_microbatches)
        for index in range(len(stages))
    ]
    slowest_s = max(latency_s + boundary_s)
    repeated_s = (problem.num_microbatches - 1) * slowest_s if problem.num_microbatches > 1 else 0.0
    return StageTerms(
        latency_s=latency_s,
        boundary_s=boundary_s,
        per_step_s=per_step_s,
        peak_bytes=tuple(
            float(problem.fixed_bytes[c] + count * problem.in_flight_bytes[c])
            for c, count in zip(cells, in_flight, strict=True)
        ),
        num_devices=sum(problem.submeshes[stage.submesh].num_devices for stage in stages),
        objective_s=math.fsum([*latency_s, *boundary_s, repeated_s, max(per_step_s)])
        if offered
        else math.inf,
    )


def fits(problem: StageProblem, terms: StageTerms) -> bool:
    """Whether a plan is offered, within the memory budget and within the cluster."""
    return (
        math.isfinite(terms.objective_s)
        and terms.num_devices <= problem.num_devices
        and max(terms.peak_bytes) <= memory_limit(problem.memory_budget_bytes)
    )


def memory_limit(budget_bytes: float) -> float:
    """The budget plus the rounding allowance, bytes."""
    return budget_bytes * (1 + MEMORY_RTOL)


def brute_force_stages(
    problem: StageProblem, num_stages: int | None = None
) -> StageProposal | None:
    """Tries every partition, submesh and option; the oracle of the tests.

    Args:
        problem: The problem.
        num_stages: The number of stages there must be, None if it is free.

    Returns:
        The first best plan, or None if none is feasible.

    Raises:
        ValueError: If there are more than `BRUTE_FORCE_LIMIT` plans.
    """
    verify_stage_problem(problem)
    choices = problem.latency_s.shape[1] * problem.latency_s.shape[2]
    total = choices * (1 + choices) ** (problem.num_layers - 1)
    if total > BRUTE_FORCE_LIMIT:
        raise ValueError(f"{total} plans are too many for brute force; use solve_stages.")
    best: StageProposal | None = None
    for stages in _all_plans(problem):
        if num_stages not in (None, len(stages)):
            continue
        terms = evaluate_stages(problem, stages)
        if fits(problem, terms) and (best is None or terms.objective_s < best.objective_s):
            best = StageProposal(stages, terms.objective_s)
    return best


def _all_plans(problem: StageProblem) -> Iterator[tuple[Stage, ...]]:
    num_layers = problem.num_layers
    _, num_submeshes, num_options = problem.latency_s.shape
    choices = list(itertools.product(range(num_submeshes), range(num_options)))
    for size in range(num_layers):
        for cuts in itertools.combinations(range(1, num_layers), size):
            ranges = list(itertools.pairwise([0, *cuts, num_layers]))
            for chosen in itertools.product(choices, repeat=len(ranges)):
                yield tuple(
                    Stage(first, end - 1, *choice)
                    for (first, end), choice in zip(ranges, chosen, strict=True)
                )
