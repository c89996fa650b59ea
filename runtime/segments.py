"""A step cut at its gradient: what runs before the microbatch loop, in it, and after it.

In: a `Program`. Out: `Segment`s, straight lists of ops and links, which the interpreter runs. One
program runs them all (`microbatches`), or each is a program of its own (`phase_cut`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp

from alpa_lite.ir.graph import Literal, Op
from alpa_lite.passes.microbatch import CONCATENATE, MEAN, SUM
from alpa_lite.passes.program import FlatOp, Program

Item = Op | FlatOp
"""An op of the outermost graph, or a link at which a value changes its layout."""


@dataclass(frozen=True, slots=True, eq=False)
class Exit:
    """Where a value leaves the microbatch loop.

    Attributes:
      link: its gradient link.
      kind: how those of all microbatches combine: `mean`, `sum` or `concatenate`.
    """

    link: FlatOp
    kind: str

    @property
    def value(self) -> int:
        """Flat value behind the link."""
        return self.link.results[0]


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """A part of a step.

    Attributes:
      name: readable.
      items: what runs, in order.
      exits: what it adds to sums over microbatches.
      outputs: positions of the graph's outputs that are complete after it.
    """

    name: str
    items: tuple[Item, ...]
    exits: tuple[Exit, ...] = ()
    outputs: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class StepParts:
    """The ops of the outermost graph by how often they run.

    Attributes:
      program: the step.
      before: ops before the gradient that run once.
      loop: ops that run once per microbatch.
      after: ops after the gradient.
      exits: by graph value, where it leaves the loop; none without a loop, whose values the update
        reads as they are.
      links: gradient links by graph value.
      loose: those of them whose value no op makes.
    """

    program: Program
    before: tuple[Op, ...]
    loop: tuple[Op, ...]
    after: tuple[Op, ...]
    exits: Mapping[int, Exit]
    links: Mapping[int, FlatOp]
    loose: tuple[FlatOp, ...]

    def items(self, ops: Iterable[Op]) -> tuple[Item, ...]:
        """Ops, each with the links of its results after it."""
        found: list[Item] = []
        for op in ops:
            found += [op, *(self.links[r] for r in op.results if r in self.links)]
        return tuple(found)

    def enters(self) -> dict[int, FlatOp]:
        """By graph value, the link at which it enters the loop."""
        ops, link_at = self.program.ops, self.program.link_at
        return {v: ops[link_at["microbatch", (), v]] for v in self.program.microbatching.invariants}


def split_step(program: Program, output_kinds: Sequence[str]) -> StepParts:
    """Cut a step at its last gradient; a step without one is all loop.

    Args:
      program: the step.
      output_kinds: how outputs of microbatches combine, per graph output.
    """
    graph, loop = program.graph, program.microbatching
    last = max((r.last_op for r in graph.grad_regions), default=len(graph.ops))
    links = {
        value: program.ops[op]
        for (kind, _, value), op in program.link_at.items()
        if kind == "gradient"
    }
    members = loop.loop_ops if loop.is_loop else frozenset(range(last))
    in_loop = {r for i in members for r in graph.ops[i].results}
    made = {r for op in graph.ops for r in op.results}
    exits = {}
    if loop.is_loop:
        exits = {
            value: Exit(link, _kind(program, output_kinds, value))
            for value, link in links.items()
            if value in in_loop  # another is the same for all microbatches
        }
    return StepParts(
        program,
        tuple(op for op in graph.ops[:last] if op.id not in members),
        tuple(op for op in graph.ops[:last] if op.id in members),
        graph.ops[last:], exits, links,
        tuple(link for value, link in links.items() if value not in made),
    )  # fmt: skip


def _kind(program: Program, output_kinds: Sequence[str], value: int) -> str:
    graph = program.graph
    kinds = [
        kind
        for kind, output in zip(output_kinds, graph.outputs, strict=True)
        if not isinstance(output, Literal) and output == value and kind
    ]
    if CONCATENATE in kinds:
        return CONCATENATE
    if any(value in r.grads for r in graph.grad_regions):
        return MEAN
    if kinds:
        return kinds[0]
    return MEAN if jnp.issubdtype(graph.values[value].dtype, jnp.floating) else SUM
