"""Operations of a train step as its traced graph counts them, to hold closed forms against."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from alpa_lite.ir.flops import is_matmul
from alpa_lite.ir.graph import BACKWARD, FORWARD, Graph, Op
from alpa_lite.ir.trace import trace
from alpa_lite.models import ModelSetup


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedFlops:
    """Operations of one train step.

    Attributes:
      matmul: of matrix products, forward and backward.
      other: of everything else in forward and backward, one per element of the largest operand or
        result of each operation.
      update: of the optimizer.
    """

    matmul: float
    other: float
    update: float


def traced_flops(setup: ModelSetup, batch: int) -> TracedFlops:
    """Count a step on a batch; allocates nothing."""
    traced = trace(
        setup.step, setup.state_shapes(), setup.batch_shapes(batch), arg_names=("state", "batch")
    )
    matmul = other = update = 0.0
    for op, times in _leaves(traced.graph, 1):
        flops = times * op.flops
        if op.phase not in (FORWARD, BACKWARD):
            update += flops
        elif is_matmul(op.name):
            matmul += flops
        else:
            other += flops
    return TracedFlops(matmul=matmul, other=other, update=update)


def _leaves(graph: Graph, times: int) -> Iterator[tuple[Op, int]]:
    """Ops without bodies, and how often each runs: of branches the costliest, of while one turn."""
    for op in graph.ops:
        if not op.subgraphs:
            yield op, times
        else:
            body = max(op.subgraphs, key=lambda g: g.flops)
            yield from _leaves(body, times * int(op.params.get("length", 1)))
