"""How long the search for pipelines takes, and what it finds, against published pipelines.

    python -m benchmarks.pipeline_planning [--quick] [--only CASE ...]

The first three cases are the largest of Alpa's evaluation (OSDI 2022, table 3 and section 8.1): 64
V100 in hosts of 8, global batch and number of microbatches as published. Where the pipeline that
Alpa's search chose is published, it is planned here as `ThreeDParallel`, with the least
rematerialisation that fits, and priced by the same cost model. The mixture of experts is trained
with Adafactor: the 16 bytes per parameter of Adam and of sums of gradients in float32 are more than
the cluster has. Each case runs in a process of its own, and once more in another, which finds the
plan in the folder of plans that the first has kept. Writes `results/pipeline_planning.json`.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
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
      num_microbatches: given, or "auto".
      overrides: of the model's configuration.
      published: (dp, tp, pp) of a published pipeline.
      limit_s: what the project promises on 2 cores.
    """

    name: str
    preset: str
    cluster: str
    batch_size: int
    num_microbatches: int | str = "auto"
    overrides: dict[str, Any] = field(default_factory=dict)
    published: tuple[int, int, int] | None = None
    limit_s: float


CASES = (
    Case(name="GPT-39B, V100 8x8", preset="gpt-39b", cluster="v100:8x8", batch_size=1024,
         num_microbatches=1024, published=(1, 4, 16), limit_s=30),
    Case(name="Wide-ResNet-13B, V100 8x8", preset="wide-resnet-13b", cluster="v100:8x8",
         batch_size=1520, num_microbatches=38, published=(8, 1, 8), limit_s=30),
    Case(name="MoE-70B, V100 8x8", preset="moe-70b", cluster="v100:8x8", batch_size=1024,
         num_microbatches=64, overrides={"optimizer": "adafactor"}, limit_s=30),
    Case(name="Llama-3-405B, H100 2048x8", preset="llama3-405b", cluster="h100:2048x8",
         batch_size=16384, limit_s=90),
    Case(name="DeepSeek-V3, H800 256x8", preset="deepseek-v3", cluster="h800:256x8",
         batch_size=15360, limit_s=90),
)  # fmt: skip


def run_case(case: Case, folder: str) -> dict[str, Any]:
    """Search once, and price the published pipeline, in this process.

    Args:
      case: what to plan.
      folder: where plans are kept. If the plan is there, only how long that took is returned.
    """
    import alpa_lite
    from alpa_lite.models import build

    setup = build(case.preset, **case.overrides)
    state, batch = setup.state_shapes(), setup.batch_shapes(case.batch_size)

    def plan(method: Any, **options: Any) -> Any:
        step = alpa_lite.parallelize(setup.step, method=method, cluster=case.cluster, **options)
        return step.plan(state, batch)

    kept = any(Path(folder).iterdir())
    searched = alpa_lite.PipeshardParallel(num_microbatches=case.num_microbatches)
    begun = time.perf_counter()
    found = plan(searched, plan_cache=folder)
    finished = time.perf_counter()
    if kept:
        return {"again_s": finished - begun}
    peak_gb = peak_rss_gb()
    published_s = None
    for method in published_methods(case):
        try:
            published_s = plan(method).predicted.step_s
            break
        except alpa_lite.InfeasibleError:
            continue
    return {
        "search_s": finished - begun,
        "peak_rss_gb": peak_gb,
        "pipeline": pipeline_text(found),
        "num_microbatches": found.num_microbatches,
        "schedule": found.schedule,
        "step_s": found.predicted.step_s,
        "bubble_share": found.predicted.bubble_share,
        "gap": found.gap,
        "published_s": published_s,
        "ratio": None if published_s is None else found.predicted.step_s / published_s,
    }


def published_methods(case: Case) -> Iterator[Any]:
    """The published pipeline, with more and more rematerialisation."""
    import alpa_lite

    for remat in ("none", "dots", "full") if case.published else ():
        yield alpa_lite.ThreeDParallel(
            *case.published, remat=remat, num_microbatches=case.num_microbatches
        )


def pipeline_text(plan: Any) -> str:
    """Stages by submesh and mesh axes, equal neighbours together."""
    runs: list[list[Any]] = []
    for stage in plan.stages:
        text = f"{plan.meshes[stage.mesh].submesh} as {stage.plan.mesh}"
        if runs and runs[-1][0] == text:
            runs[-1][1] += 1
        else:
            runs.append([text, 1])
    return ", ".join(text if n == 1 else f"{n} of {text}" for text, n in runs)


def main() -> None:
    """Run all cases, print and save the table."""
    options = parse_options(
        __doc__, [c.name for c in CASES],
        here="plan this case in this process and print what was measured",
        plans="with --here: where plans are kept",
    )  # fmt: skip
    by_name = {case.name: case for case in CASES}
    if options.more["here"]:
        print(json.dumps(run_case(by_name[options.more["here"]], options.more["plans"])))
        return
    rows = []
    for case in (by_name[name] for name in options.chosen):
        with tempfile.TemporaryDirectory() as folder:
            found, again = (
                run_apart("benchmarks.pipeline_planning", case.name, "--plans", folder)
                for _ in range(2)
            )
        rows.append({"case": case.name, "limit_s": case.limit_s, **found, **again})
        print(rows[-1], flush=True)
    if options.save:
        ResultsTable(
            title="Search for pipelines, one process per case, tracing included",
            command="python -m benchmarks.pipeline_planning",
            environment=describe_environment("no accelerator"),
            columns=COLUMNS,
            rows=tuple(rows),
        ).save("pipeline_planning")


COLUMNS = (
    Column("case", "Case"),
    Column("search_s", "Search s", ".0f"),
    Column("limit_s", "Promised s", "g"),
    Column("again_s", "Second run s", ".1f"),
    Column("peak_rss_gb", "Peak memory GB", ".2f"),
    Column("pipeline", "Stages"),
    Column("num_microbatches", "Microbatches", "d"),
    Column("schedule", "Schedule"),
    Column("step_s", "Predicted step s", ".3g"),
    Column("bubble_share", "Bubble", ".0%"),
    Column("gap", "Gap of the stage program", ".2%"),
    Column("published_s", "Published pipeline, predicted step s", ".3g"),
    Column("ratio", "Ratio", ".2f"),
)

if __name__ == "__main__":
    main()
