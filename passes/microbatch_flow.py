"""How the rows of the batch flow through the loss function: what microbatches cannot combine.

In: the step traced at the full batch size and at microbatch size. Dims whose sizes differ hold rows
of the batch. A value that comes from the rows by a sum (or a contraction, a scatter-add) can be
combined over microbatches; one that comes from them in another way, such as a maximum, an argmax,
the first row or a queue, cannot, and neither can an integer to which something is added in every
microbatch anew. Only what is visible is refused; what cannot be told is let through.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import jax.numpy as jnp
import numpy as np

from alpa_lite.ir.graph import FORWARD, Graph, Literal, Op, Operand

SUMS = frozenset(
    "reduce_sum dot_general conv_general_dilated scatter-add ragged_dot ragged_dot_general "
    "reduce_window_sum pallas_call custom_partitioning ffi_call pure_callback io_callback".split()
)
"""They sum over rows, or nobody can tell what they do."""

CUMULATIVE = frozenset(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"))

LINEAR = frozenset(
    "reshape transpose broadcast_in_dim squeeze expand_dims convert_element_type copy neg "
    "reduce_sum slice dynamic_slice gather rev stop_gradient name split mul dot_general "
    "cumsum reduce_precision".split()
)
"""Of a sum they give the sum of results, if all other operands are the same everywhere."""

JOINING: Mapping[str, slice] = {
    "add": slice(None),
    "add_any": slice(None),
    "concatenate": slice(None),
    "dynamic_update_slice": slice(2),
    "pad": slice(None),
    "scatter-add": slice(0, 3, 2),
    "select_n": slice(1, None),
    "sub": slice(None),
}
"""Linear in these operands together: each must differ from microbatch to microbatch, or be zero."""


class Kind(IntEnum):
    """What a value is to the batch, worst last; values that all microbatches share have no flow."""

    ROWS = 0
    """It has rows, or differs between microbatches in a way unknown."""
    REDUCED = 1
    """The rows were summed."""
    NO_SUM = 2
    """An integer that is no sum over microbatches."""
    TANGLED = 3
    """The rows were combined in a way that microbatches cannot be."""


@dataclass(frozen=True, slots=True, eq=False)
class Flow:
    """How a value comes from the batch, and the op that made it so."""

    kind: Kind
    op: Op | None = None

    def problem(self) -> str:
        """Why the value cannot be combined over microbatches, or `""`."""
        if self.op is None:
            return ""
        where = f"{self.op.name} at {self.op.source or self.op.scope or 'an unknown place'}"
        if self.kind is Kind.NO_SUM:
            return (
                f"integers are summed over microbatches, but {where} makes it no sum of what each "
                "microbatch adds. Return the number for the batch alone as aux, and go on from it "
                "after the gradient was taken"
            )
        return (
            f"{where} combines rows of the batch in a way that parts of the batch cannot be "
            "combined. Return what it is computed from, per example"
        )


@dataclass(slots=True)
class BatchFlow:
    """What the analysis found.

    Attributes:
      flows: by value of the outermost graph; values that all microbatches share are left out.
      across: ops that let the rows of a microbatch act on each other, inside the model.
      twice: contractions of rows with rows.
    """

    flows: dict[int, Flow] = field(default_factory=dict)
    across: list[Op] = field(default_factory=list)
    twice: list[Op] = field(default_factory=list)


def batch_flow(full: Graph, micro: Graph, batch: Iterable[int]) -> BatchFlow | None:
    """Follow the batch through a step.

    Args:
      full: traced at the full batch size.
      micro: traced at microbatch size.
      batch: value ids of the batch leaves.

    Returns:
      None if the two traces differ in more than sizes, so that nothing can be said.
    """
    if not _alike(full, micro):
        return None
    found = BatchFlow()
    found.flows = _follow(full, micro, {v: Flow(Kind.ROWS) for v in batch}, found)
    found.across = list(dict.fromkeys(found.across))
    found.twice = list(dict.fromkeys(found.twice))
    return found


def _alike(full: Graph, micro: Graph) -> bool:
    """Whether two graphs hold the same ops on the same values, sizes aside."""
    return (
        len(full.values) == len(micro.values)
        and len(full.ops) == len(micro.ops)
        and all(
            a.name == b.name
            and a.operand_ids == b.operand_ids
            and a.results == b.results
            and all(_alike(x, y) for x, y in zip(a.subgraphs, b.subgraphs, strict=True))
            for a, b in zip(full.ops, micro.ops, strict=True)
        )
    )


Flows = dict[int, Flow]


def _follow(full: Graph, micro: Graph, inputs: Mapping[int, Flow], found: BatchFlow) -> Flows:
    """Flows of all values of a graph, given those of its inputs."""
    scope = _Scope(full, micro, dict(inputs), found, _zero_constants(micro))
    for whole, part in zip(full.ops, micro.ops, strict=True):
        scope.run(whole, part)
    return scope.flows


def _zero_constants(graph: Graph) -> set[int]:
    return {
        v
        for v, array in graph.constants.items()
        if not graph.values[v].is_key and not np.any(np.asarray(array))
    }


@dataclass(slots=True)
class _Scope:
    """One graph while it is followed."""

    full: Graph
    micro: Graph
    flows: Flows
    found: BatchFlow
    zeros: set[int]

    def run(self, whole: Op, op: Op) -> None:
        """Flows of one op's results."""
        flows = [self.of(o) for o in op.operands]
        if op.name == "broadcast_in_dim" and self.is_zero(op.operands[0]):
            self.zeros.add(op.results[0])
        if all(flow is None for flow in flows):
            return
        if op.name == "optimization_barrier":
            results = flows
        elif op.subgraphs:
            results = self.nested(whole, op, flows)
        else:
            if self.contracts_rows_twice(op):
                self.found.twice.append(op)
            results = [self.result(op, flows, r) for r in op.results]
        self.flows.update((r, f) for r, f in zip(op.results, results, strict=True) if f is not None)

    def of(self, operand: Operand) -> Flow | None:
        """The flow of an operand."""
        return None if isinstance(operand, Literal) else self.flows.get(operand)

    def is_zero(self, operand: Operand) -> bool:
        """Whether an operand is known to be all zeros."""
        if isinstance(operand, Literal):
            return not np.any(np.asarray(operand.value))
        return operand in self.zeros

    def rows(self, operand: Operand) -> frozenset[int]:
        """Dims that grow with the batch."""
        if isinstance(operand, Literal):
            return frozenset()
        sizes = self.full.values[operand].shape, self.micro.values[operand].shape
        return frozenset(d for d, (a, b) in enumerate(zip(*sizes, strict=True)) if a != b)

    def result(self, op: Op, flows: Sequence[Flow | None], result: int) -> Flow:
        """The flow of one result of an op without a body."""
        varying = [(o, f) for o, f in zip(op.operands, flows, strict=True) if f is not None]
        with_rows = [o for o, _ in varying if self.rows(o)]
        tangled = [(o, f) for o, f in varying if f.kind is Kind.TANGLED]
        if self.rows(result):
            if self.orders_rows(op):
                return Flow(Kind.TANGLED, op)
            if tangled and len(tangled) == len(varying) and with_rows:
                return tangled[0][1]
            self.mixes(tangled)
            return Flow(Kind.ROWS)
        if tangled and op.name in SUMS and with_rows:
            self.mixes(tangled)
            return self.linear(op, Flow(Kind.REDUCED), result)
        if tangled and op.name == "select_n" and all(o == op.operands[0] for o, _ in tangled):
            self.mixes(tangled)
            return Flow(Kind.REDUCED)
        if tangled:
            return tangled[0][1]
        if with_rows and op.name not in SUMS:
            return Flow(Kind.TANGLED, op)
        if with_rows:
            return self.linear(op, Flow(Kind.REDUCED), result)
        worst = max((f for _, f in varying), key=_kind)
        return worst if worst.kind is Kind.ROWS else self.linear(op, worst, result)

    def linear(self, op: Op, flow: Flow, result: int) -> Flow:
        """Floats are averaged whatever was computed; integers must remain sums."""
        if jnp.issubdtype(self.micro.values[result].dtype, jnp.inexact):
            return Flow(Kind.REDUCED)
        if flow.kind is Kind.NO_SUM:
            return flow
        varying = sum(self.of(o) is not None for o in op.operands)
        if any(self.of(o) is not None and self.rows(o) for o in op.operands):
            good = op.name != "scatter-add" or self.is_zero(op.operands[0])
        elif op.name in JOINING:
            joined = op.operands[JOINING[op.name]]
            good = all(self.of(o) is not None or self.is_zero(o) for o in joined)
        else:
            good = op.name in LINEAR and varying == 1
        return flow if good else Flow(Kind.NO_SUM, op)

    def mixes(self, tangled: Sequence[tuple[Operand, Flow]]) -> None:
        """Remember what acts across rows inside the model."""
        self.found.across.extend(f.op for _, f in tangled if f.op is not None)

    def orders_rows(self, op: Op) -> bool:
        """Whether an op sorts or accumulates along the rows."""
        rows = self.rows(op.operands[0])
        if op.name == "sort":
            return op.params["dimension"] in rows
        if op.name in CUMULATIVE:
            return op.params["axis"] in rows
        if op.name == "top_k":
            rank = len(self.micro.values[op.operand_ids[0]].shape)
            return op.params.get("axis", rank - 1) % rank in rows
        return False

    def contracts_rows_twice(self, op: Op) -> bool:
        """Whether an op of the forward pass multiplies every row with every other row."""
        if op.name != "dot_general" or op.phase != FORWARD or not all(map(self.of, op.operands)):
            return False
        contracted, batched = op.params["dimension_numbers"]
        return all(
            self.rows(operand) - {*contracted[side], *batched[side]}
            for side, operand in enumerate(op.operands)
        )

    def nested(self, whole: Op, op: Op, flows: list[Flow | None]) -> list[Flow | None]:
        """Flows of the results of a loop or a branch."""
        if op.name == "cond":
            each = [self.body(whole, op, b, flows[1:]) for b in range(len(op.subgraphs))]
            outs = [
                _worst((*of_branches, _shared(flows[0]))) for of_branches in zip(*each, strict=True)
            ]
        elif op.name == "scan":
            num_carry = op.params["num_carry"]
            outs = self.loop(whole, op, 0, flows, op.params["num_consts"], num_carry)
        else:
            start = op.params["cond_nconsts"]
            num_consts = op.params["body_nconsts"]
            outs = self.loop(whole, op, 1, flows[start:], num_consts, len(op.results))
        return [
            Flow(Kind.ROWS) if f is not None and f.kind < Kind.TANGLED and self.rows(r) else f
            for f, r in zip(outs, op.results, strict=True)
        ]

    def loop(
        self, whole: Op, op: Op, index: int, flows: list[Flow | None], num_consts: int,
        num_carry: int,
    ) -> list[Flow | None]:  # fmt: skip
        """Outputs of a body whose carries settle: a flow only ever gets worse."""
        flows = list(flows)
        carries = slice(num_consts, num_consts + num_carry)
        while True:
            outs = self.body(whole, op, index, flows)
            before = flows[carries]
            flows[carries] = [_worst(pair) for pair in zip(before, outs[:num_carry], strict=True)]
            if [_kind(f) for f in before] == [_kind(f) for f in flows[carries]]:
                return [*flows[carries], *outs[num_carry:]]

    def body(
        self, whole: Op, op: Op, index: int, flows: Sequence[Flow | None]
    ) -> list[Flow | None]:
        """Flows of the outputs of one nested graph."""
        full, micro = whole.subgraphs[index], op.subgraphs[index]
        given = {v: f for v, f in zip(micro.inputs, flows, strict=True) if f is not None}
        inner = _follow(full, micro, given, self.found)
        return [None if isinstance(o, Literal) else inner.get(o) for o in micro.outputs]


def _kind(flow: Flow | None) -> int:
    return -1 if flow is None else int(flow.kind)


def _worst(flows: Iterable[Flow | None]) -> Flow | None:
    return max(flows, key=_kind)


def _shared(predicate: Flow | None) -> Flow | None:
    """What a branch taken says of the results: that they differ between microbatches."""
    return None if predicate is None else Flow(Kind.ROWS)


__all__ = ["BatchFlow", "Flow", "Kind", "batch_flow"]
