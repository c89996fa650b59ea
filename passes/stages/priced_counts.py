"""Layers of a step priced for numbers of microbatches: `PricedCounts`.

Submeshes are priced from a middling size on, larger and smaller ones when they are asked for.
Ctrl-C and the end of the time for pricing leave what has been priced so far.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from alpa_lite.cost_model import Cluster
from alpa_lite.errors import PlanError, SolverTimeoutError, StepError
from alpa_lite.ir.trace import TracedStep
from alpa_lite.passes.inter_op import Submesh
from alpa_lite.passes.pipeline import Progress, StepArgs
from alpa_lite.passes.pipeline_methods import PipeshardParallel
from alpa_lite.passes.rules import RuleTable
from alpa_lite.passes.stages.layer_costs import LayerPricer
from alpa_lite.passes.stages.parts import split_parts
from alpa_lite.passes.stages.search_space import (
    first_submeshes,
    mesh_shapes,
    offered_submeshes,
)
from alpa_lite.passes.stages.source import LayeredStep, layer_step
from alpa_lite.passes.stages.stage_tables import crossing
from alpa_lite.passes.step_contract import batch_positions

# The share of the time budget after which nothing more is priced: the rest is for planning whole.
_PRICING_SHARE = 0.45

# Numbers of microbatches that are priced at most.
_MAX_PRICED = 4


@dataclass(frozen=True, slots=True, eq=False)
class Priced:
    """One number of microbatches.

    Attributes:
      source: the step.
      pricer: its layers, priced on the submeshes of `pricer.submeshes`.
      crossing: bytes between layers, there and back, see `stage_tables.crossing`.
    """

    source: LayeredStep
    pricer: LayerPricer
    crossing: tuple[np.ndarray, np.ndarray]


class PricedCounts:
    """Prices of layers by number of microbatches; grows as it is asked for more.

    Attributes:
      priced: by number of microbatches.
      is_stopped: whether pricing was ended by the time limit or Ctrl-C.
      notes: what the user should know.
    """

    def __init__(
        self, call: StepArgs, whole: tuple[TracedStep, Any], method: PipeshardParallel,
        cluster: Cluster, table: RuleTable, report: Progress, remats: Sequence[str],
        several: bool,
    ) -> None:  # fmt: skip
        """Prepares pricing.

        Args:
          call: the step.
          whole: `trace_step(call, 1)`.
          method: what is prescribed.
          cluster: the hardware.
          table: sharding rules found so far.
          report: called with what is being done and the fraction done.
          remats: policies to price.
          several: whether several numbers of microbatches are of interest.
        """
        self.call, self.whole, self.method, self.cluster = call, whole, method, cluster
        self.table, self.report, self.remats, self.several = table, report, remats, several
        self.started = time.monotonic()
        self.priced: dict[int, Priced] = {}
        self.is_stopped = False
        self.notes: list[str] = []
        self.offered: list[Submesh] = []

    def price(self, count: int, like: Sequence[Submesh] = ()) -> None:
        """Price a number of microbatches.

        Args:
          count: the number.
          like: submeshes that its best stages will have; those in between are priced as well.

        Raises:
          SolverTimeoutError: the time ran out before anything was priced.
          StepError: the step cannot be cut into microbatches, or into as many stages as asked for.
          PlanError: no submesh has a logical mesh as prescribed.
        """
        self.report(f"tracing for {count} microbatches", 0.0)
        source = layer_step(
            self.call, count, self.method.layer_num, table=self.table, full_batch=self.whole
        )
        num_layers = source.graph.num_layers
        if not self.priced:
            self._check_stages(num_layers)
            self.offered = self._usable(num_layers)
        wanted = self.method.num_stages
        num_stages = num_layers if wanted == "auto" else wanted
        submeshes = first_submeshes(self.offered, self.cluster, num_stages)
        if like:
            at = sorted(map(self.offered.index, like))
            submeshes = self.offered[at[0] : at[-1] + 1]
        pricer = LayerPricer(
            source, self.method, self.cluster, self.table, self.remats, self._at_once(source)
        )
        self._price_on(pricer, count, submeshes)
        if pricer.submeshes:
            self.priced[count] = Priced(source, pricer, crossing(pricer.cut))
        if not self.priced:
            raise SolverTimeoutError("the layers could not be priced in time. Raise time_limit_s.")

    def widen(self, count: int, used: Sequence[Submesh]) -> bool:
        """Price what may be better than the best stages found; whether anything was priced.

        Those are the next larger or smaller submeshes, if the best stages have the largest or the
        smallest that is priced, or if there are none.

        Args:
          count: a number of microbatches that is priced.
          used: the submeshes of its best stages; empty if nothing fits.
        """
        pricer = self.priced[count].pricer
        positions = sorted(map(self.offered.index, pricer.submeshes))
        chosen = [*map(self.offered.index, used)] or positions
        wanted = []
        if max(chosen) == positions[-1]:
            wanted.append(positions[-1] + 1)
        if min(chosen) == positions[0]:
            wanted.append(positions[0] - 1)
        submeshes = [self.offered[i] for i in wanted if 0 <= i < len(self.offered)]
        before = len(pricer.submeshes)
        if not self.is_stopped:
            self._price_on(pricer, count, submeshes)
        return len(pricer.submeshes) > before

    def has_time(self) -> bool:
        """Whether there is time to price another number of microbatches."""
        spent = time.monotonic() - self.started
        each = spent / max(1, len(self.priced))
        limit = _PRICING_SHARE * self.method.time_limit_s
        return not self.is_stopped and len(self.priced) < _MAX_PRICED and spent + each < limit

    def not_priced(self) -> tuple[str, ...]:
        """Notes on what was left out."""
        seen = {s for each in self.priced.values() for s in each.pricer.submeshes}
        missing = [str(s) for s in self.offered if s not in seen]
        if not missing or self.is_stopped:
            return tuple(self.notes)
        return (
            *self.notes,
            f"stages on {', '.join(missing)} devices were not considered: the best stages are "
            "not on the smallest or largest submeshes that were",
        )

    def _price_on(self, pricer: LayerPricer, count: int, submeshes: Sequence[Submesh]) -> None:
        for number, submesh in enumerate(submeshes):
            # Whatever is found needs something that is priced.
            share = _PRICING_SHARE if pricer.submeshes or self.priced else 1.0
            deadline_s = self.started + share * self.method.time_limit_s
            done = 0.6 * len(pricer.submeshes) / len(self.offered)
            self.report(f"pricing layers on {submesh} for {count} microbatches", done)
            try:
                in_time = pricer.price(submesh, deadline_s)
            except KeyboardInterrupt:
                if not pricer.submeshes and not self.priced:
                    raise
                self._stop("Ctrl-C", count, submeshes[number:])
                return
            if not in_time:
                self._stop("its time limit", count, submeshes[number:])
                return

    def _stop(self, by: str, count: int, missing: Sequence[Submesh]) -> None:
        self.is_stopped = True
        self.notes.append(
            f"the search was ended by {by}: with {count} microbatches, stages on "
            f"{', '.join(map(str, missing))} devices were not considered"
        )

    def _usable(self, num_layers: int) -> list[Submesh]:
        """The submeshes that can have a logical mesh."""
        found = [
            submesh
            for submesh in offered_submeshes(self.cluster, num_layers)
            if mesh_shapes(self.method, self.cluster, submesh)
        ]
        if not found:
            raise PlanError(
                f"no submesh that a stage can have on {self.cluster.name} has the devices of "
                f"mesh_shape {self.method.mesh_shape}. Change it, or leave it out."
            )
        return found

    def _at_once(self, source: LayeredStep) -> LayeredStep | None:
        """The step with the whole batch as one microbatch, with the same layers."""
        traced, closed = self.whole
        if not self.several or source.num_microbatches == 1:
            return None
        parts = split_parts(closed, batch_positions(traced, self.call.batch_argnums))
        pairs = zip(parts.loop, source.parts.loop, strict=False)
        alike = len(parts.loop) == len(source.parts.loop)
        if not alike or any(a.primitive is not b.primitive for a, b in pairs):
            return None
        return replace(
            source, traced=traced, graph=replace(source.graph, parts=parts), num_microbatches=1
        )

    def _check_stages(self, num_layers: int) -> None:
        """Check that there can be as many stages as asked for."""
        wanted = self.method.num_stages
        if wanted == "auto":
            return
        if wanted > num_layers:
            raise StepError(
                f"{wanted} stages need at least as many layers; the model has {num_layers}. Use "
                "fewer stages, or a larger layer_num."
            )
        if wanted > self.cluster.num_devices:
            raise PlanError(
                f"{wanted} stages need at least as many devices; the cluster has "
                f"{self.cluster.num_devices}. Use fewer stages."
            )
