"""A complete choice: one assignment per decision node, and what follows from it.

In: a contraction, a mesh and an assignment per node. Out: the spec of every operand and result of
every op, and the collectives the program will run, exactly.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from alpa_lite.ir.graph import BACKWARD
from alpa_lite.ir.sharding import Mesh, ShardingSpec
from alpa_lite.passes.decision_graph import Contraction
from alpa_lite.passes.pricing import Prices, resolved_axes
from alpa_lite.passes.program import FlatOp
from alpa_lite.passes.reshard import ALL_GATHER, ALL_REDUCE, COLLECTIVES, ReshardStep, plan_reshard
from alpa_lite.passes.strategies import Assignment, layout_spec

ResultKey = tuple[str, tuple[ReshardStep, ...]]
"""Of a layout change: `again` and the steps so far."""

_Specs = tuple[ShardingSpec, ...]
_Resolved = tuple[tuple[str, ...], str]


@dataclass(frozen=True, eq=False)  # without slots, as `keyed_collectives` are found once
class Decisions:
    """Everything the runtime needs to know about layouts.

    Attributes:
      contraction: the decision graph.
      mesh: the logical mesh.
      assignments: per node.
      operand_specs: per op, the spec in which it reads each operand.
      result_specs: per op, the spec of each result.
      resolved: per op and result, mesh axes the op itself reduces over, and how.
    """

    contraction: Contraction
    mesh: Mesh
    assignments: tuple[Assignment, ...]
    operand_specs: tuple[_Specs, ...]
    result_specs: tuple[_Specs, ...]
    resolved: tuple[tuple[_Resolved, ...], ...]

    def value_spec(self, value: int) -> ShardingSpec:
        """The spec a value has where it is made."""
        c = self.contraction
        producer = c.ops[c.definition[value]]
        return self.result_specs[producer.id][producer.results.index(value)]

    @functools.cached_property
    def keyed_collectives(self) -> tuple[tuple[CollectiveUse, int, ResultKey], ...]:
        """Every collective of one step, shared ones once, and what identifies its result.

        That is the value it starts from, and a key. For a sum that an op completes itself: the
        op's result, and an empty key.
        """
        return tuple(_find_collectives(self))


@dataclass(frozen=True, slots=True)
class CollectiveUse:
    """One collective of the program.

    Attributes:
      kind: `all_reduce`, `all_gather`, `reduce_scatter` or `all_to_all`.
      axes: mesh axes.
      payload_bytes: see `ReshardStep.payload_fraction`.
      times: executions per step.
      dtype: element type.
      op: id of the op that needs it.
    """

    kind: str
    axes: tuple[str, ...]
    payload_bytes: float
    times: float
    dtype: str
    op: int


def decide(contraction: Contraction, mesh: Mesh, assignments: Sequence[Assignment]) -> Decisions:
    """Derive all specs from the assignments of the nodes."""
    c = contraction
    names = mesh.names
    operand_specs: list[_Specs] = []
    result_specs: list[_Specs] = []
    resolved: list[tuple[_Resolved, ...]] = []
    # Equal ops of equal nodes share their tuples of layouts, and so of specs.
    known: dict[tuple[int, int, Assignment], tuple[_Specs, _Specs, tuple[_Resolved, ...]]] = {}
    for op in c.ops:
        ins, outs = c.operand_layouts[op.id], c.result_layouts[op.id]
        chosen = assignments[c.node_of[op.id]]
        key = (id(ins), id(outs), chosen)
        if key not in known:
            known[key] = (
                tuple(layout_spec(x, chosen, names) for x in ins),
                tuple(layout_spec(x, chosen, names) for x in outs),
                tuple((resolved_axes(x, chosen, mesh), x.combine) for x in outs),
            )
        operands, results, sums = known[key]
        operand_specs.append(operands)
        result_specs.append(results)
        resolved.append(sums)
    return Decisions(
        c, mesh, tuple(assignments), tuple(operand_specs), tuple(result_specs), tuple(resolved)
    )


@dataclass(frozen=True, slots=True)
class LayoutChange:
    """How one use of a value gets its layout.

    Attributes:
      base: the value behind copies.
      again: the phase for which an array is gathered again instead of being kept from an earlier
        one, or from an earlier iteration of a loop; else `""`.
      done: steps already applied to `base` by copies.
      steps: steps to apply now. A step with the same `base`, `again` and predecessors as another
        is executed once.
    """

    base: int
    again: str
    done: tuple[ReshardStep, ...]
    steps: tuple[ReshardStep, ...]

    def results(self) -> Iterator[tuple[ReshardStep, tuple[int, str, tuple[ReshardStep, ...]]]]:
        """Each step to apply, and what identifies its result: `base` and a `ResultKey`.

        Steps before the first gather make nothing larger, so their results are kept.
        """
        return self._keyed(self.done, self.steps)

    def repeated(self) -> Iterator[tuple[ReshardStep, tuple[int, str, tuple[ReshardStep, ...]]]]:
        """Likewise the steps of copies that are taken once more: gathering again starts at `base`.

        They are none of their own if the copies are made again themselves.
        """
        return (found for found in self._keyed((), self.done) if found[1][1])

    def _keyed(
        self, history: tuple[ReshardStep, ...], steps: tuple[ReshardStep, ...]
    ) -> Iterator[tuple[ReshardStep, tuple[int, str, tuple[ReshardStep, ...]]]]:
        for step in steps:
            history = (*history, step)
            again = self.again if any(s.kind == ALL_GATHER for s in history) else ""
            yield step, (self.base, again, history)


def layout_change(decisions: Decisions, op: FlatOp, position: int) -> LayoutChange:
    """The layout change of one operand."""
    d, c = decisions, decisions.contraction
    value = c.operands[op.id][position]
    steps = plan_reshard(d.value_spec(value), d.operand_specs[op.id][position], d.mesh)
    producer = c.ops[c.definition[value]]
    if producer.kind == "copy":
        before = layout_change(d, producer, 0)
        base, done = before.base, (*before.done, *before.steps)
        again = before.again
    else:
        base, done, again = value, (), ""
    home = c.ops[c.definition[base]]
    late = home.kind == "enter" or (op.phase == BACKWARD and home.phase != BACKWARD)
    if not again and late and any(s.kind == ALL_GATHER for s in steps):
        again = op.phase
    return LayoutChange(base, again, done, steps)


def collectives(decisions: Decisions) -> Iterator[CollectiveUse]:
    """Every collective of one step, shared ones once."""
    return (use for use, _, _ in decisions.keyed_collectives)


def _find_collectives(decisions: Decisions) -> Iterator[tuple[CollectiveUse, int, ResultKey]]:
    d, c = decisions, decisions.contraction
    changes = [
        (op, position, layout_change(d, op, position))
        for op, position in c.uses
        if d.value_spec(c.operands[op.id][position]) != d.operand_specs[op.id][position]
    ]
    seen = set()
    for results in (LayoutChange.results, LayoutChange.repeated):
        for op, position, change in changes:
            flat = c.values[change.base]
            for step, key in results(change):
                if step.kind in COLLECTIVES and d.mesh.size(step.axes) > 1 and key not in seen:
                    seen.add(key)
                    use = CollectiveUse(
                        step.kind, step.axes, step.payload_fraction * flat.num_bytes,
                        op.operand_weights[position], str(flat.aval.dtype), op.id,
                    )  # fmt: skip
                    yield use, key[0], key[1:]
    for op in c.ops:
        for value, spec, (axes, _) in zip(
            op.results, d.result_specs[op.id], d.resolved[op.id], strict=True
        ):
            if axes and d.mesh.size(axes) > 1:
                flat = c.values[value]
                use = CollectiveUse(
                    ALL_REDUCE, axes, flat.num_bytes / spec.num_shards(d.mesh), op.weight,
                    str(flat.aval.dtype), op.id,
                )  # fmt: skip
                yield use, value, ("", ())


def communication_s(decisions: Decisions, prices: Prices) -> float:
    """Seconds of all collectives of one step."""
    return sum(
        use.times * prices.collective_s(use.kind, use.payload_bytes, use.axes)
        for use in collectives(decisions)
    )
