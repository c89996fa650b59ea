"""Pipelines that a method prescribes: a fixed grid, or stages given by hand."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from alpa_lite.cost_model import Cluster
from alpa_lite.errors import PlanError, StepError
from alpa_lite.passes.inter_op import Submesh
from alpa_lite.passes.pipeline_methods import (
    NO_REMAT,
    ManualPipeline,
    ThreeDParallel,
)
from alpa_lite.passes.schedules import (
    make_schedule,
)
from alpa_lite.passes.stages.source import LayeredStep
from alpa_lite.passes.stages.spec import PipelineSpec, StageSpec


def grid_spec(method: ThreeDParallel, source: LayeredStep, cluster: Cluster) -> PipelineSpec:
    """Equal stages with equal meshes.

    Raises:
      PlanError: the grid does not fit the cluster.
      StepError: fewer layers than stages.
    """
    size = method.dp * method.tp
    if size * method.pp != cluster.num_devices:
        raise PlanError(
            f"a grid of dp={method.dp} x tp={method.tp} x pp={method.pp} has {size * method.pp} "
            f"devices; the cluster has {cluster.num_devices}"
        )
    per_host = cluster.devices_per_host
    if size % per_host and per_host % size:
        raise PlanError(
            f"dp x tp = {size} devices of a stage are neither part of a host of {per_host} nor "
            "whole hosts"
        )
    submesh = Submesh(max(1, size // per_host), min(size, per_host))
    num_stages = method.pp * method.num_virtual
    graph = source.graph
    if num_stages > graph.num_layers:
        raise StepError(
            f"{num_stages} stages need at least as many layers; the model has {graph.num_layers}. "
            "Use fewer stages, or a larger layer_num."
        )
    shape = tuple(n for n in (method.dp, method.tp) if n > 1) or (1,)
    remat = NO_REMAT if method.remat == "auto" else method.remat
    stages = tuple(
        StageSpec(tuple(layers), submesh, shape, remat)
        for layers in balanced_stages(graph.flops, num_stages)
    )
    schedule = "1f1b" if method.schedule == "auto" else method.schedule
    return PipelineSpec(stages, source.num_microbatches, schedule, method.num_virtual)


def manual_spec(method: ManualPipeline) -> PipelineSpec:
    """The stages a user gave."""
    num_stages = len(method.layers)
    schedule = "1f1b" if method.schedule == "auto" else method.schedule
    order = make_schedule(
        schedule, num_stages // method.num_virtual, int(method.num_microbatches),
        method.num_virtual,
    ).placements[0]  # fmt: skip
    shapes = method.mesh_shapes or ()

    def at(entries: Sequence[object], stage: int) -> object:
        return entries[stage if len(entries) == num_stages else order[stage]]

    remat = NO_REMAT if method.remat == "auto" else method.remat
    stages = tuple(
        StageSpec(tuple(layers), Submesh(*at(method.submeshes, i)), at(shapes, i), remat)  # type: ignore[misc, arg-type]
        for i, layers in enumerate(method.layers)
    )
    return PipelineSpec(stages, int(method.num_microbatches), schedule, method.num_virtual)


def balanced_stages(flops: Sequence[float], num_stages: int) -> list[range]:
    """Consecutive ranges of layers, the largest sum as small as possible."""
    done = np.concatenate([[0.0], np.cumsum(flops)])
    num = len(flops)
    best = np.full((num_stages + 1, num + 1), np.inf)
    cut = np.zeros((num_stages + 1, num + 1), dtype=int)
    best[0, 0] = 0.0
    for s in range(1, num_stages + 1):
        for end in range(s, num + 1):
            worst = np.maximum(best[s - 1, s - 1 : end], done[end] - done[s - 1 : end])
            cut[s, end] = s - 1 + int(np.argmin(worst))
            best[s, end] = worst.min()
    bounds = [num]
    for s in range(num_stages, 0, -1):
        bounds.append(int(cut[s, bounds[-1]]))
    bounds.reverse()
    return [range(a, b) for a, b in itertools.pairwise(bounds)]
