"""The programs of all stages of a pipeline: `compile_stages`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax

from alpa_lite.passes.pipeshard import PlannedPipeline
from alpa_lite.passes.schedules import programs as task_kinds
from alpa_lite.passes.schedules.task import BACKWARD_INPUT
from alpa_lite.passes.stages.stage_step import update_rounds
from alpa_lite.runtime.phases import PhasePrograms, compile_phases
from alpa_lite.runtime.pipeline_program import arrival_rounds


def compile_stages(
    pipeline: PlannedPipeline, meshes: Sequence[jax.sharding.Mesh]
) -> list[PhasePrograms]:
    """The programs of every stage; XLA compiles those of several stages at once.

    Args:
      pipeline: what was planned.
      meshes: devices of each stage.
    """
    arrivals = arrival_rounds(pipeline)
    kinds = task_kinds(pipeline.schedule)

    def one(index: int) -> PhasePrograms:
        step = pipeline.steps[index]
        rounds = update_rounds(step.traced.graph, arrivals[index])
        last = max((*rounds.values(), *arrivals[index].values(), 0))
        return compile_phases(
            pipeline.planned[index], meshes[index],
            split_backward=BACKWARD_INPUT in kinds[index % pipeline.schedule.num_stages],
            update_rounds=[{op for op, r in rounds.items() if r == n} for n in range(last + 1)],
            late_inputs=[i for i, p in enumerate(step.inputs) if p.kind == "cotangent"],
        )  # fmt: skip

    # Programs that several processes share are compiled in one order everywhere.
    workers = min(len(meshes), os.cpu_count() or 1) if jax.process_count() == 1 else 1
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(one, range(len(meshes))))
