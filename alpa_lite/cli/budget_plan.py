"""The plan of a budget: the best of the grids that practitioners would try first."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from alpa_lite.api import parallelize
from alpa_lite.cli.exits import InputError
from alpa_lite.cli.output import Report
from alpa_lite.cost_model import Cluster
from alpa_lite.errors import InfeasibleError
from alpa_lite.models import ModelSetup
from alpa_lite.passes.pipeline_methods import ThreeDParallel
from alpa_lite.passes.pipeline_plan import PipelinePlan

_MICROBATCHES_PER_STAGE = 4  # a bubble of 3 / 19 with 4 stages


def best_grid(
    setups: Mapping[str, ModelSetup], batch_size: int, cluster: Cluster, seconds: float,
    report: Report,
) -> tuple[str, ThreeDParallel, PipelinePlan]:  # fmt: skip
    """Plan the usual grids until the time is over and one fits.

    Args:
      setups: the model by what its blocks compute again, least first; of each grid the first that
        fits is taken.
      batch_size: sequences per step.
      cluster: the hardware.
      seconds: after which no other grid is begun, once one fits.
      report: is told of every grid.

    Returns:
      Which setup, its grid and plan.

    Raises:
      InputError: no grid divides the batch.
      InfeasibleError: none of the grids fits.
    """
    begun = time.monotonic()
    best: tuple[str, ThreeDParallel, PipelinePlan] | None = None
    failure: InfeasibleError | None = None
    first = next(iter(setups.values()))
    grids = list(_grids(first.config.num_layers, batch_size, cluster))
    if not grids:
        raise InputError(
            f"--batch-size {batch_size} cannot be split over {cluster.num_devices} devices; "
            "give another"
        )
    state, batch = first.state_shapes(), first.batch_shapes(batch_size)
    for grid in grids:
        for remat, setup in setups.items():
            spent = (time.monotonic() - begun) / seconds
            if spent >= 1 and best is not None:
                break
            report(f"planning dp={grid.dp} tp={grid.tp} pp={grid.pp}", min(0.99, spent))
            try:
                step = parallelize(setup.step, method=grid, cluster=cluster)
                plan = step.plan(state, batch)
            except InfeasibleError as error:
                failure = failure or error
                continue
            if best is None or plan.predicted.step_s < best[2].predicted.step_s:
                best = remat, grid, plan
            break
    if best is None:
        assert failure is not None
        raise failure
    return best


def _grids(num_layers: int, batch_size: int, cluster: Cluster) -> Iterator[ThreeDParallel]:
    """Tensor parallel within a host, stages over hosts, data parallel over the rest; few first.

    Then the same with less tensor parallelism, down to none, where the state is split over all.
    """
    tensor = [cluster.devices_per_host, cluster.devices_per_host // 2, 1]
    for tp in dict.fromkeys(n for n in tensor if n and cluster.devices_per_host % n == 0):
        for pp in (1, 2, 4, 8, 16):
            dp, rest = divmod(cluster.num_devices, tp * pp)
            count = _microbatches(batch_size, dp, pp) if dp and not rest else None
            if count is None or num_layers % pp or pp > cluster.num_hosts:
                continue
            yield ThreeDParallel(dp=dp, tp=tp, pp=pp, num_microbatches=count)


def _microbatches(batch_size: int, dp: int, pp: int) -> int | None:
    """As many as keep the stages busy; None if the batch cannot be split like that."""
    most, rest = divmod(batch_size, dp)
    if rest or most < pp:
        return None
    wanted = _MICROBATCHES_PER_STAGE * pp if pp > 1 else 1
    enough = [count for count in range(1, most + 1) if most % count == 0 and count >= wanted]
    # Of sequences that meet on a device at once, at most two: longer ones do not fit.
    small = [count for count in enough if most // count <= 2]
    return (small or [most])[0]
