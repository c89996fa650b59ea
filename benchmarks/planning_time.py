"""How long planning takes, where the time goes, and how it grows.

    python -m benchmarks.planning_time [--quick] [--only CASE ...] [--profile CASE]

Each case runs in a process of its own, so that its peak memory is its own and nothing is cached.
Seconds include tracing; on a machine with other work to do, those of the CPU say more.
Writes `results/planning_time.json`.
"""

from __future__ import annotations

import cProfile
import json
import pstats
import time
from dataclasses import dataclass, field
from typing import Any

from benchmarks.apart import peak_rss_gb, run_apart
from benchmarks.options import parse_options
from benchmarks.results_table import Column, ResultsTable, describe_environment


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One planning run.

    Attributes:
      name: shown in the table.
      preset: model preset.
      cluster: cluster string.
      batch_size: global batch.
      overrides: model configuration.
      mesh: prescribed mesh, or None to search.
      limit_s: what the project promises on 2 cores, or None.
    """

    name: str
    preset: str
    cluster: str
    batch_size: int
    overrides: dict[str, Any] = field(default_factory=dict)
    mesh: tuple[int, ...] | None = None
    limit_s: float | None = None


_LLAMA = {"seq_len": 4096, "remat": True}

CASES = (
    Case(name="GPT-1.3B, 1x8", preset="gpt-1.3b", cluster="h100:1x8", batch_size=32, limit_s=5),
    Case(name="Llama-3-8B unrolled, 8x8", preset="llama3-8b", cluster="h100:8x8", batch_size=64,
         overrides=_LLAMA, limit_s=20),
    Case(name="Llama-3-8B scan, 8x8", preset="llama3-8b", cluster="h100:8x8", batch_size=64,
         overrides={**_LLAMA, "scan_layers": True}, limit_s=10),
    Case(name="Llama-3-405B scan, 64x8", preset="llama3-405b", cluster="h100:64x8",
         batch_size=512, overrides={**_LLAMA, "scan_layers": True}, limit_s=40),
    Case(name="Llama-3-405B unrolled, 64x8", preset="llama3-405b", cluster="h100:64x8",
         batch_size=512, overrides=_LLAMA, limit_s=40),
    *(
        Case(name=f"layers: {n}", preset="gpt-1.3b", cluster="h100:1x8", batch_size=32,
             overrides={"num_layers": n})
        for n in (6, 12, 24, 48, 96)
    ),
    *(
        Case(name=f"mesh axes: {len(mesh)}", preset="gpt-1.3b", cluster="h100:2x8", batch_size=32,
             overrides={"num_layers": 6}, mesh=mesh)
        for mesh in ((16,), (4, 4), (2, 2, 4), (2, 2, 2, 2))
    ),
)  # fmt: skip


def run_case(case: Case) -> dict[str, Any]:
    """Plan once, in this process."""
    started = time.perf_counter()
    import alpa_lite
    from alpa_lite.models import build

    imported = time.perf_counter()
    setup = build(case.preset, **case.overrides)
    method = alpa_lite.AutoParallel(mesh_shape=case.mesh)
    step = alpa_lite.parallelize(setup.step, method=method, cluster=case.cluster)
    state, batch = setup.state_shapes(), setup.batch_shapes(case.batch_size)
    begun, cpu_begun = time.perf_counter(), time.process_time()
    marks: list[tuple[str, float]] = []
    plan = step.plan(
        state, batch, progress=lambda what, done: marks.append((what, time.perf_counter()))
    )
    finished, cpu_finished = time.perf_counter(), time.process_time()
    first_solve = next(t for what, t in marks if what.startswith("solving"))
    return {
        "import_s": imported - started,
        "shapes_s": begun - imported,
        "trace_and_contract_s": first_solve - begun,
        "solve_s": finished - first_solve,
        "plan_s": finished - begun,
        "plan_cpu_s": cpu_finished - cpu_begun,
        "peak_rss_gb": peak_rss_gb(),
        "num_decisions": plan.solve.num_decisions,
        "num_strategies": plan.solve.num_strategies,
        "meshes": len(plan.alternatives),
        "mesh": str(plan.mesh),
        "status": plan.solve.status,
        "gap": plan.solve.gap,
        "predicted_step_s": plan.predicted.step_s,
    }


def profile_case(case: Case) -> None:
    """Print where the time goes."""
    profiler = cProfile.Profile()
    profiler.runcall(run_case, case)
    pstats.Stats(profiler).sort_stats("cumulative").print_stats(40)


def main() -> None:
    """Run all cases, print and save the table."""
    options = parse_options(
        __doc__, [c.name for c in CASES], profile="profile this case instead",
        here="plan this case in this process and print what was measured",
    )  # fmt: skip
    by_name = {case.name: case for case in CASES}
    if options.more["here"]:
        print(json.dumps(run_case(by_name[options.more["here"]])))
        return
    if options.more["profile"]:
        profile_case(by_name[options.more["profile"]])
        return
    rows = []
    for case in (by_name[name] for name in options.chosen):
        rows.append(
            {
                "case": case.name,
                "limit_s": case.limit_s,
                **run_apart("benchmarks.planning_time", case.name),
            }
        )
        print(rows[-1], flush=True)
    if options.save:
        keys = {c.key for c in COLUMNS}
        ResultsTable(
            title="Planning time, one process per case, tracing included",
            command="python -m benchmarks.planning_time",
            environment=describe_environment("no accelerator"),
            columns=COLUMNS,
            rows=tuple({k: v for k, v in row.items() if k in keys} for row in rows),
        ).save("planning_time")


COLUMNS = (
    Column("case", "Case"),
    Column("plan_s", "Plan s", ".1f"),
    Column("limit_s", "Promised s", "g"),
    Column("plan_cpu_s", "CPU s", ".1f"),
    Column("trace_and_contract_s", "Trace and contract s", ".1f"),
    Column("solve_s", "Price and solve s", ".1f"),
    Column("peak_rss_gb", "Peak memory GB", ".2f"),
    Column("num_decisions", "Decisions", "d"),
    Column("num_strategies", "Strategies", "d"),
    Column("meshes", "Meshes tried", "d"),
    Column("gap", "Gap", ".2%"),
)

if __name__ == "__main__":
    main()
