"""Pipelines for a step that scans over its layers: which are worth planning.

A scan is cut into equal pieces, a stage each, so there is less to search than with unrolled
layers: how many stages of equal submeshes, how many microbatches, what is computed again. Every
candidate is planned and simulated in full.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax

from alpa_lite.cost_model import Cluster
from alpa_lite.ir.trace import trace_whole_gradient
from alpa_lite.passes.inter_op import Submesh
from alpa_lite.passes.pipeline import StepArgs
from alpa_lite.passes.pipeline_methods import REMAT_POLICIES, PipeshardParallel
from alpa_lite.passes.rules import RuleTable
from alpa_lite.passes.stages.layer_scans import find_layer_scans
from alpa_lite.passes.stages.spec import PipelineSpec, StageSpec
from alpa_lite.passes.step_contract import state_aliases

# More microbatches than this per stage leave a bubble of less than a tenth.
_MAX_ROUNDS = 8


def scan_length(call: StepArgs, table: RuleTable) -> int:
    """Iterations of the scan over layers in the step's loss function; 0 if there is none."""
    traced, closed = trace_whole_gradient(call.fun, *call.args, arg_names=call.arg_names)
    scans = find_layer_scans(closed, table, state_aliases(traced, call.donate_argnums))
    return scans[0].length if scans and not scans[0].reverse else 0


def scan_candidates(
    call: StepArgs, method: PipeshardParallel, cluster: Cluster, length: int
) -> Iterator[PipelineSpec]:
    """Pipelines over a scan of `length` layers: fewer stages first, less rematerialisation first.

    The caller stops asking for more rematerialisation once a candidate fits.
    """
    total = cluster.num_devices
    remats = REMAT_POLICIES if method.remat == "auto" else (method.remat,)
    schedule = "1f1b" if method.schedule == "auto" else method.schedule
    for stages in range(1, min(length, total) + 1):
        submesh = equal_submesh(cluster, stages)
        if length % stages or submesh is None or method.num_stages not in ("auto", stages):
            continue
        for count in _counts(call, method, stages):
            for remat in remats:
                spec = tuple(StageSpec((i,), submesh, None, remat) for i in range(stages))
                yield PipelineSpec(spec, count, schedule)


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
