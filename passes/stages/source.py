"""A step traced for a pipeline: its parts, its layers, and what its inputs and outputs mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from alpa_lite.errors import StepError
from alpa_lite.ir.graph import graph_hash
from alpa_lite.ir.trace import TracedStep, trace_whole_gradient
from alpa_lite.passes.microbatch import CONCATENATE, check_outputs, combination_notes
from alpa_lite.passes.pipeline import StepArgs
from alpa_lite.passes.rules import RuleTable
from alpa_lite.passes.stages.cut import StageCut, cut_forward, replicate
from alpa_lite.passes.stages.layers import LayerGraph, build_layers
from alpa_lite.passes.stages.parts import StepParts, split_parts
from alpa_lite.passes.stages.split_scan import SplitStep, split_scan
from alpa_lite.passes.stages.stage_step import (
    StageStep,
    StepNames,
    build_stage_step,
    stage_signature,
)
from alpa_lite.passes.stages.update import UpdateSplit, split_update
from alpa_lite.passes.step_contract import batch_positions, split_batch, state_aliases


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class LayeredStep:
    """A step at one microbatch count, ready to be cut into stages.

    Attributes:
      traced: the step at microbatch size, its gradient one op.
      graph: its layers.
      names: its inputs and outputs.
      num_microbatches: the count.
      places: where the step's inputs and outputs are among those of `graph`, which has those of
        scanned layers in pieces.
      hash: of the traced graph; a plan belongs to one.
      notes: what the user should know.
    """

    traced: TracedStep
    graph: LayerGraph
    names: StepNames
    num_microbatches: int
    places: SplitStep
    hash: str
    notes: tuple[str, ...]

    @property
    def parts(self) -> StepParts:
        """The step's equations."""
        return self.graph.parts


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class CutStep:
    """A step cut into stages, not traced yet.

    Attributes:
      source: the step.
      cuts: forward pass of each stage.
      split: where the update runs.
    """

    source: LayeredStep
    cuts: tuple[StageCut, ...]
    split: UpdateSplit

    def stage(self, index: int, remat: str, like: StageStep | None = None) -> StageStep:
        """Trace one stage as a step of its own, unless it is `like` one that was."""
        s = self.source
        return build_stage_step(s.parts, self.cuts[index], self.split, s.names, remat, like)

    def signature(self, index: int, remat: str) -> str:
        """Equal for stages that are alike but for names."""
        s = self.source
        return stage_signature(s.parts, self.cuts[index], self.split, s.names, remat)


def layer_step(
    call: StepArgs, num_microbatches: int, layer_num: int | Literal["auto"] = "auto",
    num_pieces: int = 1, table: RuleTable | None = None,
    full_batch: tuple[TracedStep, Any] | None = None,
) -> LayeredStep:  # fmt: skip
    """Trace a step for a pipeline.

    Args:
      call: the step and its arguments.
      num_microbatches: microbatches per step.
      layer_num: how many layers.
      num_pieces: into how many pieces a scan over layers is cut; each is one layer then.
      table: sharding rules found so far.
      full_batch: `trace_step(call, 1)`, if it is there already.

    Raises:
      StepError: the step does not keep the contract, has no captured gradient, or cannot be cut
        into microbatches or layers.
    """
    whole, closed = full_batch or trace_step(call, 1)
    traced = whole
    if num_microbatches > 1:
        traced, closed = trace_step(call, num_microbatches)
    aliases = state_aliases(traced, call.donate_argnums)
    if not aliases:
        raise StepError(
            "a pipeline needs a step that returns its state: the argument that donate_argnums "
            "names, first. Use a method without pipeline stages for other functions."
        )
    rows = batch_positions(traced, call.batch_argnums)
    places = split_scan(closed, num_pieces, aliases=aliases, table=table)
    parts = split_parts(places.closed, [p for i in rows for p in places.inputs[i].positions])
    kinds = check_outputs(whole, traced, num_microbatches)
    if places.num_pieces > 1 and layer_num == "auto":
        layer_num = places.num_pieces
    graph = build_layers(parts, layer_num)
    shapes_in, shapes_out = _shapes(closed.in_avals), _shapes(closed.out_avals)
    names = StepNames(
        inputs=tuple(places.input_names(traced.graph.input_names, shapes_in)),
        outputs=tuple(places.output_names(traced.graph.output_names, shapes_out)),
        output_kinds=tuple(
            kind for kind, place in zip(kinds, places.outputs, strict=True) for _ in place.positions
        ),
        aliases=places.aliases,
    )
    notes = combination_notes(whole, traced, kinds, num_microbatches)
    return LayeredStep(
        traced, graph, names, num_microbatches, places, graph_hash(traced.graph),
        (*traced.graph.notes, *notes, *places.notes, *graph.notes),
    )  # fmt: skip


def cut_step(
    source: LayeredStep, stages: Sequence[Sequence[int]], shares: Sequence[float] = (1.0,)
) -> CutStep:
    """Cut a step into stages.

    Args:
      source: the step.
      stages: per stage, its layers.
      shares: per pipeline through the stages, its part of the microbatches; the cut has the stages
        once for each.

    Raises:
      StepError: a layer is missing, comes twice or out of order, or a stage has none.
    """
    cuts = replicate(cut_forward(source.graph, stages), len(shares))
    each = [share for share in shares for _ in stages]
    rows = [i for i, kind in enumerate(source.names.output_kinds) if kind == CONCATENATE]
    split = split_update(source.parts, cuts, source.names.aliases, each, rows)
    return CutStep(source, cuts, split)


def _shapes(avals: Sequence[Any]) -> list[tuple[int, ...]]:
    return [tuple(a.shape) for a in avals]


def trace_step(call: StepArgs, num_microbatches: int) -> tuple[TracedStep, Any]:
    """The step at microbatch size with its gradient one op, and the closed jaxpr of that."""
    args = call.args
    if num_microbatches > 1:
        args = split_batch(args, call.batch_argnums, num_microbatches)
    return trace_whole_gradient(call.fun, *args, arg_names=call.arg_names, name=call.name)
