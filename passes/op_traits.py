"""What planning must know about single ops beyond their sharding rules.

Everything here is a fact about a primitive or a link: whether its result may stay a pending sum,
and whether it may share the strategy of its neighbours.
"""

from __future__ import annotations

from alpa_lite.ir.flops import is_matmul
from alpa_lite.ir.graph import Literal
from alpa_lite.passes.program import FlatOp
from alpa_lite.passes.rules import FactorKind, ShardingRule

LINEAR_UNARY = frozenset(
    "transpose reshape neg copy squeeze expand_dims convert_element_type reduce_sum "
    "broadcast_in_dim stop_gradient name".split()
)
"""Applied to each summand, these give the summands of the result."""

LINEAR_NARY = frozenset(("add", "sub", "add_any"))
SCALING = frozenset(("mul", "div"))

HEAVY = frozenset(
    "dot_general conv_general_dilated ragged_dot ragged_dot_general gather scatter scatter-add "
    "scatter_add sort top_k cumsum cumprod cummax cummin cumlogsumexp custom_call pallas_call "
    "reduce_window reduce_window_sum reduce_window_max select_and_scatter_add "
    "select_and_gather_add fft cholesky triangular_solve dynamic_slice "
    "dynamic_update_slice argmax argmin flash_attention flash_attention_backward".split()
)
"""Ops with a strategy of their own: costly, or choosing freely among unlike layouts."""

MERGEABLE_LINKS = frozenset(("carry", "barrier", "join", "state"))
LINEAR_LINKS = frozenset(("gradient", "barrier", "stack"))


def is_linear(op: FlatOp) -> bool:
    """Whether the op maps a sum of operands to the sum of results, operand by operand."""
    if op.kind != "op":
        return op.kind in LINEAR_LINKS
    assert op.op is not None
    name = op.name
    if name in LINEAR_NARY:
        return len(op.operands) == len(op.op.operands)
    if name == "convert_element_type":
        return _is_float(op)
    if name in LINEAR_UNARY:
        return len(op.operands) == 1
    if name in SCALING:
        # mul(x, literal), mul(literal, x), div(x, literal)
        literals = [isinstance(o, Literal) for o in op.op.operands]
        return literals in ([False, True], [True, False]) and not (name == "div" and literals[0])
    return False


def sums_over(rule: ShardingRule) -> bool:
    """Whether the rule has a factor whose sharding leaves a pending sum."""
    return any(
        f.kind is FactorKind.REDUCTION and f.combine == "sum" and f.size > 1 for f in rule.factors
    )


def has_blocked(rule: ShardingRule) -> bool:
    """Whether the rule forbids sharding of some dim."""
    return any(f.kind is FactorKind.BLOCKED and f.size > 1 for f in rule.factors)


def splits_dims(rule: ShardingRule) -> bool:
    """Whether some dim is made of several factors (a reshape that splits or joins dims)."""
    return any(len(factors) > 1 for array in (*rule.operands, *rule.results) for factors in array)


def _is_float(op: FlatOp) -> bool:
    assert op.op is not None and op.graph is not None
    source = op.graph.values[op.op.operand_ids[0]].dtype if op.op.operand_ids else None
    target = op.graph.values[op.op.results[0]].dtype
    return all(getattr(t, "kind", "") in "fV" for t in (source, target))


def is_costly(op: FlatOp) -> bool:
    """Whether the op counts as one of the few that make up a layer."""
    return op.kind == "op" and (is_matmul(op.name) or op.name == "pallas_call")
