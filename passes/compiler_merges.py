"""Collectives of a plan that XLA will merge with equal ones.

In: `Decisions`. Out: the uses that XLA saves, and a note for the plan. A plan counts every
collective it wrote; XLA merges instructions that compute the same from the same, such as the causal
masks of all layers. The program then communicates less than was predicted, never more, and holds on
to the result for longer.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence, Set

from alpa_lite.ir.sharding import ShardingSpec
from alpa_lite.passes.decisions import CollectiveUse, Decisions
from alpa_lite.passes.program import FlatOp, FlatValue


def merged_collectives(decisions: Decisions) -> Iterator[CollectiveUse]:
    """Collectives whose result another gives already: equal ops on equal operands, laid out alike.

    Example: the scale gradients of two normalisations of one sum are the same sum over devices.
    """
    keyed = decisions.keyed_collectives
    numbers = _value_numbers(decisions, {value for _, value, _ in keyed})
    seen = set()
    for use, value, key in keyed:
        same = (numbers[value], use.axes, use.kind, key)
        if same in seen:
            yield use
        seen.add(same)


def merge_notes(decisions: Decisions) -> tuple[str, ...]:
    """What a plan says about them."""
    saved = sum(use.times * use.payload_bytes for use in merged_collectives(decisions))
    if not saved:
        return ()
    size = f"{saved / 1e6:.1f} MB" if saved >= 1e5 else f"{saved / 1e3:.1f} kB"
    return (
        f"{size} of the predicted bytes per step are collectives of equal values, such as masks "
        "that every layer makes; XLA runs equal ones once",
    )


def _value_numbers(decisions: Decisions, values: Set[int]) -> dict[int, Hashable]:
    """Equal for values that XLA finds equal: those asked for, and what they are made of."""
    d, c = decisions, decisions.contraction
    wanted = set(values)
    for op in reversed(c.ops):
        if not wanted.isdisjoint(op.results):
            wanted.update(c.operands[op.id])
    numbers: dict[int, Hashable] = {}
    ids: dict[Hashable, int] = {}
    layouts = _Numbering()
    for op in c.ops:
        if wanted.isdisjoint(op.results):
            continue
        specs = (layouts.number(d.operand_specs[op.id]), layouts.number(d.result_specs[op.id]))
        known = tuple(numbers.get(v, ("value", v)) for v in c.operands[op.id])
        if _is_identity(op, c.values) and specs[0] == specs[1]:
            numbers[op.results[0]] = known[0]
        elif (name := _function(op)) is not None:
            # Ops of two loop bodies stay apart: their graphs or weights differ.
            key = (name, known, specs, op.weight, id(op.graph))
            number = ids.setdefault(key, len(ids))
            numbers.update((value, (number, i)) for i, value in enumerate(op.results))
    return {v: numbers.get(v, ("value", v)) for v in values}


class _Numbering:
    """Equal numbers for equal tuples, of which few are distinct objects: each is hashed once."""

    def __init__(self) -> None:
        self.by_identity: dict[int, int] = {}
        self.by_value: dict[tuple[ShardingSpec, ...], int] = {}

    def number(self, specs: tuple[ShardingSpec, ...]) -> int:
        """The number of a tuple that stays alive."""
        if id(specs) not in self.by_identity:
            self.by_identity[id(specs)] = self.by_value.setdefault(specs, len(self.by_value))
        return self.by_identity[id(specs)]


def _function(op: FlatOp) -> str | None:
    """What the op computes, None if only this op computes it."""
    if op.kind == "gradient":
        return op.kind
    return op.key or None


def _is_identity(op: FlatOp, values: Sequence[FlatValue]) -> bool:
    """A reversal of dims of size 1: the kernel of a 1 x 1 convolution on its way back."""
    if op.name != "rev" or op.op is None:
        return False
    shape = values[op.results[0]].shape
    return all(shape[d] == 1 for d in op.op.params["dimensions"])
