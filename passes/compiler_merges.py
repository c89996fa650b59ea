"""Collectives of a plan that XLA will merge with equal ones.

In: `Decisions`. Out: the uses that XLA saves, and a note for the plan. A plan counts every
collective it wrote; XLA merges instructions that compute the same from the same, such as the causal
masks of all layers. The program then communicates less than was predicted, never more, and holds on
to the result for longer.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

from alpa_lite.passes.decisions import CollectiveUse, Decisions, keyed_collectives
from alpa_lite.passes.program import FlatOp, FlatValue


def merged_collectives(decisions: Decisions) -> Iterator[CollectiveUse]:
    """Collectives whose result another gives already: equal ops on equal operands, laid out alike.

    Example: the scale gradients of two normalisations of one sum are the same sum over devices.
    """
    numbers = _value_numbers(decisions)
    seen = set()
    for use, value, key in keyed_collectives(decisions):
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


def _value_numbers(decisions: Decisions) -> dict[int, Hashable]:
    """Equal for values that XLA finds equal."""
    d, c = decisions, decisions.contraction
    numbers: dict[int, Hashable] = {}
    ids: dict[Hashable, int] = {}
    for op in c.ops:
        specs = (d.operand_specs[op.id], d.result_specs[op.id])
        known = tuple(numbers.get(v, ("value", v)) for v in c.operands[op.id])
        if _is_identity(op, c.values) and specs[0] == specs[1]:
            numbers[op.results[0]] = known[0]
        elif (name := _function(op)) is not None:
            # Ops of two loop bodies stay apart: their graphs or weights differ.
            key = (name, known, specs, op.weight, id(op.graph))
            number = ids.setdefault(key, len(ids))
            numbers.update((value, (number, i)) for i, value in enumerate(op.results))
    return {v: numbers.get(v, ("value", v)) for op in c.ops for v in op.results}


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
