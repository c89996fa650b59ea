"""What a search over pipelines looks at: microbatch counts, submeshes, logical meshes.

Left out is only what cannot be, or would waste devices whatever the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax

from alpa_lite.cost_model import Cluster
from alpa_lite.errors import PlanError
from alpa_lite.passes.inter_op import Submesh, submesh_shapes
from alpa_lite.passes.meshes import candidate_meshes
from alpa_lite.passes.pipeline import StepArgs
from alpa_lite.passes.pipeline_methods import PipeshardParallel
from alpa_lite.passes.stages.plan_stage import subcluster

# More microbatches than this are not tried: what they save in bubble and memory is little.
_MAX_MICROBATCHES = 1024

# Where a search begins: with stages of a host each, or of this share of a large cluster, and with a
# row of a microbatch for so many of their devices.
_STAGE_SHARE = 1 / 128
_DEVICES_PER_ROW = 4

# Up to so many submeshes are all priced from the start.
_FEW_SUBMESHES = 4

# Submeshes are not offered if stages of one layer each on them would leave all but this share of
# the devices idle.
_LEAST_USE = 0.2

# The share of the devices that should not be idle.
_WELL_USED = 0.9


def microbatch_counts(call: StepArgs, method: PipeshardParallel) -> tuple[int, ...]:
    """The counts to try: the given one, or all powers of two that divide the batch."""
    if method.num_microbatches != "auto":
        return (method.num_microbatches,)
    size = batch_size(call)
    counts, count = [1], 2
    while size and size % count == 0 and count <= _MAX_MICROBATCHES:
        counts.append(count)
        count *= 2
    return tuple(counts)


def batch_size(call: StepArgs) -> int:
    """Rows of the batch; of several sizes what divides all."""
    leaves = [x for a in call.batch_argnums for x in jax.tree.leaves(call.args[a])]
    return math.gcd(*(x.shape[0] for x in leaves if getattr(x, "shape", ())))


def first_count(counts: Sequence[int], batch_size: int, cluster: Cluster) -> int:
    """The count to price first.

    With one row in a microbatch the dim of the batch is gone, and layouts are not those of larger
    microbatches: the largest count comes last.

    Args:
      counts: to choose from, ascending.
      batch_size: rows of the batch.
      cluster: the hardware.
    """
    devices = max(cluster.devices_per_host, cluster.num_devices * _STAGE_SHARE)
    wanted = batch_size // max(1, int(devices / _DEVICES_PER_ROW))
    return min(counts[:-1] or counts, key=lambda n: (abs(math.log(n / max(1, wanted))), n))


def first_submeshes(offered: Sequence[Submesh], cluster: Cluster, num_stages: int) -> list[Submesh]:
    """The submeshes to price first: around a host, or what so many stages need to use all devices.

    Args:
      offered: to choose from, smallest first.
      cluster: the hardware.
      num_stages: the most stages there can be.
    """
    if len(offered) <= _FEW_SUBMESHES:
        return list(offered)
    least = max(cluster.devices_per_host, cluster.num_devices * _WELL_USED / num_stages)
    middle = next((i for i, s in enumerate(offered) if s.num_devices >= least), len(offered) - 1)
    return list(offered[max(0, middle - 1) : middle + 2])


def offered_submeshes(cluster: Cluster, num_layers: int) -> tuple[Submesh, ...]:
    """The shapes of submeshes that a stage may have, smallest first."""
    shapes = submesh_shapes(cluster.num_hosts, cluster.devices_per_host)
    least = _LEAST_USE * cluster.num_devices / num_layers
    return tuple(s for s in shapes if s.num_devices >= least)


def mesh_shapes(
    method: PipeshardParallel, cluster: Cluster, submesh: Submesh
) -> list[tuple[int, ...]]:
    """The logical meshes of a submesh; none if the method prescribes one of another size."""
    part = subcluster(cluster, submesh.num_hosts, submesh.devices_per_host)
    try:
        return [mesh.shape for mesh in candidate_meshes(method, part)]
    except PlanError:
        return []
