"""Pipelines of a scan over layers: which are worth planning.

A scan is cut into equal pieces, a stage each, and stages of equal pieces have equal submeshes. What
is left to search: how many stages, how many microbatches, what is computed again, and the schedule.
Every candidate is planned and simulated in full.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from alpa_lite.cost_model import Cluster
from alpa_lite.ir.trace import TracedStep
from alpa_lite.passes.inter_op import Submesh
from alpa_lite.passes.pipeline import StepArgs
from alpa_lite.passes.pipeline_methods import REMAT_POLICIES, PipeshardParallel
from alpa_lite.passes.rules import RuleTable
from alpa_lite.passes.stages.given_spec import balanced_stages
from alpa_lite.passes.stages.layer_scans import find_layer_scans
from alpa_lite.passes.stages.spec import PipelineSpec, StageSpec
from alpa_lite.passes.step_contract import state_aliases

# One stage per submesh and one direction, so that stages stay what they are.
SEARCHED_SCHEDULES = ("1f1b", "eager_1f1b", "zb-h1", "gpipe")

# More microbatches than this per stage leave a bubble of less than a tenth.
_MAX_ROUNDS = 8


def scan_length(call: StepArgs, whole: tuple[TracedStep, Any], table: RuleTable) -> int:
    """Iterations of the scan over layers in the step's loss function; 0 if there is none.

    Args:
      call: the step.
      whole: `trace_step(call, 1)`.
      table: sharding rules found so far.
    """
    traced, closed = whole
    scans = find_layer_scans(closed, table, state_aliases(traced, call.donate_argnums))
    return scans[0].length if scans and not scans[0].reverse else 0


@dataclass(frozen=True, slots=True)
class GridCandidate:
    """A pipeline whose layers are not known yet.

    Attributes:
      num_stages: stages of equal submeshes.
      submesh: shape of each.
      num_microbatches: microbatches per step.
      remat: what the backward pass computes again.
      schedule: order of the tasks.
    """

    num_stages: int
    submesh: Submesh
    num_microbatches: int
    remat: str
    schedule: str

    def spec(self, flops: Sequence[float]) -> PipelineSpec:
        """With layers of these FLOPs."""
        stages = tuple(
            StageSpec(tuple(layers), self.submesh, None, self.remat)
            for layers in balanced_stages(flops, self.num_stages)
        )
        return PipelineSpec(stages, self.num_microbatches, self.schedule)


def grid_candidates(
    call: StepArgs, method: PipeshardParallel, cluster: Cluster, num_layers: int
) -> Iterator[GridCandidate]:
    """Pipelines of a scan over so many layers: fewer stages first, then less rematerialisation.

    The caller stops asking for more rematerialisation once a candidate fits. All have the first
    schedule of `SEARCHED_SCHEDULES` if none is prescribed; of the best, others are tried.
    """
    remats = REMAT_POLICIES if method.remat == "auto" else (method.remat,)
    schedule = SEARCHED_SCHEDULES[0] if method.schedule == "auto" else method.schedule
    for stages in range(1, min(num_layers, cluster.num_devices) + 1):
        submesh = equal_submesh(cluster, stages)
        wanted = method.num_stages in ("auto", stages)
        if submesh is None or not wanted or num_layers % stages:
            continue
        for count in _counts(call, method, stages):
            for remat in remats:
                yield GridCandidate(stages, submesh, count, remat, schedule)


def equal_submesh(cluster: Cluster, stages: int) -> Submesh | None:
    """The submesh of each of so many equal stages that fill the cluster, if there is one."""
    size, rest = divmod(cluster.num_devices, stages)
    per_host = cluster.devices_per_host
    if rest or (size % per_host and per_host % size):
        return None
    return Submesh(max(1, size // per_host), min(size, per_host))


def _counts(call: StepArgs, method: PipeshardParallel, stages: int) -> list[int]:
    if method.num_microbatches != "auto":
        return [method.num_microbatches]
    leaves = [x for a in call.batch_argnums for x in jax.tree.leaves(call.args[a])]
    sizes = [x.shape[0] for x in leaves if x.shape]
    counts = [stages * rounds for rounds in (1, 2, 4, _MAX_ROUNDS)] if stages > 1 else [1]
    return [n for n in counts if all(size % n == 0 for size in sizes)]
