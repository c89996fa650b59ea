"""Why a problem has no solution, in words a user can act on.

Two reasons exist: strategies contradict each other (pins and aliases, that is infinite costs), or
no allowed choice fits into memory. For the first a smallest set of nodes that cannot agree is
named, for the second the smallest peak that can be reached, where it is, and what it consists of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from alpa_lite.errors import InfeasibleError, SolverTimeoutError
from alpa_lite.passes.units import format_bytes

from .elimination import eliminate, plan_elimination
from .milp import build_milp, build_peak_milp, read_solution, solve_milp
from .presolve import presolve
from .problem import Edge, IntraOpProblem, MemoryRow, evaluate, fits_budget, restrict_to_nodes
from .reduced_graph import ContradictionError

_MAX_ELIMINATION_ENTRIES = 1e8
_NUM_CONTRIBUTORS = 5
_PEAK_RTOL = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallestPeak:
    """The allowed choice whose largest memory row is smallest.

    Attributes:
        choice: Strategy per node.
        peak_bytes: Its largest row, bytes (`-inf` without rows).
        proven: Whether no allowed choice has a smaller one.
    """

    choice: tuple[int, ...]
    peak_bytes: float
    proven: bool


def explain_infeasible(problem: IntraOpProblem, *, time_limit_s: float) -> tuple[int, ...]:
    """Raises InfeasibleError with the reason; returns a choice if there is one after all.

    The second case is the safety net under solvers that report "infeasible" wrongly.

    Args:
        problem: A problem for which no feasible choice was found.
        time_limit_s: Seconds for each search of the smallest peak.

    Raises:
        InfeasibleError: With the reason.
        SolverTimeoutError: If the time did not suffice to prove that nothing fits.
    """
    peak = smallest_peak(problem, time_limit_s=time_limit_s)
    if peak is None:
        raise InfeasibleError(_contradiction_message(problem, time_limit_s))
    _, row_bytes = evaluate(problem, peak.choice)
    if fits_budget(row_bytes, problem.memory_budget_bytes):
        return peak.choice
    if not peak.proven:
        raise SolverTimeoutError(
            f"No choice that fits {format_bytes(problem.memory_budget_bytes)} was found in time; "
            f"the smallest peak found is {format_bytes(peak.peak_bytes)}. Raise time_limit_s."
        )
    raise _memory_error(problem, peak, problem.memory[int(row_bytes.argmax())])


def smallest_peak(problem: IntraOpProblem, *, time_limit_s: float) -> SmallestPeak | None:
    """Minimises the largest memory row over the allowed choices, whatever they cost.

    One row is minimised exactly by itself. Of several rows each one's minimum is a lower bound,
    often already reached by one of the minimisers; if not, an integer program decides.

    Returns:
        The choice, or None if no choice is allowed at all.
    """

    def peak_bytes(choice: Sequence[int]) -> float:
        return float(evaluate(problem, choice)[1].max(initial=-math.inf))

    candidates: list[tuple[int, ...]] = []
    lower_bytes = -math.inf
    # Each row alone, then the sum of all: a compromise that is often the best choice.
    for rows in [*((row,) for row in problem.memory), problem.memory]:
        choice = _cheapest(_bytes_as_costs(problem, rows), time_limit_s)
        if choice is None:
            return None
        candidates.append(choice)
        if len(rows) == 1:
            lower_bytes = max(lower_bytes, _row_bytes(rows[0], choice))
    best = min(candidates, key=peak_bytes)
    proven = peak_bytes(best) <= lower_bytes + _PEAK_RTOL * abs(lower_bytes)
    if not proven and problem.memory:
        program, variables = build_peak_milp(problem)
        outcome = solve_milp(program, variables, time_limit_s=time_limit_s)
        found = read_solution(variables)
        # The program may stop without a choice, or with one that is not allowed.
        if found is not None and math.isfinite(evaluate(problem, found)[0]):
            best = min((best, found), key=peak_bytes)
        proven = outcome.status == "optimal"
    return SmallestPeak(choice=best, peak_bytes=peak_bytes(best), proven=proven)


def _row_bytes(row: MemoryRow, choice: Sequence[int]) -> float:
    return row.fixed_bytes + math.fsum(float(term[choice[v]]) for v, term in row.terms.items())


def _bytes_as_costs(problem: IntraOpProblem, rows: Sequence[MemoryRow]) -> IntraOpProblem:
    """The problem of minimising the sum of some rows: only what is forbidden is kept of costs."""
    cost = [np.where(np.isfinite(c), 0.0, np.inf) for c in problem.node_cost_s]
    for row in rows:
        for node, term in row.terms.items():
            cost[node] = cost[node] + term
    edges = tuple(
        Edge(u=edge.u, v=edge.v, cost_s=np.where(np.isfinite(edge.cost_s), 0.0, np.inf))
        for edge in problem.edges
        if not np.isfinite(edge.cost_s).all()
    )
    return IntraOpProblem(names=problem.names, node_cost_s=tuple(cost), edges=edges)


def _cheapest(problem: IntraOpProblem, time_limit_s: float) -> tuple[int, ...] | None:
    """The optimum of a problem without memory rows; None if no choice is allowed."""
    try:
        reduced = presolve(problem)
    except ContradictionError:
        return None
    plan = plan_elimination(reduced.problem, _MAX_ELIMINATION_ENTRIES)
    if plan is not None:
        tables = eliminate(plan, reduced.problem.node_cost_s)
        return reduced.decode(tables.choice) if math.isfinite(tables.optimum_s) else None
    program, variables = build_milp(reduced.problem)
    outcome = solve_milp(program, variables, time_limit_s=time_limit_s)
    if outcome.status == "infeasible":
        return None
    choice = read_solution(variables)
    if choice is None or outcome.status != "optimal":
        raise SolverTimeoutError(
            "The time limit ran out while looking for the choice with the smallest memory. "
            "Raise time_limit_s."
        )
    return reduced.decode(choice)


def _contradiction_message(problem: IntraOpProblem, time_limit_s: float) -> str:
    nodes = _conflicting_nodes(problem, time_limit_s)
    names = [repr(problem.names[node]) for node in nodes]
    if len(nodes) == 1:
        return (
            f"Node {names[0]} has no allowed strategy: all of its costs are infinite. "
            "Remove a constraint on it, or add a strategy."
        )
    listed = f"{', '.join(names[:-1])} and {names[-1]}"
    why = (
        "every pair of their strategies is forbidden"
        if len(nodes) == 2
        else "each neighbouring pair could agree, but not all of them together"
    )
    return (
        f"Nodes {listed} have no allowed combination of strategies: {why} (infinite costs). "
        "Two constraints contradict each other, such as a pinned sharding on either end of an "
        "alias; remove one, or allow a reshard between them."
    )


def _conflicting_nodes(problem: IntraOpProblem, time_limit_s: float) -> tuple[int, ...]:
    """Nodes that cannot agree, and could if any one of them was left out."""
    alone = _bytes_as_costs(problem, ())
    needed = list(range(len(problem.names)))
    size = len(needed)
    # Large groups first: most nodes have nothing to do with it.
    while size:
        for start in reversed(range(0, len(needed), size)):
            rest = needed[:start] + needed[start + size :]
            if _cheapest(restrict_to_nodes(alone, rest), time_limit_s) is None:
                needed = rest
        size //= 2
    return tuple(needed)


def _memory_error(problem: IntraOpProblem, peak: SmallestPeak, row: MemoryRow) -> InfeasibleError:
    budget_bytes = problem.memory_budget_bytes
    breakdown = _breakdown(problem, row, peak.choice)
    largest = list(breakdown.items())[:_NUM_CONTRIBUTORS]
    missing_bytes = peak.peak_bytes - budget_bytes
    return InfeasibleError(
        f"No choice of strategies fits {format_bytes(budget_bytes)} per device: the smallest peak "
        f"is {format_bytes(peak.peak_bytes)}, {format_bytes(missing_bytes)} too much, at "
        f"{row.name!r}. Largest there: "
        + ", ".join(f"{name} {format_bytes(size)}" for name, size in largest)
        + ". Use more devices, a larger memory_budget_bytes, more microbatches, or "
        "rematerialisation.",
        need_bytes=peak.peak_bytes,
        budget_bytes=budget_bytes,
        row=row.name,
        breakdown=breakdown,
    )


def _breakdown(
    problem: IntraOpProblem, row: MemoryRow, choice: Sequence[int]
) -> Mapping[str, float]:
    """Bytes by node name, largest first; nodes of the same name are summed."""
    total: dict[str, float] = {"fixed": row.fixed_bytes} if row.fixed_bytes else {}
    for node, term in row.terms.items():
        name = problem.names[node]
        total[name] = total.get(name, 0.0) + float(term[choice[node]])
    return dict(sorted(total.items(), key=lambda item: -item[1]))
