"""Dims that are addressed by indices: gather and scatter-add.

Cutting the rows of an embedding table is worth a special case: each device looks up the indices
that fall into its rows and the results are summed; its gradient adds only the updates that fall
into its rows. Re-binding alone does not do that, so the factors are marked `indexed`. The runtime

- in clip mode, and for a gather also where JAX promises that indices are in bounds (XLA clamps
  them), first clips the index component to the whole dim,
- subtracts the shard's offset from it,
- for gather, sets results whose index lies outside of the shard to zero; for scatter-add nothing
  more, as `localize_params` selects the mode that drops updates outside.

A gather in fill mode yields the fill value for an index outside of the whole dim: the runtime adds
it on one device. The index component of a dim is its position in `start_index_map` (gather) or
`scatter_dims_to_operand_dims` (scatter-add). Several indexed dims may be cut at once.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from alpa_lite.passes.rules.equation import Equation
from alpa_lite.passes.rules.rule import Factor, FactorKind, ShardingRule, map_factors

SIMPLE_MODES = frozenset({"CLIP", "FILL_OR_DROP", "PROMISE_IN_BOUNDS"})


def mark_indexed(equation: Equation, rule: ShardingRule) -> ShardingRule:
    """Unblock the factors of indexed dims where the runtime can handle them.

    The simple case: every index component addresses a dim of which one element is taken at a time
    (a collapsed or inserted dim; batching dims are not addressed), and the dim is one factor that
    appears nowhere else but, for scatter-add, in the same dim of the result.
    """
    dims = _indexed_dims(equation)
    if not dims:
        return rule
    operand = rule.operands[0]
    marked = {operand[d][0] for d in dims if len(operand[d]) == 1}
    scatter = equation.primitive.name != "gather"
    others = (*rule.operands[1:], *(() if scatter else rule.results))
    marked -= {f for tensor in others for dim in tensor for f in dim}
    if scatter:
        marked &= {f for d in dims for f in rule.results[0][d]}

    def change(index: int, factor: Factor) -> Factor:
        if index not in marked:
            return factor
        if scatter:
            return Factor(factor.size, FactorKind.PASS)
        return Factor(factor.size, FactorKind.REDUCTION, "sum")

    return dataclasses.replace(map_factors(rule, change), indexed=frozenset(marked))


def _indexed_dims(equation: Equation) -> tuple[int, ...]:
    """The operand dims the index components address in the simple case, else none."""
    name, params = equation.primitive.name, equation.params
    if name not in ("gather", "scatter-add") or _mode_name(params["mode"]) not in SIMPLE_MODES:
        return ()
    numbers = params["dimension_numbers"]
    if name == "gather":
        addressed, single = numbers.start_index_map, numbers.collapsed_slice_dims
    else:
        addressed, single = numbers.scatter_dims_to_operand_dims, numbers.inserted_window_dims
    return tuple(addressed) if set(addressed) <= set(single) else ()


def _mode_name(mode: Any) -> str:
    return getattr(mode, "name", str(mode))
